"""Llama: what most language models are today, around the same `attend` as GPT-2.

Touvron et al. 2023, with the names of the Hugging Face checkpoint. One change at a time from GPT-2:
RMSNorm in place of LayerNorm, rotary positions in place of learned ones, SwiGLU in place of the
GELU MLP, no biases, and fewer heads for keys and values than for queries. The prefix, its MLP, the
loss, decoding and files are those of GPT-2. What is not here (scaled rotary positions, biases,
norms of queries and keys, sliding windows) is refused by name where a checkpoint is read
(pretrained/architectures.py). Letters as in the top-level model.py; G key-value heads, each of
which serves H / G query heads.
"""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from model import LanguageModel, upcast


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, SmolLM2-135M where nothing is said; names as in config.json."""
    vocab_size: int = 49152             # V
    max_position_embeddings: int = 8192     # the longest P + S
    hidden_size: int = 576              # C
    intermediate_size: int = 1536
    num_hidden_layers: int = 30         # L
    num_attention_heads: int = 9        # H
    num_key_value_heads: int = 3        # G
    head_dim: int = 64                  # D; H * D need not be C
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    tie_word_embeddings: bool = True    # the head is the word embedding


class RMSNorm(nn.Module):
    """x / rms(x) * weight: LayerNorm without a mean and a bias (Zhang and Sennrich 2019)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = upcast(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)                                   # (B, T, C)


def rotation(positions, config, dtype):
    """cos and sin of the angles of each position: (1 or B, 1, T, D/2) each.

    The pair of numbers (x_i, x_{i + D/2}) of a head turns by position * theta^(-2i/D), so the
    product of a query and a key depends on their distance (RoFormer, Su et al. 2021).
    """
    i = torch.arange(config.head_dim // 2, device=positions.device).float()    # (D/2,)
    frequencies = config.rope_theta ** (-2 * i / config.head_dim)               # (D/2,)
    angles = positions[:, None, :, None] * frequencies                  # (1 or B, 1, T, D/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate x (B, H or G, T, D) in pairs D/2 apart, as HF has them (RoFormer: neighbours)."""
    a, b = x.chunk(2, -1)                                                       # (B, H, T, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)                # (B, H, T, D)


def repeat_heads(x, n_rep):
    """(B, G, S, D) -> (B, G * n_rep, S, D): each key-value head serves n_rep query heads."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, 1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.n_rep = config.num_attention_heads // config.num_key_value_heads
        C, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(C, queries, bias=False)
        self.k_proj = nn.Linear(C, keys, bias=False)
        self.v_proj = nn.Linear(C, keys, bias=False)
        self.o_proj = nn.Linear(queries, C, bias=False)

    def split_heads(self, x):
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)              # (B, heads, T, D)

    def forward(self, x, prefix, attend, mask, cache, layer, cos, sin):
        q = rotate(self.split_heads(self.q_proj(x)), cos, sin)                  # (B, H, T, D)
        k = rotate(self.split_heads(self.k_proj(x)), cos, sin)                  # (B, G, T, D)
        v = self.split_heads(self.v_proj(x))                                    # (B, G, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                    # (B, G, S, D) each
        # A prefix key stands in the place of a key after its rotation: it is used as it is stored.
        # Cache and prefix keep the G heads; only `attend` sees them repeated.
        k, v, pk, pv = (repeat_heads(y, self.n_rep) for y in (k, v, *prefix))   # (B, H, ., D) each
        y = attend(q, k, v, pk, pv, mask)                                       # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                        # (B, T, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): one projection of x gates another, elementwise."""

    def __init__(self, config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))      # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, prefix, attend, mask, cache, layer, cos, sin):
        y = self.self_attn(self.input_layernorm(x), prefix, attend, mask, cache, layer, cos, sin)
        x = x + y                                                               # (B, T, C)
        return x + self.mlp(self.post_attention_layernorm(x))                   # (B, T, C)


class Llama(LanguageModel):
    """A Llama; its methods mirror GPT2's."""
    architecture = "llama"

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.num_attention_heads % c.num_key_value_heads or c.head_dim % 2:
            raise ValueError(f"got {c.num_attention_heads} heads of size {c.head_dim} over "
                             f"{c.num_key_value_heads} key-value heads; expected a multiple of "
                             "these, and an even size; correct the model's config.json")
        self.width, self.max_positions = c.hidden_size, c.max_position_embeddings
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    @property
    def word_embedding(self):
        return self.embed_tokens

    @property
    def head_weight(self):
        return (self.lm_head or self.embed_tokens).weight                       # (V, C)

    def blocks(self):
        return list(self.layers)

    def empty_prefix(self):
        """The prefix of length 0: (L, 2, 1, G, 0, D), of the few key-value heads."""
        c = self.config
        return self.embed_tokens.weight.new_empty(c.num_hidden_layers, 2, 1, c.num_key_value_heads,
                                                  0, c.head_dim)

    def hidden_states(self, ids, prefix=None, key_mask=None, cache=None, tree=None):
        """The hidden states of the tokens `ids`, after the final norm: see GPT2.hidden_states."""
        prefix = self.empty_prefix() if prefix is None else prefix
        positions, layers = self.positions_and_layers(ids, prefix, key_mask, cache, tree)
        cos, sin = rotation(positions, self.config, self.dtype)         # (1 or B, 1, T, D/2) each
        x = self.embed_tokens(ids)                                              # (B, T, C)
        for layer, (block, (part, mask)) in enumerate(zip(self.layers, layers, strict=True)):
            x = block(x, part, self.attention, mask, cache, layer, cos, sin)    # (B, T, C)
        if cache is not None:
            cache.length += ids.size(1)
        return self.norm(x)                                                     # (B, T, C)

    def head(self, hidden):
        """Logits of hidden states (..., C) -> (..., V), by the word embedding where it is tied."""
        return self.head_product(hidden, self.head_weight)
