"""The loss behind a frozen head, which keeps no logits."""
import pytest
import torch
from conftest import random_bart, random_gpt2
from torch.profiler import ProfilerActivity, profile

from batches import batch_of
from data.sequence import Pair
from loss import FrozenHead, dev_loss, nats_of, target_nats
from model import attend
from prefix import Prefix


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


def test_logits_of_a_hundred_do_not_overflow():
    """Would catch: an exp without the largest logit taken off. The places above have no such."""
    model = random_gpt2().float().requires_grad_(False)
    hidden, label = places(model, torch.float32, 5)
    hidden = (10 * hidden.detach()).requires_grad_()
    ours = FrozenHead.apply(hidden, label, torch.ones(5), model.head)
    definition = nats_of(model.head(hidden), label)
    assert model.head(hidden).max() > 100 and ours.item() == pytest.approx(definition.item(), 1e-5)


def test_no_array_of_the_vocabulary_is_ever_whole():
    """Would catch: all rows at a time, so that the logits are there at once after all."""
    model = random_gpt2(vocab_size=5000).float().requires_grad_(False)
    hidden, label = torch.randn(2000, 24, requires_grad=True), torch.zeros(2000, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        FrozenHead.apply(hidden, label, torch.ones(2000), model.head)
    sizes = [event.nbytes() for event in told.profiler.kineto_results.events()
             if event.name() == "[memory]"]
    assert 0 < max(sizes) < 2000 * 5000 * 4 / 8         # (N, V) in fp32; 128 of 2000 rows are 1/16


def test_a_head_that_learns_gets_its_gradient():
    """The word embedding is the head too. Would catch: a fine-tuned model whose head is frozen."""
    model = random_gpt2().requires_grad_(True)
    batch = batch_of(model, [Pair([3, 5, 7, 2], 2), Pair([4, 1, 9], 1)])
    ours, = torch.autograd.grad(target_nats(model, model.no_prefix(), batch), model.wte.weight)
    hidden = model(batch.ids).flatten(0, 1)[batch.place]                        # (N, C)
    loss = nats_of(model.head(hidden), batch.label)
    definition, = torch.autograd.grad(loss, model.wte.weight)
    assert torch.allclose(ours, definition, rtol=1e-10)
    assert definition[200].any()        # a word that nobody read: the gradient of the head alone


def test_attention_that_knows_no_tries_gets_none(model):
    """As the fused kernel. Would catch: a dev loss that ends with an assertion, or is another."""
    def form(q, k, v, pk, pv, real, causal):
        assert real.dim() == 2, "a trie"
        return attend(q, k, v, pk, pv, real, causal)
    learner = Prefix(model.config, 5, 0).double()
    pairs = [Pair([3, 5, *target], 2) for target in ([7], [7, 1], [8, 2, 9], [4])]
    found = dev_loss(model, learner, pairs, 3, form)
    assert found == pytest.approx(dev_loss(model, learner, pairs, 3), rel=1e-12)
