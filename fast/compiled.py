"""prefix.target_loss compiled by PyTorch, for few shapes of batches: --compile. Letters as in
model.py; N labels of a batch.
"""
import sys

import torch
from torch.nn import functional as F

from data.batches import Batch
from prefix import target_loss


def fixed(batch, rows, max_tokens):
    """`batch` padded to one of few shapes, for each of which the step is compiled: B is `rows`, T a
    multiple of 16 or `max_tokens`, N a multiple of 8 * rows, and S of a source a multiple of 128 or
    `max_tokens`. Its counts are 0, because each new number would mean compiling again.

    An epoch of E2E in batches of 10 has 16 shapes, and 14 % more tokens, 15 % more labels.
    """
    (B, T), N = batch.inputs["ids"].shape, len(batch.labels)
    assert B <= rows, "more pairs than a full batch"
    inputs = {}
    for name, x in batch.inputs.items():        # ids (B, T); source and source_mask (B, S)
        width = x.size(1)
        width += -width % (16 if name == "ids" else 128)
        wider = max(0, min(width, max_tokens) - x.size(1))
        inputs[name] = F.pad(x, (0, wider, 0, rows - B))                # (rows, T or S, wider)
    wider, more = inputs["ids"].size(1) - T, -N % (8 * rows)
    positions = batch.label_positions + batch.label_positions // T * wider      # longer rows before
    labels = (F.pad(x, (0, more)) for x in (positions, batch.labels, batch.label_weights))
    return Batch(inputs, *labels, 0, 0)


class CompiledLoss:
    """`target_loss` and its gradient, compiled for each shape of a batch; on a GPU recorded as CUDA
    graphs, which are replayed without Python. Where no gradient is wanted, as for a dev loss, the
    plain `target_loss` runs: compiling would not pay there.

    rows: the pairs of a full batch. shapes: those that have been met, of all inputs and of N.
    """

    def __init__(self, rows, device):
        self.rows, self.shapes = rows, set()
        try:
            torch.compile(torch.square)(torch.ones(8, device=device))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"got --compile, but nothing can be compiled here ({reason}); "
                             "expected a C++ compiler, on a GPU triton too; install one or leave "
                             "it out") from error
        torch._dynamo.config.recompile_limit = 256          # a shape is a compilation; 8 by default
        # fullgraph: what cannot be compiled is an error, never slow unasked.
        self.loss = torch.compile(target_loss, fullgraph=True, dynamic=False,
                                  mode="reduce-overhead" if device.type == "cuda" else "default")

    def __call__(self, model, prefix, batch):
        if not torch.is_grad_enabled():
            return target_loss(model, prefix, batch)
        alone = "source" in batch.inputs    # else prefix and text share the positions
        batch = fixed(batch, self.rows, model.max_positions - (0 if alone else prefix.size(4)))
        shape = *(tuple(x.shape) for x in batch.inputs.values()), len(batch.labels)
        if shape not in self.shapes:
            self.shapes.add(shape)
            print(f"compiling for batches of the shape {shape}", file=sys.stderr)
        torch.compiler.cudagraph_mark_step_begin()          # the last step's memory may be reused
        return self.loss(model, prefix, batch).clone()      # the loss lies in it, too: copied
