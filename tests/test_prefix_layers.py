"""--prefix-layers: a prefix in the upper layers only, for all three models."""
import json

import pytest
import torch
from conftest import batch_of, random_bart, random_gpt2, random_llama, some_pairs

import sample
import train
from data.pairs import pairs_of
from decoding.beam import beam_search
from decoding.constraints import Constraints
from decoding.state import DecodingState, stack_prefixes
from model import attend, attention_mask
from prefix import target_loss, tensors_of
from pretrained.architectures import flags_of, new_prefix, parse_layers
from pretrained.peft_adapter import write_peft
from pretrained.run_directory import load_prefix, save_prefix

MODELS = {"gpt2": random_gpt2, "llama": random_llama,
          "bart": lambda: random_bart(encoder_layers=3, decoder_layers=3)}


@pytest.fixture(params=MODELS)
def model(request):
    if request.param != "gpt2":
        pytest.importorskip(f"{request.param}.model",
                            reason=f"the folder {request.param}/ is not here")
    return MODELS[request.param]()


def upper(model, layers="1-2", length=4, mid_dim=0, seed=3):
    """A prefix of the upper layers with large numbers, in the model's dtype."""
    torch.manual_seed(seed)
    return new_prefix(model, length, mid_dim, layers=layers).to(model.dtype)


class HiddenBelow:
    """Attention as the model's own, but some calls ignore the prefix that they get: an independent
    way to say the same, for a prefix of all layers.

    order: for each call of a forward pass, whether it does.
    """
    supports_tree, joins_prefix = True, False

    def __init__(self, order):
        self.order, self.calls = order, 0

    @staticmethod
    def mask(key_mask, T, causal, tree=None):
        return attention_mask(key_mask, T, causal, tree)

    def __call__(self, q, k, v, pk, pv, mask):
        ignores = self.order[self.calls % len(self.order)]
        self.calls += 1
        if ignores:
            return attend(q, k, v, pk[:, :, :0], pv[:, :, :0], mask[..., pk.size(2):])
        return attend(q, k, v, pk, pv, mask)


def filled(prefix, model):
    """The same prefix with numbers in the lowest layer too, which nobody may look at."""
    parts = [torch.cat((torch.randn_like(part[:1]), part)) for part in tensors_of(prefix)]
    return type(prefix)(*parts) if isinstance(prefix, tuple) else parts[0]


def test_lower_layers_see_the_text_alone(model):
    """Logits and gradients are those of a prefix of length 0 in the lowest of three layers.

    Would catch: text positions that start at 0, a mask with a column too many, a prefix of layers
    1 and 2 that is read by 0 and 1.
    """
    batch, learner = batch_of(model, some_pairs(6)), upper(model)
    loss = target_loss(model, learner(), batch)
    loss.backward()
    found = [weight.grad.clone() for weight in learner.parameters()]
    learner.zero_grad()
    # A BART calls attention in its encoder, then twice in every layer of its decoder.
    order = [True, False, False]
    if model.is_encoder_decoder:
        order += [True, True, False, False, False, False]
    model.attention = HiddenBelow(order)
    other = target_loss(model, filled(learner(), model), batch)
    other.backward()
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=1e-12)
    for gradient, weight in zip(found, learner.parameters(), strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-9, atol=1e-11)


def test_graph_ends_at_the_lowest_layer_that_has_a_prefix(model):
    """What lies below leaves no graph behind, so the backward pass does not come there."""
    has_graph = []
    for block in model.blocks():
        block.register_forward_hook(lambda _, __, out: has_graph.append(out.requires_grad))
    target_loss(model, upper(model)(), batch_of(model, some_pairs(4))).backward()
    # The lowest layer of a decoder reads what the encoder's prefix has changed.
    assert has_graph == ([False, True, True, True, True, True] if model.is_encoder_decoder else
                         [False, True, True])


def test_all_layers_is_the_default(model):
    assert parse_layers("", model) == 3
    everywhere = new_prefix(model, 4, 0, layers="0-2")
    for part, full in zip(tensors_of(everywhere()), tensors_of(model.empty_prefix())):
        assert part.shape[:4] == full.shape[:4]


@pytest.mark.parametrize("text", ["0-1", "2", "3-2", "1-3", "-2", "a-2", "1-", "1-2-2", "²-2"])
def test_other_layers_are_refused(model, text):
    with pytest.raises(ValueError, match=r"got --prefix-layers .* expected FIRST-LAST.*, 2, as"):
        parse_layers(text, model)


def test_stacks_of_different_heights_are_told():
    pytest.importorskip("bart.model", reason="the folder bart/ is not here")
    with pytest.raises(ValueError, match="highest layer, 1 and 2, as LAST"):
        parse_layers("1-2", random_bart(encoder_layers=2, decoder_layers=3))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_decoding_with_a_cache_is_decoding_without(model, num_beams):
    """Greedy and beams, prompts of several lengths: each token as a new pass over all would say."""
    prefix, pairs = upper(model).fold(), some_pairs(5)
    prompts = [pair.ids[:pair.start] for pair in pairs]
    rules = Constraints(256, max_new_tokens=6)
    if num_beams == 1:
        rows = sample.generate(model, prompts, rules, prefix)
    else:
        state = DecodingState(model, prompts, prefix, 6, num_beams)
        rows = [row for row, _ in beam_search(state, rules, num_beams, 1.0, "false")]
    for prompt, row in zip(prompts, rows):
        state = DecodingState(model, [prompt], prefix, 6)
        start = state.prompts[0]
        inputs = {"source": torch.tensor([prompt])} if model.is_encoder_decoder else {}
        hidden = model.hidden_states(torch.tensor([start + row]), prefix=prefix, **inputs)
        logits = model.head(hidden)[0, len(start) - 1:]                         # (N + 1, V)
        if num_beams == 1:
            assert logits.argmax(-1)[:len(row)].tolist() == row
        log_p = logits.log_softmax(-1)[:len(row)].gather(1, torch.tensor([row]).T).sum()
        for token in row:
            log_p -= state.logits[0].log_softmax(-1)[token]
            state.logits = state.step(torch.tensor([[token]]))[:, 0]
        assert log_p.abs() < 1e-9


