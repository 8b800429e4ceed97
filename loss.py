"""-log p of the targets of a batch (Li & Liang 2021, equation 2), and of a whole dev set.

Called by train.py, step.py and denoise.py. Not here: the tensors of a batch (batches.py), the
optimiser (train.py). Letters as in model.py; N tokens that are learned.
"""
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from batches import batch_of, by_source, tokens_of
from model import attend as written_out


def nats_of(logits, label, times=1):
    """-log p summed over the tokens label (N,), from logits (N, V), each so many times (N,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))    # bf16 is too coarse
    return (F.cross_entropy(logits, label, reduction="none") * times).sum()


class FrozenHead(torch.autograd.Function):
    """nats_of(head(hidden), label, times), where the weights of the head do not learn.

    Then the way back needs one thing only, the gradient of `hidden`, and it is worked out at once:
    d nats / d logits = times (softmax(logits) - onehot(label)), written over the logits, some rows
    at a time. So no array (N, V) is ever whole, and none waits for the blocks' way back: that was a
    third of the memory of a step of the smallest GPT-2.
    """

    @staticmethod
    def forward(ctx, hidden, label, times, head):
        nats, gradients = hidden.new_zeros((), dtype=torch.float32), []
        # Few enough for the memory, enough to keep a multiplication fast.
        rows = 128 if hidden.device.type == "cpu" else 1024
        parts = (x.split(rows) for x in (hidden, label[:, None], times[:, None]))
        for part, label, times in zip(*parts):                      # (R, C), (R, 1), (R, 1)
            with torch.enable_grad():
                part = part.detach().requires_grad_()                               # (R, C)
                logits = head(part)                                                 # (R, V)
            p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))    # (R, V)
            p -= p.amax(1, keepdim=True)
            own = p.gather(1, label)                                                # (R, 1)
            total = p.exp_().sum(1, keepdim=True)                                   # (R, 1)
            p *= times / total
            p.scatter_add_(1, label, -times.to(p.dtype))
            gradients += torch.autograd.grad(logits, part, p.to(logits.dtype))      # (R, C)
            nats = nats + ((total.log() - own) * times).sum()
        ctx.save_for_backward(torch.cat(gradients))                                 # (N, C)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None, None


def target_nats(model, prefix, batch, attend=written_out):
    """-log p(target | source) summed over the batch, in nats: the loss on targets and their end
    only.

    prefix: (L, 2, 1 or B, H, P, D), of BART `Places`. batch: a `Batch`. The padding stands behind
    every real token, where the causal mask hides it already, or what tries are told in its place.
    """
    ids, place, label, times, look, source = batch
    real = None
    if look is not None:        # all see the prefix
        own = prefix if source is None else prefix.decoder
        real = F.pad(look, (own.size(4), 0), value=True)                            # (B, T, P+T)
    if source is None:
        hidden = model(ids, prefix, real, attend=attend)                            # (B, T, C)
    else:
        memory = model.encode(*source, prefix, attend)
        hidden = model(ids, prefix, real, attend=attend, memory=memory)             # (B, T, C)
    # Only the places where something is learned see the vocabulary head: the largest multiplication
    # of a small GPT-2, and its largest activation.
    hidden = hidden.flatten(0, 1)[place]                                            # (N, C)
    frozen = hidden.requires_grad and not model.wte.weight.requires_grad
    if frozen and not torch.compiler.is_compiling():        # a compiler has its own way to save
        return FrozenHead.apply(hidden, label, times, model.head)
    return nats_of(model.head(hidden), label, times)


@torch.no_grad()
def dev_loss(model, learner, pairs, batch_size, attend=written_out):
    """-log p of a target token, averaged over all target tokens of `pairs`, in nats.

    What texts begin with is computed once for them all, but with the fused kernel, which knows no
    such mask: there text by text, to the same figure.
    """
    share, nats = attend is written_out, 0.0
    prefix = learner.fold().to(model.wte.weight.dtype)
    groups = by_source(pairs, batch_size if share else 1)
    groups.sort(key=lambda group: group[0].start + tokens_of(group))        # else much is padding
    while groups:
        batch = groups.pop()
        while groups and len(batch) + len(groups[-1]) <= batch_size:
            batch += groups.pop()
        nats += target_nats(model, prefix, batch_of(model, batch, share), attend).item()
    return nats / tokens_of(pairs)
