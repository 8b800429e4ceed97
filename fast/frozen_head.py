"""prefix.target_loss behind a head that does not learn: no logits of a whole batch in memory.

Li & Liang 2021, equation 2: the language model's weights are frozen, and so is its head (mostly
the word embedding). Letters as in model.py; N labels of a batch, R rows at a time.
"""
import torch
from torch.autograd.function import once_differentiable

from prefix import token_losses


class FrozenHead(torch.autograd.Function):
    """(token_losses(head(hidden), labels) * weights).sum(), for frozen weights of the head.

    The backward pass needs only the gradient of `hidden`, so the forward pass computes it already:
    d loss / d logits = weights * (softmax(logits) - onehot(labels)), written over the logits, some
    rows at a time. So the logits (N, V) are never in memory as a whole, nor kept until the backward
    pass: that was a third of the memory of a step of the smallest GPT-2.
    """

    @staticmethod
    def forward(ctx, hidden, labels, weights, head):
        loss, gradients = hidden.new_zeros((), dtype=torch.float32), []
        # Few enough for the memory, enough to keep a multiplication fast.
        rows = 128 if hidden.device.type == "cpu" else 1024
        parts = (x.split(rows) for x in (hidden, labels[:, None], weights[:, None]))
        for part, label, weight in zip(*parts):                     # (R, C), (R, 1), (R, 1)
            with torch.enable_grad():
                part = part.detach().requires_grad_()                               # (R, C)
                logits = head(part)                                                 # (R, V)
            p = logits.detach()                                                     # (R, V)
            p -= p.amax(1, keepdim=True)
            own = p.gather(1, label)                                                # (R, 1)
            total = p.exp_().sum(1, keepdim=True)                                   # (R, 1)
            p *= weight / total
            p.scatter_add_(1, label, -weight.to(p.dtype))
            gradients += torch.autograd.grad(logits, part, p)                       # (R, C)
            loss = loss + ((total.log() - own) * weight).sum()
        ctx.save_for_backward(torch.cat(gradients))                                 # (N, C)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, None


def frozen_target_loss(model, prefix, batch):
    """The same as prefix.target_loss, where the head does not learn."""
    assert not model.head_weight.requires_grad, "this head learns, it needs a gradient"
    hidden = model.hidden_states(**batch.inputs, prefix=prefix)                 # (B, T, C)
    hidden = hidden.flatten(0, 1)[batch.label_positions]                        # (N, C)
    if hidden.requires_grad:
        return FrozenHead.apply(hidden, batch.labels, batch.label_weights, model.head)
    losses = token_losses(model.head(hidden), batch.labels)                     # (N,)
    return (losses * batch.label_weights).sum()
