"""Frozen weights in the order in which this CPU's matrix kernels want them (oneDNN).

A matrix kernel first rearranges a weight into blocks that fit its registers, at every call; frozen
weights can be rearranged once for all. The numbers are the same; they are added up in another
order. Decoding gains most: a step multiplies few rows with every weight, so it is the reading of
the weights that takes the time. In training the backward pass multiplies with the same weights
transposed, which are stored a second time; the weights themselves have no gradient.
Only on a CPU. Letters as in model.py.
"""
import math

import torch
from torch import nn

ROWS = 8                # the layout is made for so many rows; it is good for 4 and 300 as well
# For fewer rows than these oneDNN takes a kernel that reads the weights more slowly: on a Zen 5 one
# row takes 1.1 to 1.3 times as long as four in fp32, up to 1.1 in bf16. So they are repeated.
# Without AVX-512 (a Zen 3) one row is faster than four.
LEAST = 4
# (least, most): without AVX-512 packed weights are faster for so many rows: 2 to 8 rows up to twice
# as fast, 40 rows 1.2 times, but not 1 row, and not the hundreds of rows in training.
AVX2_ROWS = (2, 64)
# Weights of fewer numbers than these stay in a CPU's cache: there is nothing to be won, and oneDNN
# keeps a kernel for every shape of a batch.
LARGE = 2 ** 24


def has_avx512():
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def why_not_packable(model):
    """Why the weights of `model` cannot be packed here; empty where they can."""
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {model.dtype}"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return "this PyTorch has no oneDNN, or another version of it"
    if model.dtype == torch.bfloat16 and not has_avx512():
        return "its weights are bf16, and this CPU has no AVX-512, which oneDNN wants for them"
    return ""


def helps(model, rows=math.inf):
    """Whether packing makes `model` faster here (measured, README.md): a large one, with AVX-512
    always, with AVX2 alone in decoding. rows: tokens that a step of decoding reads; inf: training.
    """
    large = sum(weight.numel() for weight in model.parameters()) >= LARGE
    low, high = (1, math.inf) if has_avx512() else AVX2_ROWS
    return large and low <= rows <= high and not why_not_packable(model)


def multiply(x, weight, bias):
    """x W^T + b, with W in oneDNN's own layout: x (..., in) -> (..., out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class WithGradient(torch.autograd.Function):
    """`multiply`, and the gradient of x, which is the output's gradient times W: (..., out) ->
    (..., in). `transposed` is W^T in oneDNN's layout.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, transposed):
        ctx.transposed = transposed
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return multiply(grad.contiguous(), ctx.transposed, None), None, None, None


class Packed(nn.Module):
    """x W^T + b with a frozen W; learning: W^T is stored too, for the gradient of x."""

    def __init__(self, weight, bias, learning=False):
        super().__init__()
        weight, reorder = weight.detach(), torch.ops.mkldnn._reorder_linear_weight
        self.weight, self.bias = reorder(weight, ROWS), bias
        self.out_features, self.in_features = weight.shape
        self.transposed = reorder(weight.t().contiguous(), ROWS) if learning else None
        self.least = LEAST if has_avx512() else 1

    def forward(self, x):
        if self.transposed is not None:
            return WithGradient.apply(x, self.weight, self.bias, self.transposed)
        copies = -(-self.least // x.shape[:-1].numel())     # rounded up; more than 1: see LEAST
        if copies == 1:
            return multiply(x, self.weight, self.bias)
        return multiply(torch.stack((x,) * copies), self.weight, self.bias)[0]      # (..., out)


@torch.no_grad()
def pack_head(model, learning=False):
    """Replace the method `head`, as most models have no layer for it. Its bias is head(0)."""
    weight = model.head_weight                                                  # (V, C)
    if weight.dtype == torch.float32:       # of bf16 weights oneDNN would give logits in bf16
        bias = model.head(weight.new_zeros(1, weight.size(1)))[0].clone()       # (V,)
        model.head = Packed(weight, bias if bias.any() else None, learning).forward


def pack(model, learning=False):
    """Replace every linear layer of `model`, and its head, in place."""
    pack_head(model, learning)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer.weight is not model.head_weight:
                setattr(parent, name, Packed(layer.weight, layer.bias, learning))
