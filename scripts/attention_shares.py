"""Lambda: the share of the attention that goes to the prefix, by layer, head and token.

A head's output is (1 - lambda) times what the text alone gives plus lambda times what the prefix
alone gives (He et al. 2021, arXiv 2110.04366, section 3.1); lambda is the sum of its weights over
the prefix's keys. Measured in `model.attention`, so for every model here. Letters as in model.py.
"""
import torch

from data.pairs import pairs_of
from model import ExplicitAttention


class RecordedAttention(ExplicitAttention):
    """The explicit attention, which also keeps lambda of each call, (B, H, T), in `shares`."""

    def __init__(self):
        self.shares = []

    def __call__(self, q, k, v, pk, pv, mask):
        # Values of 1 in the prefix and 0 elsewhere give the weights' sum over the prefix.
        ones, zeros = torch.ones_like(pv[..., :1]), torch.zeros_like(v[..., :1])
        self.shares.append(super().__call__(q, k, zeros, pk, ones, mask)[..., 0])   # (B, H, T)
        return super().__call__(q, k, v, pk, pv, mask)


@torch.no_grad()
def attention_shares(model, prefix, pair):
    """Lambda while `model` reads a Pair: {place of the prefix: (tokens read there, (L, H, T))}.

    prefix: (L, 2, 1, H, P, D), in the place "prefix", or `ThreePrefixes` in their three places.
    """
    inputs = pairs_of(model).collate([pair], model).to(model.device).inputs
    usual, model.attention = model.attention, RecordedAttention()
    try:
        model.hidden_states(**inputs, prefix=prefix)
        shares = [share[0].float().cpu() for share in model.attention.shares]   # (H, T) each
    finally:
        model.attention = usual
    places = {"prefix": shares}
    if isinstance(prefix, tuple):       # the decoder's layers attend to the target, then the source
        L = len(model.encoder.layers)       # a prefix may have fewer
        places = {"encoder": shares[:L], "decoder": shares[L::2], "cross": shares[L + 1::2]}
    return {place: (inputs["source" if place == "encoder" else "ids"][0].tolist(),
                    torch.stack(own)) for place, own in places.items()}         # (L, H, T)
