"""What the paper compares prefix-tuning with (section 5.2): fine-tuning, all of it or the top.

A learner is what train.py's loop needs: `parameters()`, the only numbers that the optimiser gets;
calling it, for the prefix to put in front; `keep` and `kept`, its own part of a run's directory.
prefix.Prefix is one, FineTune is another. A side door: train.py opens it for --method.
Not here: adapters, LoRA, embedding-only and infix. Letters as in model.py.
"""
from pathlib import Path

from torch import nn

from checkpoint import load, save


class FineTune(nn.Module):
    """The model itself learns: all of its weights, or those of its last `top` blocks only.

    The paper's FT-top2 is top = 2: for GPT-2 medium 25,192,448 weights.
    """

    def __init__(self, model, top=None):
        super().__init__()
        if top is not None and model.architecture == "bart":
            raise ValueError("got --method finetune-top2 with a BART; expected a GPT-2, the paper "
                             "has its top two blocks for that one only; use --method finetune")
        if top is not None and not 1 <= top <= model.config.n_layer:
            raise ValueError(f"got the top {top} blocks of a model with {model.config.n_layer}; "
                             "expected at most all of them; use --method finetune")
        self.model, self.top = model, top
        (model if top is None else model.h[-top:]).requires_grad_(True)

    def parameters(self, recurse=True):
        return (weight for weight in super().parameters(recurse) if weight.requires_grad)

    def forward(self):
        """No prefix: (L, 2, 1, H, 0, D)."""
        return self.model.no_prefix()

    def fold(self):
        return self()

    def stored(self):
        """How many numbers a task takes up on disk: each one that learned."""
        return sum(weight.numel() for weight in self.parameters())

    def keep(self, directory, model):
        """Write the whole model as it is now to DIRECTORY/model."""
        save(model, Path(directory) / "model")

    def kept(self, directory, model):
        """(model, prefix) as `keep` wrote them; `model` itself has learned on since."""
        like = model.wte.weight
        return load(Path(directory) / "model", like.device, like.dtype), self()
