"""The loss behind a frozen head, which keeps no logits."""
import pytest
import torch
from conftest import random_bart, random_gpt2

from loss import FrozenHead, nats_of


def places(model, dtype=torch.float64, N=300):
    """Hidden states (N, C), large enough that some words are all but certain, and labels (N,)."""
    torch.manual_seed(7)
    width = model.wte.weight.size(1)
    hidden = (3 * torch.randn(N, width)).to(dtype).requires_grad_()
    return hidden, torch.randint(model.wte.weight.size(0), (N,))


@pytest.mark.parametrize("model", [random_gpt2, random_bart])
def test_the_loss_and_its_gradient_are_those_of_the_definition(model):
    """Would catch: a softmax without its largest logit, a label that is counted twice, a head
    without BART's bias, a gradient that forgets what the loss is divided by.
    """
    model = model().requires_grad_(False)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    hidden, label = places(model)
    label[1] = label[0]
    times = torch.randint(3, label.shape).float()       # 0: no token; 2: learned by two pairs
    ours = FrozenHead.apply(hidden, label, times, model.head)
    definition = sum(n * nats_of(model.head(one)[None], word[None])
                     for one, word, n in zip(hidden, label, times))
    assert (ours - definition).abs() < 1e-10
    (a,), (b,) = (torch.autograd.grad(loss / 7, hidden) for loss in (ours, definition))
    assert (a - b).abs().max() < 1e-12 and b.abs().max() > 0.01


def test_in_bf16_the_softmax_is_taken_in_fp32():
    """Would catch: sums over the vocabulary in 8 bits."""
    model = random_gpt2().to(torch.bfloat16).requires_grad_(False)
    hidden, label = places(model, torch.bfloat16)
    ours = FrozenHead.apply(hidden, label, torch.ones(300), model.head)
    definition = nats_of(model.head(hidden), label)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(definition.item(), rel=1e-6)
    (a,), (b,) = (torch.autograd.grad(loss, hidden) for loss in (ours, definition))
    assert a.dtype == torch.bfloat16
    assert (a - b).float().abs().max() < 2 ** -7 * b.float().abs().max()        # one rounding


def test_no_array_of_the_vocabulary_waits_for_the_way_back():
    """Would catch: logits, or a softmax, kept while the blocks are gone through again."""
    model = random_gpt2().requires_grad_(False)
    hidden, label = places(model)
    for form, keeps in ((lambda: FrozenHead.apply(hidden, label, torch.ones(300), model.head),
                         False),
                        (lambda: nats_of(model.head(hidden), label), True)):    # the control
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            form()
        many = len(label) * model.wte.weight.size(0)
        assert (many in sizes) == keeps
