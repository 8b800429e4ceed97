"""The prefix itself: what it is to the model, how it starts, how it is saved."""
import inspect
import pickle

import pytest
import torch
from conftest import random_gpt2

from model import GPT2, GPT2Config
from prefix import Prefix, flatten, summarize_parameters, unflatten
from pretrained.run_directory import load_prefix, save_prefix

EXACT = 1e-10       # float64 sums in another order: about 1e-15 of numbers of order 10


def test_a_prefix_made_of_words_is_those_words(model):
    """The keys and values of real tokens, as a prefix, give the logits of those tokens as a prompt.

    Would catch: text that does not start at position P, a mask that hides part of the prefix, keys
    and values that are swapped or belong to another layer.
    """
    words, text = [5, 200, 31, 7], torch.randint(257, (3, 11))
    prompt = torch.cat((torch.tensor([words] * 3), text), 1)
    hard = model.head(model.hidden_states(prompt))[:, len(words):]
    soft = model.head(model.hidden_states(text, model.prefix_from_tokens(words)))
    assert (hard - soft).abs().max() < EXACT


def test_theta_is_a_table_and_an_mlp_with_one_tanh(model):
    """Section 4.3, written out. Would catch: another activation, or a layer too many."""
    prefix = Prefix.for_model(model, 5, 16)
    (W, b), (U, c) = ((layer.weight, layer.bias) for layer in (prefix.mlp[0], prefix.mlp[2]))
    flat = torch.tanh(prefix.table @ W.T + b) @ U.T + c                     # (P, 2LHD)
    assert torch.allclose(prefix()[1, 0, 0, 2, :, 3], flat[:, ((2 * 1 + 0) * 4 + 2) * 6 + 3],
                          rtol=1e-5)                                        # fp32 sums of 24 terms
    assert W.shape == (16, 24) and U.shape == (2 * 3 * 24, 16)


def test_the_columns_stand_in_the_official_order(model):
    """Column ((2 layer + {K: 0, V: 1}) H + head) D + i. Would catch: files PEFT cannot read."""
    prefix = Prefix.for_model(model, 5, mid_dim=0)
    kv, H, D = prefix(), 4, 6
    for layer, which, head, i in ((0, 0, 0, 0), (2, 1, 3, 5), (1, 0, 2, 4), (0, 1, 1, 0)):
        column = ((2 * layer + which) * H + head) * D + i
        assert torch.equal(kv[layer, which, 0, head, :, i], prefix.table[:, column])
    assert torch.equal(flatten(kv), prefix.table)
    assert torch.equal(unflatten(flatten(kv), model.empty_prefix().shape), kv)


def test_one_copy_serves_the_whole_batch_and_gathers_its_gradient(model):
    """Would catch: a gradient taken from one row only."""
    prefix = Prefix.for_model(model, 3, mid_dim=0).double()
    ids = torch.randint(257, (4, 7))

    def gradient(ids):
        return torch.autograd.grad(model.hidden_states(ids, prefix()).square().sum(),
                                   prefix.table)[0]
    whole, alone = gradient(ids), sum(gradient(row[None]) for row in ids)
    assert (whole - alone).abs().max() < EXACT * whole.abs().max()


def test_without_an_mlp_words_are_started_from_exactly(model):
    """Would catch: a start in another order of columns than the forward pass."""
    words = model.prefix_from_tokens([72, 101, 121])
    prefix = Prefix.for_model(model, 3, mid_dim=0).double()
    assert prefix.initialize(words) == 0
    assert (prefix() - words).abs().max() < 1e-6        # the table was filled through fp32
    prefix = Prefix.for_model(model, 3, mid_dim=0)
    prefix.initialize(words)
    assert torch.equal(prefix(), words.float())


