"""bf16 and fp16 weights: what is compared, logits and scores, is computed in fp32.

The logits of a trained GPT-2 lie tens to a hundred below 0, where bf16 knows every half only.
Random weights, whose logits lie around 0, cannot show that; so here they are moved.
"""
import copy

import pytest
import torch
from conftest import batch_of, random_bart, random_gpt2, random_llama, some_pairs, some_prefix
from torch.nn import functional as F

from decoding.state import DecodingState
from model import attend, attention_mask
from prefix import target_loss

MODELS = {"gpt2": random_gpt2, "bart": random_bart, "llama": random_llama}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
OFFSETS = pytest.mark.parametrize("offset", [-35, -100])


@pytest.fixture(params=MODELS)
def kind(request):
    if request.param != "gpt2":
        pytest.importorskip(f"{request.param}.model",
                            reason=f"the folder {request.param}/ is not here")
    return MODELS[request.param]


def with_offset(model, offset):
    """`model`, whose logits are moved by `offset` where a hidden state begins with 8."""
    model.head_weight.data *= 0.3
    model.head_weight.data[:, 0] = offset / 8
    return model


@HALVES
@OFFSETS
def test_logits_far_below_0_are_those_of_the_same_weights_exactly_added(kind, dtype, offset):
    """Loss, gradient and likeliest token. Would catch: logits, or sums on the way to them, that are
    rounded to the dtype of the weights: half a nat at -100.
    """
    model = with_offset(kind(), offset).to(dtype)
    exact = copy.deepcopy(model).double()               # of the same rounded weights
    torch.manual_seed(1)
    hidden = (2 * torch.randn(200, model.width)).to(dtype)                      # (N, C)
    hidden[:, 0] = 8
    labels, found = torch.randint(len(model.head_weight), (200,)), []
    for m in (model, exact):
        states = hidden.to(m.dtype).requires_grad_()
        logits = m.head(states)                                                 # (N, V)
        losses = F.cross_entropy(logits, labels, reduction="none")              # (N,)
        found.append((logits.argmax(1), losses, *torch.autograd.grad(losses.sum(), states)))
    (likeliest, losses, gradient), (wanted, its_losses, its_gradient) = found
    assert torch.equal(likeliest, wanted)
    assert (losses - its_losses).abs().max() < 1e-4     # fp32 at 100: 4e-6, and sums of 20 numbers
    assert gradient.dtype == dtype                      # rounded once
    eps = torch.finfo(dtype).eps
    assert (gradient - its_gradient).abs().max() < eps * its_gradient.abs().max()
    assert exact.head(hidden.double()).mean() < offset + 5      # they do lie there


@OFFSETS
def test_a_whole_model_in_bf16_is_off_by_no_more_than_its_hidden_states(offset):
    """Would catch: a path from hidden states to a loss, or to the first token, in bf16."""
    model = with_offset(random_gpt2(vocab_size=2000), offset)
    model.ln_f.weight.data[0], model.ln_f.bias.data[0] = 0, 8
    half = model.to(torch.bfloat16)
    exact, prefix = copy.deepcopy(half).double(), some_prefix(half).fold()
    batch = batch_of(half, some_pairs())

    def losses(head, states):
        return F.cross_entropy(head(states), batch.labels, reduction="none")    # (N,)
    rounded, wanted = (
        m.hidden_states(**batch.inputs, prefix=prefix.to(m.dtype)).flatten(0, 1)
        [batch.label_positions].double() for m in (half, exact))                # (N, C) each
    own = losses(exact.head, rounded)
    assert (own - losses(exact.head, wanted)).abs().max() > 0.01        # hidden states are rounded
    assert (losses(half.head, rounded.bfloat16()) - own).abs().max() < 1e-4
    assert target_loss(half, prefix, batch).item() == pytest.approx(own.sum().item(), rel=1e-6)
    first = DecodingState(half, [[3, 5, 7]], prefix).logits                     # (1, V)
    assert first.dtype == torch.float32 and first.unique().numel() > 1900       # few ties of 2000


@HALVES
def test_scores_are_taken_in_fp32(dtype):
    """Would catch: scores of fifty that are rounded by an eighth before the softmax."""
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 3, 9, 24).to(dtype)                             # (B, H, T, D) each
    q[..., 0], k[..., 0] = 16, 16                       # all scores are moved by 256 / sqrt(24)
    pk = pv = k[:1, :, :0]
    mask = attention_mask(torch.ones(1, 9, dtype=torch.bool), 9, causal=True)
    exact = attend(*(x.double() for x in (q, k, v, pk, pv)), mask)
    error = (attend(q, k, v, pk, pv, mask).double() - exact).abs().max()
    assert error < 2 * torch.finfo(dtype).eps * v.abs().max()   # of the weights, and of the output


def test_the_head_of_weights_that_learn_gives_them_their_gradient():
    """Would catch: a product of frozen weights only."""
    half = random_gpt2().to(torch.bfloat16).requires_grad_(True)
    exact = copy.deepcopy(half).double()
    hidden = torch.randn(50, 24).to(torch.bfloat16)
    ours, wanted = (torch.autograd.grad(m.head(hidden.to(m.dtype)).square().sum(), m.wte.weight)[0]
                    for m in (half, exact))
    assert (ours - wanted).abs().max() < 2 ** -8 * wanted.abs().max()           # rounded once
