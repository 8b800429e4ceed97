"""model.attend by PyTorch's scaled_dot_product_attention: --attention sdpa.

PyTorch chooses the kernel, on a GPU one that writes no (T, P+S) scores to memory. Prefix and text
are concatenated first, so the prefix is copied into every row. Not here: the meaning
(model.attend). Letters as in model.py.
"""
import torch
from torch.nn import functional as F

from model import attention_mask


class SDPAAttention:
    """The same function as model.ExplicitAttention."""
    supports_tree = True
    joins_prefix = True

    @staticmethod
    def mask(key_mask, T, causal, tree=None):
        """(1 or B, 1, T, P+S) bool, True = may be seen; and (1 or B, 1, T, 1), True = sees nothing.

        Always a tensor, although PyTorch has a faster kernel for no padding: only `key_mask` says
        whether there is any, and to read it Python would have to wait for the GPU.
        """
        mask = attention_mask(key_mask, T, causal, tree)                    # (1 or B, 1, T, P+S)
        blind = ~mask.any(-1, keepdim=True)                                 # (1 or B, 1, T, 1)
        # A query that sees nothing would get NaN of some kernels: it sees all, and then gets 0.
        return mask | blind, blind

    def __call__(self, q, k, v, pk, pv, mask):
        if pk.size(2):
            k = torch.cat((pk.expand(len(k), -1, -1, -1), k), 2)                # (B, H, P+S, D)
            v = torch.cat((pv.expand(len(v), -1, -1, -1), v), 2)                # (B, H, P+S, D)
        seen, blind = mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)           # (B, H, T, D)
        return out.masked_fill(blind, 0)                                        # (B, H, T, D)
