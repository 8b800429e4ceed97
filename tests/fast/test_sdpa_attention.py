"""PyTorch's attention is model.attend: output and every gradient, over unfriendly shapes."""
import pytest
import torch
from attention_cases import (
    DEVICE,
    MASKS,
    SHAPES,
    all_seen,
    assert_a_query_that_sees_nothing_gets_zero,
    assert_as_good_as_the_explicit_form,
    ragged,
    tensors,
)
from conftest import (
    batch_of,
    loss_and_gradients,
    random_bart,
    random_gpt2,
    shared_pairs,
    some_prefix,
)

from decoding.beam import beam_search
from decoding.constraints import Constraints
from decoding.state import DecodingState
from fast import tries
from fast.sdpa_attention import SDPAAttention
from sample import generate


@pytest.mark.parametrize("padded, causal, rows", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa_is_attention(shape, padded, causal, rows):
    """Would catch: the triangle in the upper left corner, a prefix that padding hides."""
    T, S, P, D = SHAPES[shape]
    key_mask = ragged(2, P + S) if padded else all_seen(P + S)
    assert_as_good_as_the_explicit_form(SDPAAttention(), tensors(T, S, P, D, rows), key_mask,
                                        causal)


def test_sdpa_knows_texts_that_branch():
    """Would catch: a tree that is left out, so that beams see each other."""
    tree = (torch.rand(2, 4, 9) < 0.5).to(DEVICE)
    assert_as_good_as_the_explicit_form(SDPAAttention(), tensors(4, 9, 3, 16), ragged(2, 12), True,
                                        tree)


def test_in_bf16_sdpa_is_no_worse_than_the_explicit_form():
    """Would catch: a mask as a number that bf16 cannot hold."""
    inputs = tensors(20, 50, 3, 24, dtype=torch.bfloat16)
    assert_as_good_as_the_explicit_form(SDPAAttention(), inputs, ragged(2, 53), True)


def test_a_query_that_sees_nothing_gets_zero_of_sdpa():
    """Would catch: NaN of a row of -inf alone, which spreads to every later layer and gradient."""
    assert_a_query_that_sees_nothing_gets_zero(SDPAAttention())


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_a_model_with_sdpa_is_that_model(kind):
    """Loss and gradients, plain and in tries; tokens, greedy and by beams.

    Would catch: a model that hands attention something these tests did not think of.
    """
    model, fast, learner = kind(), kind(), some_prefix(kind())
    fast.attention = SDPAAttention()
    for batch in (batch_of(model, shared_pairs()), tries.collate(shared_pairs(), model)):
        for got, want in zip(loss_and_gradients(fast, learner, batch),
                             loss_and_gradients(model, learner, batch), strict=True):
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-9 * want.abs().max())
    prompts, rules = [[3, 5, 7, 9, 2], [8, 1]], Constraints(256, 6)
    prefix = learner.fold()
    assert generate(fast, prompts, rules, prefix) == generate(model, prompts, rules, prefix)
    texts = [beam_search(DecodingState(m, prompts, prefix, 6, 3), rules, 3) for m in (fast, model)]
    assert [row for row, _ in texts[0]] == [row for row, _ in texts[1]]
