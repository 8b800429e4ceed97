"""Less memory for more work: --gradient-checkpointing (Chen et al. 2016). Letters as in model.py.

A step keeps what goes into each block, not what is computed inside.
"""
import functools

from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model):
    """Let every block of `model` keep only its input, in place.

    What it computes inside, which the gradient needs, it computes again in the backward pass. The
    prefix goes into a block as any other tensor, so its gradient comes out of it.
    """
    for block in model.blocks():
        # There is no dropout, so no random numbers that would have to be the same again.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                          preserve_rng_state=False)
