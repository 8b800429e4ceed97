"""A step with less memory is the same step."""
import pytest
import torch
from conftest import (
    batch_of,
    loss_and_gradients,
    random_bart,
    random_gpt2,
    shared_pairs,
    some_pairs,
    some_prefix,
)
from torch.profiler import ProfilerActivity, profile

from fast.checkpointing import checkpoint_blocks
from prefix import target_loss


def nodes(function, seen):
    """The names of all steps of the backward pass."""
    if function is not None and function not in seen:
        seen.add(function)
        for before, _ in function.next_functions:
            nodes(before, seen)
    return {node.name() for node in seen}


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_a_layers_part_of_the_prefix_has_a_gradient_of_its_own_size(kind):
    """Would catch: `prefix[layer]` in each layer. Its gradient is a whole prefix, zeros but for one
    layer, and as many of them as there are layers are added up; of BART's source it is gigabytes.
    """
    model = kind()
    loss = target_loss(model, some_prefix(model, mid_dim=0)(), batch_of(model, shared_pairs()))
    names = nodes(loss.grad_fn, set())
    assert "UnbindBackward0" in names and "SelectBackward0" not in names


@pytest.mark.parametrize("mid_dim", [16, 0], ids=["MLP", "no MLP"])
@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_what_is_computed_twice_is_the_same(kind, mid_dim):
    """Would catch: a prefix whose gradient is lost on the way through a block that is computed
    again, or comes twice; a block that sees another mask the second time.
    """
    model = kind()
    learner, batch = some_prefix(model, mid_dim=mid_dim), batch_of(model, shared_pairs())
    wanted = loss_and_gradients(model, learner, batch)
    checkpoint_blocks(model)
    for got, want in zip(loss_and_gradients(model, learner, batch), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12 * want.abs().max())


def held(make):
    """The bytes that are still held when `make()` is done and its result is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = make()
    assert result is not None
    return sum(event.self_cpu_memory_usage for event in seen.events())


def held_by_a_loss(model, batch, prepare):
    """The bytes that are kept from the forward pass for the backward pass."""
    learner = some_prefix(model, mid_dim=0)
    prepare(model)
    prefix = learner()
    loss_and_gradients(model, learner, batch)       # what is made once and kept is made here
    return held(lambda: target_loss(model, prefix, batch))


def test_a_further_layer_keeps_one_hidden_state():
    """Would catch: checkpointing that is asked for and keeps all the same; for GPT-2 without it, a
    layer keeps more than ten times as much.
    """
    batch = batch_of(random_gpt2(), shared_pairs())
    B, T = batch.inputs["ids"].shape
    hidden = B * T * 24 * 8                         # (B, T, C) in float64

    def layer_costs(prepare):
        two, three = (held_by_a_loss(random_gpt2(n_layer=n), batch, prepare) for n in (2, 3))
        return three - two
    assert hidden <= layer_costs(checkpoint_blocks) < hidden + 64       # bookkeeping
    assert layer_costs(lambda model: None) > 10 * hidden


def test_every_block_of_a_bart_is_computed_again():
    """Would catch: an encoder that keeps all, a first block that is left out."""
    for model in (random_gpt2(), random_bart()):
        checkpoint_blocks(model)
        blocks = [module for module in model.modules()
                  if type(module).__name__ in ("Block", "EncoderLayer", "DecoderLayer")]
        assert blocks and all("forward" in vars(block) for block in blocks)
    batch = batch_of(random_bart(), some_pairs(5))
    again, kept = (held_by_a_loss(random_bart(), batch, prepare)
                   for prepare in (checkpoint_blocks, lambda model: None))
    assert 3 * again < kept
