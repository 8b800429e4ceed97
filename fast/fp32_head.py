"""model.linear_in_fp32 as one product of bf16 or fp16 with an fp32 result: PyTorch has it on CUDA.

The plain form upcasts the weight in each call, to twice its bytes, and multiplies in fp32. Here the
GPU's tensor cores multiply the weights as they are stored. They add up in fp32 anyway, and these
sums are returned. Letters as in model.py; N rows.
"""
import torch
from torch.autograd.function import once_differentiable


class FP32Product(torch.autograd.Function):
    """x W^T for a frozen W, and the gradient of x in W's dtype: PyTorch has none for this."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)                 # (N, V)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, None                             # (N, C)


def linear_in_fp32(x, weight, bias=None):
    """The same function as model.linear_in_fp32: (..., C) -> (..., V)."""
    assert not weight.requires_grad, "this head learns, it needs a gradient"
    y = FP32Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])  # (..., V)
    return y if bias is None else y + bias


def set_head(model):
    """Let `model` compute its logits so, where it can; returns whether it can."""
    can = (model.device.type == "cuda" and model.head_weight.dtype.itemsize == 2
           and not model.head_weight.requires_grad)
    if can:
        model.head_product = linear_in_fp32
    return can
