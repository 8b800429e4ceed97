"""Our Llama is transformers' LlamaForCausalLM: logits, losses and gradients of a prefix."""
import json

import pytest
import torch
from torch.nn import functional as F

from pretrained.checkpoint import load
from pretrained.hugging_face import convert

transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers")

SHAPES = {"6 heads over 2": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=48),
          "4 over 4": dict(num_attention_heads=4, num_key_value_heads=4, hidden_size=40),
          "4 over 1, tied": dict(num_attention_heads=4, num_key_value_heads=1, hidden_size=24,
                                 tie_word_embeddings=True),
          "wide heads": dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=30,
                             head_dim=14)}


@pytest.fixture(params=SHAPES)
def both(request, tmp_path):
    """The same random weights in transformers' Llama and, through its files, in ours: fp32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, intermediate_size=50, num_hidden_layers=3,
                                      max_position_embeddings=64, initializer_range=0.3,
                                      eos_token_id=2, **SHAPES[request.param])
    theirs = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_text("{}")
    convert(tmp_path / "theirs", tmp_path / "ours")
    return theirs, load(tmp_path / "ours")


def test_the_logits_are_those_of_transformers(both):
    """Would catch: interleaved rotation, a norm with a mean, heads repeated in another order."""
    theirs, ours = both
    ids = torch.randint(97, (2, 20))
    expected = theirs(ids).logits
    found = ours.head(ours.hidden_states(ids))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()         # fp32


def test_a_prefix_is_past_keys_and_values(both):
    """Loss and gradient. Would catch: text whose rotation starts at 0 behind a prefix, a prefix
    key that is rotated, a gradient of one query head only.
    """
    theirs, ours = both
    L, _, _, G, _, D = ours.empty_prefix().shape
    prefix, ids = torch.randn(L, 2, 1, G, 5, D, requires_grad=True), torch.randint(97, (3, 12))
    cache = transformers.DynamicCache()
    for layer, (k, v) in enumerate(prefix):
        cache.update(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), layer)
    logits = theirs(ids, past_key_values=cache).logits
    found = ours.head(ours.hidden_states(ids, prefix))
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()             # fp32

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    a, b = (torch.autograd.grad(loss(x), prefix)[0] for x in (found, logits))
    assert (a - b).abs().max() < 1e-4 * b.abs().max() and b.abs().max() > 0     # fp32


@pytest.mark.parametrize("option, value", [
    ("attention_bias", True), ("hidden_act", "gelu"), ("mlp_bias", True),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0})])
def test_what_it_cannot_do_is_refused_by_name(tmp_path, option, value):
    """Would catch: a model that nearly fits and generates nonsense."""
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=24, intermediate_size=50,
                                      num_hidden_layers=1, num_attention_heads=4)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    about = json.loads(path.read_text()) | {option: value}
    about.pop("rope_parameters", None)
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="got .*with (rope_type|" + option + ") = .*; expected"):
        convert(tmp_path / "theirs", tmp_path / "ours")
