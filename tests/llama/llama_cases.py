"""What the tests of the Llama share: random ones of transformers, and ours with their weights."""
import pytest
import torch

from llama.model import Llama
from pretrained.hugging_face import our_config

SHAPES = {"6 heads over 2": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=48),
          "4 over 4": dict(num_attention_heads=4, num_key_value_heads=4, hidden_size=40),
          "4 over 1, tied": dict(num_attention_heads=4, num_key_value_heads=1, hidden_size=24,
                                 tie_word_embeddings=True),
          "wide heads": dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=30,
                             head_dim=14)}


def their_llama(seed=0, **options):
    """A random LlamaForCausalLM of transformers in fp32, far from its initial values."""
    transformers = pytest.importorskip("transformers",
                                       reason="the oracle: pip install transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**dict(
        vocab_size=97, intermediate_size=50, num_hidden_layers=3, max_position_embeddings=80,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=0) | options)
    theirs = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if name.endswith("norm.weight"):            # they all begin as 1
            parameter += 0.3 * torch.randn_like(parameter)
    return theirs


def in_ours(theirs):
    """The same weights as our Llama."""
    config, _ = our_config(theirs.config.to_dict(), "theirs")
    model = Llama(config)
    state = {name.removeprefix("model."): x for name, x in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def difference(found, expected):
    """The largest difference of logits, relative to their range."""
    return ((found - expected).abs().max() / (expected.max() - expected.min())).item()
