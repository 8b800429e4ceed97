"""Two ways to take the same step of training: compiled, or with less memory.

Neither changes what a step computes, but for rounding. opening.py opens this side door for
--compile and --gradient-checkpointing, and for --share-source, to see that it goes with them. Not
here: the loss (loss.py), how what texts begin with is shared (batches.py). Letters as in model.py.
"""
import functools
import sys

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batches import Batch
from loss import target_nats
from model import attend as written_out


# ---- less memory

def blocks(model):
    """The layers of a model, each a function of the hidden states and the prefix."""
    if model.architecture == "bart":
        return [*model.encoder.layers, *model.decoder.layers]
    return list(model.h)


def checkpoint_blocks(model):
    """Let every block of `model` keep only what goes into it, in place (Chen et al. 2016).

    What it computes inside, which the gradient needs, it computes a second time on the way back.
    The prefix goes into a block as any other tensor, so its gradient comes out of it.
    """
    for block in blocks(model):
        # There is no dropout, so no random numbers that would have to be the same again.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                          preserve_rng_state=False)


# ---- compiled

def fixed(batch, rows, longest):
    """`batch` in one of few shapes, for each of which the step is compiled: B is `rows`, T a
    multiple of 16 or `longest`, N a multiple of 8 for each row; of BART S a multiple of 128.

    An epoch of E2E in batches of 10 has 16 shapes, and 14 % more tokens, 15 % more places.
    """
    (B, T), N = batch.ids.shape, len(batch.place)
    assert B <= rows, "more pairs than a full batch"
    wider, more = min(T + -T % 16, longest) - T, -N % (8 * rows)
    ids = F.pad(batch.ids, (0, wider, 0, rows - B))                             # (rows, T + wider)
    place = batch.place + batch.place // T * wider          # the rows before are longer now
    source = batch.source
    if source is not None:
        S = source[0].size(1)
        source = tuple(F.pad(x, (0, min(S + -S % 128, longest) - S, 0, rows - B)) for x in source)
    return Batch(ids, F.pad(place, (0, more)), F.pad(batch.label, (0, more)),
                 F.pad(batch.times, (0, more)), source=source)


class Compiled:
    """`target_nats` and its gradient, compiled for each shape of a batch; on a GPU recorded as CUDA
    graphs, which are replayed without Python.

    rows: the pairs of a full batch. shapes: those that have been met, (B, T, N) or with BART's S.
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
        self.nats = torch.compile(target_nats, fullgraph=True, dynamic=False,
                                  mode="reduce-overhead" if device.type == "cuda" else "default")

    def __call__(self, model, prefix, batch, attend=written_out):
        longest = model.config.n_positions
        if model.architecture != "bart":        # there prefix and text share the positions
            longest -= prefix.size(4)
        batch = fixed(batch, self.rows, longest)
        shape = (*batch.ids.shape, len(batch.place)) + (
            () if batch.source is None else (batch.source[0].size(1),))
        if shape not in self.shapes:
            self.shapes.add(shape)
            print(f"compiling for batches of the shape {shape}", file=sys.stderr)
        torch.compiler.cudagraph_mark_step_begin()          # what the last step left may be reused
        return self.nats(model, prefix, batch, attend).clone()      # that is so for the loss, too


CLASHES = (("--compile", "--share-source", "tries come in too many shapes"),
           ("--compile", "--gradient-checkpointing", "a compiler decides what to keep itself"),
           ("--attention fused", "--share-source", "the kernel knows no tries"),
           ("--attention fused", "--compile", "the kernel cannot be compiled again"))


def prepared(settings, model):
    """`target_nats` or another form of it, as the settings want it; `model` is changed in place.

    Raises ValueError for settings that do not go together.
    """
    given = {"--compile": settings.compile, "--share-source": settings.share_source,
             "--gradient-checkpointing": settings.gradient_checkpointing,
             "--attention fused": settings.attention == "fused"}
    for one, other, why in CLASHES:
        if given[one] and given[other]:
            raise ValueError(f"got {one} with {other}; expected one of them: {why}; leave one out")
    if settings.gradient_checkpointing:
        checkpoint_blocks(model)
    if settings.compile:
        return Compiled(settings.batch_size, model.wte.weight.device)
    return target_nats
