"""A frozen model's weights in the order in which this CPU's matrix kernels want them (oneDNN).

A decoding step multiplies few rows with every weight of the model, so it is the reading of the
weights that takes the time. A matrix kernel first rearranges a weight into blocks that fit its
registers, at every call; frozen weights can be rearranged once for all. The numbers are the same;
they are added up in another order. Only for decoding on a CPU: there is no gradient.
Called by sample.py, for --pack. Letters as in model.py.
"""
import torch
from torch import nn
from torch.nn import functional as F

from model import GPT2

ROWS = 8                # the layout is made for so many rows; it is good for 4 and 300 as well
# For fewer rows than these oneDNN takes a kernel that reads the weights more slowly: on a Zen 5 one
# row takes 1.1 to 1.3 times as long as four in fp32, up to 1.1 in bf16. So rows of zeros are added.
LEAST = 4


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


class Packed(nn.Module):
    """x W^T + b with W in oneDNN's own layout; no gradient."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.bias = bias

    def forward(self, x):
        rows = x.shape[:-1].numel()
        if rows < LEAST:
            more = F.pad(x.reshape(rows, -1), (0, 0, 0, LEAST - rows))          # (LEAST, inputs)
            return self(more)[:rows].view(*x.shape[:-1], -1)                    # (..., outputs)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(model):
    """Replace every linear layer of `model`, and the head of a GPT-2, in place.

    The word embedding stays as it is beside the packed head, for words are looked up in it.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, Packed(layer.weight, layer.bias))
    if isinstance(model, GPT2):
        model.head = Packed(model.wte.weight, None).forward     # in the place of the method