def test_with_an_mlp_words_are_approached(model):
    """Would catch: a fit that moves away from its target, or that ignores the words."""
    torch.manual_seed(0)
    words = model.prefix_from_tokens([72, 101, 121])
    prefix = Prefix.for_model(model, 3, mid_dim=32)
    before = (prefix() - words).square().mean().item()
    left = prefix.initialize(words, lr=1e-2)
    assert left < 0.01 * before
    again = Prefix.for_model(model, 3, mid_dim=32)
    before = (again() - words).square().mean().item()
    assert again.initialize(words) < before         # with the official 500 steps of 1e-4
    assert left == pytest.approx((prefix() - words).square().mean().item(), rel=1e-4)   # fp32


def test_random_starts_are_what_they_are_called(model):
    """Would catch: U(0, 1) and N(0, 1) mixed up. 4,320 draws: 5 deviations are .02 and .08."""
    torch.manual_seed(0)
    uniform = Prefix.for_model(model, 30, mid_dim=0, init="uniform").table
    normal = Prefix.for_model(model, 30, mid_dim=0, init="random").table
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.025 and abs(normal.mean()) < 0.08
    assert abs(normal.std() - 1) < 0.06
    with pytest.raises(ValueError, match="length 0"):
        Prefix.for_model(model, 0)


def test_the_numbers_of_the_paper_are_counted():
    """GPT-2 medium, P = 5, k = 512: 25.74M numbers learn, 245,760 are stored, which is 0.07 %.

    Would catch: "0.1 %" said of a prefix whose MLP has to be shipped with it.
    """
    with torch.device("meta"):
        medium = GPT2(GPT2Config(n_embd=1024, n_layer=24, n_head=16)).requires_grad_(False)
        prefix = Prefix.for_model(medium, 5)
    line = summarize_parameters(prefix, medium)
    assert "trainable params: 25,744,896 || all params: 380,568,064 " in line   # 354,823,168 frozen
    assert "to store: 245,760, 0.07% of the model" in line


def test_a_prefix_is_saved_and_comes_back(model, tmp_path):
    """Would catch: numbers lost on the way, or a gradient path into a loaded prefix."""
    folded = Prefix.for_model(model, 5, 16).fold()
    save_prefix(tmp_path / "prefix.pt", folded, model)
    again = load_prefix(tmp_path / "prefix.pt", model)
    assert torch.equal(again, folded.double()) and not again.requires_grad
    assert (tmp_path / "prefix.pt").stat().st_size < 4 * folded.numel() + 4096  # fp32, no MLP


def test_a_prefix_of_another_model_is_refused(model, tmp_path):
    """Would catch: fluent nonsense, the only sign of a prefix on the wrong model."""
    save_prefix(tmp_path / "prefix.pt", Prefix.for_model(model, 5, 16).fold(), model)
    with pytest.raises(ValueError, match="'random 0', expected one for .*'random 1'"):
        load_prefix(tmp_path / "prefix.pt", random_gpt2(seed=1))


class Trap:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(Trap(), 2),
                                     pickle.dumps({"a": 1}, 2)])  # a dict of no tensors
def test_a_file_that_is_no_prefix_is_refused(model, tmp_path, content, capsys):
    """Would catch: a traceback, or code in a pickle that is run."""
    (tmp_path / "prefix.pt").write_bytes(content)
    with pytest.raises(ValueError, match="which is no prefix"):
        load_prefix(tmp_path / "prefix.pt", model)
    with pytest.raises(ValueError, match="which is no prefix"):
        load_prefix(tmp_path / "absent.pt", model)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["gpt2", "bart"])
def test_words_are_fitted_as_in_the_official_code(architecture):
    """500 steps at 1e-4. Would catch: a fit that ends too soon, of which nothing else would tell.
    """
    if architecture == "bart":
        kind = pytest.importorskip("bart.prefix", reason="bart/ is not here").BARTPrefix
    else:
        kind = Prefix
    defaults = inspect.signature(kind.initialize).parameters
    assert (defaults["steps"].default, defaults["lr"].default) == (500, 1e-4)
