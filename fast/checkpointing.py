"""Less memory for more work: --gradient-checkpointing (Chen et al. 2016). Letters as in model.py.

A step keeps what goes into each block, not what is computed inside.
"""
import functools

from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model):
    """Let every block of `model` keep only its input, in place.

    The gradient needs what is computed inside, so the backward pass computes it again. The prefix
    is an input of the block like any other tensor, so it gets its gradient, too.
    """
    for block in model.blocks():
        # There is no dropout, so no random state has to be restored for the second pass.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                          preserve_rng_state=False)
