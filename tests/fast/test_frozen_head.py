"""The loss behind a frozen head, which keeps no logits."""
import pytest
import torch
from conftest import (
    batch_of,
    loss_and_gradients,
    random_bart,
    random_gpt2,
    shared_pairs,
    some_prefix,
)
from torch.profiler import ProfilerActivity, profile

from data.batches import Pair
from fast.frozen_head import FrozenHead, frozen_target_loss
from prefix import target_loss, token_losses


def positions(model, dtype=torch.float64, N=300):
    """Hidden states (N, C), large enough that some words are all but certain, and labels (N,)."""
    torch.manual_seed(7)
    hidden = (3 * torch.randn(N, model.width)).to(dtype).requires_grad_()
    return hidden, torch.randint(model.config.vocab_size, (N,))


@pytest.mark.parametrize("model", [random_gpt2, random_bart])
def test_the_frozen_loss_and_its_gradient_are_those_of_the_definition(model):
    """Would catch: a softmax without its largest logit, a label that is counted twice, a head
    without BART's bias, a gradient that forgets what the loss is divided by.
    """
    model = model()
    hidden, labels = positions(model)
    labels[1] = labels[0]
    weights = torch.randint(3, labels.shape).float()    # 0: no token; 2: learned by two pairs
    ours = FrozenHead.apply(hidden, labels, weights, model.head)
    definition = sum(weight * token_losses(model.head(one)[None], label[None]).sum()
                     for one, label, weight in zip(hidden, labels, weights))
    assert (ours - definition).abs() < 1e-10
    (a,), (b,) = (torch.autograd.grad(loss / 7, hidden) for loss in (ours, definition))
    assert (a - b).abs().max() < 1e-12 and b.abs().max() > 0.01


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_the_loss_of_a_batch_is_the_plain_one_and_so_are_its_gradients(kind):
    """Of a whole step, and of a dev loss. Would catch: hidden states of other positions, weights
    of the labels that are left out.
    """
    model = kind()
    learner, batch = some_prefix(model), batch_of(model, shared_pairs())
    batch.label_weights[::3] = 0
    for got, want in zip(loss_and_gradients(model, learner, batch, frozen_target_loss),
                         loss_and_gradients(model, learner, batch), strict=True):
        # The frozen head sums in fp32 at least: 1e-10 is of sums in float64, added otherwise.
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10 * want.abs().max())
    with torch.no_grad():
        losses = [form(model, learner(), batch) for form in (frozen_target_loss, target_loss)]
    assert torch.equal(*losses)


def test_in_bf16_the_softmax_of_the_frozen_head_is_taken_in_fp32():
    """Would catch: sums over the vocabulary in 8 bits."""
    model = random_gpt2().to(torch.bfloat16)
    hidden, labels = positions(model, torch.bfloat16)
    ours = FrozenHead.apply(hidden, labels, torch.ones(300), model.head)
    definition = token_losses(model.head(hidden), labels).sum()
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(definition.item(), rel=1e-6)
    (a,), (b,) = (torch.autograd.grad(loss, hidden) for loss in (ours, definition))
    assert a.dtype == torch.bfloat16
    assert (a - b).float().abs().max() < 2 ** -7 * b.float().abs().max()        # one rounding


def test_no_array_of_the_vocabulary_waits_for_the_backward_pass():
    """Would catch: logits, or a softmax, saved while the blocks are gone through again."""
    model = random_gpt2()
    hidden, labels = positions(model)
    for form, saves in ((lambda: FrozenHead.apply(hidden, labels, torch.ones(300), model.head),
                         False),
                        (lambda: token_losses(model.head(hidden), labels).sum(), True)):  # control
        sizes = []

        def save(x, sizes=sizes):
            sizes.append(x.numel())
            return x
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            form()
        assert (len(labels) * model.config.vocab_size in sizes) == saves


def test_logits_of_a_hundred_do_not_overflow_in_the_frozen_head():
    """Would catch: an exp without the largest logit taken off. The positions above have no such."""
    model = random_gpt2().float()
    hidden, labels = positions(model, torch.float32, 5)
    hidden = (10 * hidden.detach()).requires_grad_()
    ours = FrozenHead.apply(hidden, labels, torch.ones(5), model.head)
    definition = token_losses(model.head(hidden), labels).sum()
    assert model.head(hidden).max() > 100 and ours.item() == pytest.approx(definition.item(), 1e-5)


def test_no_array_of_the_vocabulary_is_ever_whole():
    """Would catch: all rows at a time, so that the logits are there at once after all."""
    model = random_gpt2(vocab_size=5000).float()
    hidden, labels = torch.randn(2000, 24, requires_grad=True), torch.zeros(2000, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        FrozenHead.apply(hidden, labels, torch.ones(2000), model.head)
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events()
             if event.name() == "[memory]"]
    assert 0 < max(sizes) < 2000 * 5000 * 4 / 8         # (N, V) in fp32; 128 of 2000 rows are 1/16


def test_a_head_that_learns_is_refused_by_the_frozen_one():
    """The word embedding is the head too. Would catch: a fine-tuned model whose head gets half of
    its gradient.
    """
    model = random_gpt2().requires_grad_(True)
    batch = batch_of(model, [Pair([3, 5, 7, 2], 2), Pair([4, 1, 9], 1)])
    with pytest.raises(AssertionError, match="this head learns"):
        frozen_target_loss(model, model.empty_prefix(), batch)
