"""A frozen model's weights in the order in which this CPU's matrix kernels want them (oneDNN).

A matrix kernel first rearranges a weight into blocks that fit its registers, at every call; frozen
weights can be rearranged once for all. The numbers are the same; they are added up in another
order. Decoding gains most: a step multiplies few rows with every weight, so it is the reading of
the weights that takes the time. In training the way back multiplies with the same weights
transposed, which are laid out a second time; the weights themselves have no gradient.
Only on a CPU. Called by opening.py, for --pack of sample.py and train.py. Letters as in model.py.
"""
import torch
from torch import nn

from model import GPT2

ROWS = 8                # the layout is made for so many rows; it is good for 4 and 300 as well
# For fewer rows than these oneDNN takes a kernel that reads the weights more slowly: on a Zen 5 one
# row takes 1.1 to 1.3 times as long as four in fp32, up to 1.1 in bf16. So they come several times.
LEAST = 4
# Weights of fewer numbers than these stay in a CPU's cache: there is nothing to be won, and oneDNN
# keeps a kernel for every shape of a batch.
LARGE = 2 ** 24


def possible(model):
    """Why the weights of `model` cannot be packed here; empty where they can."""
    like = model.wte.weight
    if like.device.type != "cpu":
        return f"the model is on {like.device}"
    if like.dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {like.dtype}"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return "this PyTorch has no oneDNN, or another version of it"
    return ""


def worthwhile(model):
    return sum(weight.numel() for weight in model.parameters()) >= LARGE


def multiply(x, weight, bias):
    """x W^T + b, with W in oneDNN's own layout: x (..., in) -> (..., out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class WithGradient(torch.autograd.Function):
    """`multiply`, and its gradient for x, which is the gradient behind it times W: (..., out) ->
    (..., in). `back` is W^T in oneDNN's layout.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, back):
        ctx.back = back
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return multiply(grad.contiguous(), ctx.back, None), None, None, None


class Packed(nn.Module):
    """x W^T + b with a frozen W; learning: what stands before it may want a gradient."""

    def __init__(self, weight, bias, learning=False):
        super().__init__()
        weight, reorder = weight.detach(), torch.ops.mkldnn._reorder_linear_weight
        self.weight, self.bias = reorder(weight, ROWS), bias
        self.back = reorder(weight.t().contiguous(), ROWS) if learning else None

    def forward(self, x):
        if self.back is not None:
            return WithGradient.apply(x, self.weight, self.bias, self.back)
        few = -(-LEAST // x.shape[:-1].numel())     # 1, or how often so few rows have to come
        if few == 1:
            return multiply(x, self.weight, self.bias)
        return multiply(torch.stack((x,) * few), self.weight, self.bias)[0]     # (..., outputs)


def pack(model, learning=False):
    """Replace every linear layer of `model`, and the head of a GPT-2, in place.

    The word embedding stays as it is beside the packed head, for words are looked up in it.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, Packed(layer.weight, layer.bias, learning))
    if isinstance(model, GPT2):
        # In the place of the method.
        model.head = Packed(model.wte.weight, None, learning).forward
