"""Fine-tuning, all of the model or the top of it: what the paper compares with (section 5.2).

train.py's loop takes any learner with these: `parameters()`, the only numbers that the optimiser
gets; a call, which gives the prefix to put in front; `fold`, `loss_per`, `num_stored_parameters`.
prefix.Prefix is one learner, FineTune is another. Not here: adapters, LoRA, embedding-only and
infix. Letters as in model.py.
"""
from torch import nn


class FineTune(nn.Module):
    """The model itself learns: all of its weights, or those of its last `top` blocks only.

    The paper's FT-top2 is top = 2: for GPT-2 medium 25,192,448 weights.
    """
    loss_per = "token"          # the mean over the tokens of a batch, as in the official code

    def __init__(self, model, top=None):
        super().__init__()
        if top is not None and model.is_encoder_decoder:
            raise ValueError("got --method finetune-top2 with a BART; expected a GPT-2, the paper "
                             "defines the top two blocks for GPT-2 only; use --method finetune")
        blocks = model.blocks()
        if top is not None and not 1 <= top <= len(blocks):
            raise ValueError(f"got the top {top} blocks of a model with {len(blocks)}; expected at "
                             "most all of them; use --method finetune")
        self.model = model
        for part in [model] if top is None else blocks[-top:]:
            part.requires_grad_(True)

    def parameters(self, recurse=True):
        return (weight for weight in super().parameters(recurse) if weight.requires_grad)

    def forward(self):
        """No prefix: (L, 2, 1, H, 0, D), or three such."""
        return self.model.empty_prefix()

    def fold(self):
        return self()

    def num_stored_parameters(self):
        """How many numbers a task takes up on disk: each one that learned."""
        return sum(weight.numel() for weight in self.parameters())