def test_a_batch_has_prefixes_of_the_same_layers(model):
    """Of different lengths as ever; of different layers they are refused."""
    pairs = some_pairs(3)
    prompts = [pair.ids[:pair.start] for pair in pairs]
    prefixes = [upper(model, length=n, seed=n).fold() for n in (2, 5, 3)]
    rules = Constraints(256, max_new_tokens=5)
    together = sample.generate(model, prompts, rules, prefixes)
    assert together == [sample.generate(model, [prompt], rules, prefix)[0]
                        for prompt, prefix in zip(prompts, prefixes)]
    with pytest.raises(ValueError, match=r"got prefixes of \[1, 2\] layers"):
        stack_prefixes([prefixes[0], upper(model, "2-2").fold()], 2)


def test_file_holds_these_layers_alone(model, tmp_path):
    learner = upper(model)
    assert learner.num_stored_parameters() == sum(p.numel() for p in learner.parameters())
    save_prefix(tmp_path / "prefix.pt", learner.fold(), model)
    for part, own in zip(tensors_of(load_prefix(tmp_path / "prefix.pt", model)),
                         tensors_of(learner.fold())):
        torch.testing.assert_close(part, own.float().to(own), rtol=0, atol=0)
        assert len(part) == 2
    save_prefix(tmp_path / "high.pt", filled(filled(learner.fold(), model), model), model)
    with pytest.raises(ValueError, match="with a prefix of shape"):
        load_prefix(tmp_path / "high.pt", model)


def test_it_starts_from_the_upper_layers_of_words(model):
    """Without an MLP, the keys and values of the words, those of the upper layers, exactly."""
    words, learner = model.prefix_from_tokens([7, 8, 9]), upper(model, length=3)
    assert learner.initialize(words) == 0
    for part, full in zip(tensors_of(learner.fold()), tensors_of(words)):
        torch.testing.assert_close(part, full[1:].float().to(part), rtol=0, atol=0)


def test_flags_of_a_start(model):
    settings = train.Settings(start_from="run")
    flags = flags_of(upper(model, length=3).fold(), model, settings)
    assert flags["prefix_len"] == 3 and flags["prefix_layers"] == "1-2"
    assert ("prefixes" in flags) == model.is_encoder_decoder
    assert flags_of(model.prefix_from_tokens([7, 8]), model, settings)["prefix_layers"] == ""


def test_shared_sources_learn_the_same(model):
    """Tries and the frozen head of fast/, with the prefix in the upper layers."""
    pytest.importorskip("fast.tries", reason="the folder fast/ is not here")
    from fast import tries
    from fast.frozen_head import frozen_target_loss
    pairs, learner = some_pairs(6), upper(model)
    plain = target_loss(model, learner(), pairs_of(model).collate(pairs, model))
    fast = frozen_target_loss(model, learner(), tries.collate(pairs, model))
    torch.testing.assert_close(plain, fast, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", [
    "sdpa", pytest.param("fused", marks=pytest.mark.slow)])     # interpreted, it is slow
def test_other_forms_of_attention(model, attention):
    pytest.importorskip("fast.forms", reason="the folder fast/ is not here")
    batch, prefix = batch_of(model, some_pairs(3)), upper(model).fold()
    expected = target_loss(model, prefix, batch)
    if attention == "fused":
        pytest.importorskip("triton", reason="needs triton")
        if torch.cuda.is_available():
            pytest.skip("the kernel is interpreted where there is no GPU")
        from fast.triton_attention import TritonAttention
        model.attention = TritonAttention(model.device, torch.float32)
    else:
        from fast.sdpa_attention import SDPAAttention
        model.attention = SDPAAttention()
    torch.testing.assert_close(target_loss(model, prefix, batch), expected, rtol=1e-5, atol=1e-5)


def test_a_step_moves_the_upper_layers_only(model):
    settings = train.Settings(lr=1e-2, steps=10, batch_size=4)
    trainer = train.Trainer(settings, model, upper(model, mid_dim=8), [], [])
    before = [part.clone() for part in tensors_of(trainer.learner.fold())]
    trainer.train_step(some_pairs(4))
    for part, old in zip(tensors_of(trainer.learner.fold()), before):
        assert len(part) == 2 and all((new != was).any() for new, was in zip(part, old))


def test_train_sample_and_peft(tmp_path, capsys):
    """The whole way, on the bundled model; a resumed run goes on with the same layers."""
    out = tmp_path / "run"
    train.main(["--steps", "4", "--prefix-layers", "2-3", "--dev-pairs", "20", "--stop-at", "2",
                "--device", "cpu", "--out", str(out)])
    train.main(["--resume", str(out)])
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["prefix_layers"] == "2-3"
    saved = torch.load(out / "prefix.pt", weights_only=True)["prefix"]
    assert saved.size(0) == 2
    sample.main(["--run", str(out), "name : A", "--device", "cpu", "--max-new-tokens", "3"])
    with pytest.raises(ValueError, match="peft's format has no other"):
        write_peft(out, tmp_path / "peft")
    again = tmp_path / "again"
    train.main(["--start-from", str(out), "--mid-dim", "0", "--steps", "1", "--dev-pairs", "20",
                "--device", "cpu", "--out", str(again)])
    assert json.loads((again / "config.json").read_text())["settings"]["prefix_layers"] == "2-3"
