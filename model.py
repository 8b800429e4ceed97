"""GPT-2, written out by hand, with attention that takes a prefix of extra keys and values.

`attend` is the definition of attention with a prefix (Li & Liang 2021, section 4.2, equation 3: the
activations h_i of a prefix position are read from P_theta, all others are computed by the language
model), and the only softmax over keys in the core. The model follows Radford et al. 2019; its
layers have the names of the Hugging Face checkpoint. Not here: the prefix (prefix.py), training
(train.py), decoding (sample.py), files (pretrained/), dropout (a frozen model runs without).

Letters, true in every file:
B batch    T queries   S keys of the text   P prefix length   V vocabulary
L layers   H heads     D head size          C width             N labels, or tokens of a tree
"""
import dataclasses
import math
import typing

import torch
from torch import nn
from torch.nn import functional as F

# ---- attention with a prefix

def upcast(x):
    """x in fp32 or wider: bf16 and fp16 are too coarse for scores, logits and sums of squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_mask(key_mask, T, causal, tree=None):
    """Who sees whom: each token sees the prefix, itself and what is before it; none sees padding.

              prefix   text
              p0 p1    s0 s1 s2     P = 2, S = 3; the third token of the text is padding:
        t=0    1  1     1  0  0     key_mask = 1 1 1 1 0. The T queries are the last T of the S
        t=1    1  1     1  1  0     tokens, so the triangle stands in the lower right corner:
        t=2    1  1     1  1  0     the last row hides only padding.

    key_mask: (1 or B, P+S) bool, False at padding; with a row each, prefixes may differ in length.
    causal: False where each query sees every key, as in an encoder.
    tree: (B, T, N) bool or None. Where texts branch, as in beam search, it takes the place of the
    triangle: which of the last N keys each query sees, its own past and not its neighbours'.
    Returns (1 or B, 1, T, P+S) bool, True = may be seen.
    """
    keys = key_mask.size(1)
    if tree is not None:
        before = key_mask[:, None, :keys - tree.size(2)].expand(len(tree), T, -1)   # (B, T, P+S-N)
        return torch.cat((before, tree), 2)[:, None]                            # (B, 1, T, P+S)
    triangle = torch.ones(T, keys, dtype=torch.bool, device=key_mask.device)    # (T, P+S)
    if causal:
        # The trap of a prefix: `is_causal=True` of PyTorch's fused attention puts the triangle in
        # the upper left corner: each token would miss its P newest keys, its own included.
        triangle = triangle.tril(keys - T)
    return key_mask[:, None, None, :] & triangle                            # (1 or B, 1, T, P+S)


def attend(q, k, v, pk, pv, mask):
    """Attention with a prefix: softmax(q [pk; k]^T / sqrt(D)) [pv; v].

    q: (B, H, T, D); k, v: (B, H, S, D), the keys and values of the text.
    pk, pv: (1 or B, H, P, D), the prefix; one for the whole batch or one per row; P may be 0.
    mask: (1 or B, 1, T, P+S) of `attention_mask`. A query that sees no key (padding) gets 0, not
    NaN.
    Returns (B, H, T, D).
    """
    if pk.size(2):                          # else there is nothing to put in front of the text
        k = torch.cat((pk.expand(len(k), -1, -1, -1), k), 2)    # (B, H, P+S, D)
        v = torch.cat((pv.expand(len(v), -1, -1, -1), v), 2)    # (B, H, P+S, D)
    scores = (upcast(q) / math.sqrt(q.size(-1))) @ upcast(k).transpose(2, 3)    # (B, H, T, P+S)
    # So low that the softmax makes it 0, but finite: a row of -inf alone would become NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    y = scores.softmax(-1).to(v.dtype) @ v                      # (B, H, T, D)
    return y.masked_fill(~mask.any(3, keepdim=True), 0)         # (B, H, T, D)


class ExplicitAttention:
    """Attention as written above: what a model uses unless it is given another form.

    A form (an implementation) makes its own mask, once for all layers of a forward pass. fast/ has
    other forms, proved to be the same function: `model.attention = another_form`.
    """
    supports_tree = True        # `mask` knows texts that branch
    joins_prefix = True         # prefix and text become one tensor, so a KV cache may hold both

    mask = staticmethod(attention_mask)

    def __call__(self, q, k, v, pk, pv, mask):
        return attend(q, k, v, pk, pv, mask)


# ---- what all models here share

def position_ids(key_mask, T, tree=None):
    """The positions of the last T tokens: for each the number of keys that it sees in front of it.

    Padding counts for nothing. key_mask, tree: as in `attention_mask`. Returns (1 or B, T).
    """
    if tree is None:
        seen = key_mask.cumsum(1)[:, -T:]                                       # (1 or B, T)
    else:
        seen = key_mask[:, :key_mask.size(1) - tree.size(2)].sum(1, keepdim=True) + tree.sum(2)
    return (seen - 1).clamp(min=0)          # padding may see nothing and gets position 0


def linear_in_fp32(x, weight, bias=None):
    """x W^T + b in fp32 or wider: (..., C) -> (..., V). Logits lie tens to a hundred below 0, where
    bf16 has steps of 0.25 to 0.5: the loss would be off by a tenth, and likeliest tokens would tie.
    """
    if weight.dtype.itemsize > 2:
        return F.linear(x, weight, bias)
    parts = weight.split(1024 if x.device.type == "cpu" else len(weight))   # they fit into a cache
    y = torch.cat([F.linear(upcast(x), upcast(part)) for part in parts], -1)      # (..., V)
    return y if bias is None else y + bias


def pad(sequences, left=False):
    """Lists of tokens as ids (B, T), and their mask (B, T) bool, False at padding."""
    T = max(map(len, sequences))
    ids = torch.tensor([(T - len(s)) * [0] + s if left else s + (T - len(s)) * [0]
                        for s in sequences])                                    # (B, T)
    lengths = torch.tensor([[len(s)] for s in sequences])                       # (B, 1)
    return ids, (torch.arange(T) >= T - lengths if left else torch.arange(T) < lengths)


class KVCache:
    """Keys and values of the tokens read so far, so that decoding computes each token once.

    One tensor for all layers, allocated once. A prefix (L, 2, 1 or B, H, P, D) lies in front, as if
    its positions were tokens that have been read; its length may be 0.
    """

    def __init__(self, prefix, batch, max_tokens):
        L, _, _, H, self.n_prefix, D = prefix.shape
        self.kv = prefix.new_zeros(L, 2, batch, H, self.n_prefix + max_tokens, D)
        self.kv[:, :, :, :, :self.n_prefix] = prefix            # (L, 2, B, H, P, D)
        self.length = self.n_prefix             # columns in use; the model advances it

    def extend(self, layer, k, v):
        """Append the newest k, v (B, H, T, D); return all of this layer, (B, H, P+S, D) each."""
        end = self.length + k.size(2)
        if end > self.kv.size(4):
            raise ValueError(f"got token {end - self.n_prefix}, but this cache holds "
                             f"{self.kv.size(4) - self.n_prefix}; make it with more max_tokens")
        keys, values = self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]
        keys[:, :, self.length:] = k                                        # (B, H, T, D) each
        values[:, :, self.length:] = v
        return keys, values


class DecodingStart(typing.NamedTuple):
    """What a model needs to read a batch of prompts and to continue them token by token."""
    prompts: list               # for each text the tokens that the decoder reads first
    ids: torch.Tensor           # (B, T), the same, padded
    key_mask: torch.Tensor      # (B, P+T) bool, False at padding
    cache: KVCache
    inputs: dict                # what else `hidden_states` gets, at every step
    max_new_tokens: int         # what was asked for, or fewer where the positions end


class LanguageModel(nn.Module):
    """What GPT-2 and every other model here have besides their layers. Each of them also has
    `word_embedding`, `width`, `max_positions`, `empty_prefix`, `hidden_states`, `head` and `blocks`
    of its own; callers only ask `is_encoder_decoder`.
    """
    is_encoder_decoder = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attention = ExplicitAttention()
        self.head_product = linear_in_fp32      # another form of it where fast/ has one
        self.fingerprint = ""               # names these very weights; set where they are loaded
        self.generation_config = {}         # how the model's makers decode, under their names

    device = property(lambda self: self.word_embedding.weight.device)
    dtype = property(lambda self: self.word_embedding.weight.dtype)
    head_weight = property(lambda self: self.word_embedding.weight)     # a Llama may have another

    def prefix_and_mask(self, prefix, n_layers, key_mask, T, causal, tree=None):
        """For each layer its keys and values, (2, 1 or B, H, P, D), and the attention's mask.

        A prefix with fewer layers than the model belongs to the upper ones. The layers below see
        only the text, at unchanged positions. Nothing trainable enters them, so they build no
        graph, and the backward pass ends above them.
        """
        mask, below = self.attention.mask(key_mask, T, causal, tree), n_layers - len(prefix)
        layers = [(part, mask) for part in prefix]
        if below > 0:
            mask = self.attention.mask(key_mask[:, prefix.size(4):], T, causal, tree)
            layers = below * [(prefix[0, :, :, :, :0].detach(), mask)] + layers
        return layers

    def positions_and_layers(self, ids, prefix, key_mask, cache, tree):
        """(positions (1 or B, T), `prefix_and_mask`) of a forward pass; arguments as of
        GPT2.hidden_states. Raises ValueError where a text with its prefix is too long.
        """
        keys = prefix.size(4) + (0 if cache is None else cache.length) + ids.size(1)    # P+S
        if key_mask is None:
            key_mask = torch.ones(1, keys, dtype=torch.bool, device=ids.device)     # (1, P+S)
        # The text starts at position P, as in the official code: a prefix takes the place of P
        # tokens. Left padding shifts nothing, and prefixes of several lengths need no special case.
        positions = position_ids(key_mask, ids.size(1), tree)                   # (1 or B, T)
        # Keys count padding, positions do not. A tree skips this, as `.max()` waits for a GPU.
        if tree is None and keys > self.max_positions <= positions.max():
            n_prefix = prefix.size(4) + (0 if cache is None else cache.n_prefix)
            raise ValueError(f"got a prefix of {n_prefix} and {keys - n_prefix} tokens; expected "
                             f"at most {self.max_positions} together, the positions of this model; "
                             "shorten one of them")
        n_layers, T = len(self.blocks()), ids.size(1)
        return positions, self.prefix_and_mask(prefix, n_layers, key_mask, T, True, tree)

    @torch.no_grad()
    def prefix_from_tokens(self, ids):
        """The keys and values that the model computes for P tokens, a list: (L, 2, 1, H, P, D).

        As a prefix they are exactly those tokens put in front of the text (a hard prompt):
        attention sees nothing of a token but its key and value, and the text starts at P anyway.
        """
        cache = KVCache(self.empty_prefix(), batch=1, max_tokens=len(ids))
        self.hidden_states(torch.tensor([ids], device=self.device), cache=cache)
        return cache.kv

    def start_decoding(self, prompts, prefix, prefix_mask, max_new_tokens, num_beams=1):
        """What is needed to continue `prompts`, lists of tokens of any lengths: a `DecodingStart`.

        prefix: (L, 2, 1 or B, H, P, D). prefix_mask: (B, P) bool, on the CPU, False where a row's
        is shorter. max_new_tokens, num_beams: how much the cache has to hold. Raises ValueError
        where a prompt leaves no position free.
        """
        # Padding goes in front, so that the newest token of every row stands in the last column.
        ids, mask = pad(prompts, left=True)                                     # (B, T) each
        key_mask = torch.cat((prefix_mask, mask), 1)                            # (B, P+T)
        used, row = key_mask.sum(1).max(0)
        if used >= self.max_positions:
            raise ValueError(f"got a prefix of {prefix_mask[row].sum()} and a prompt of "
                             f"{len(prompts[row])} tokens; expected less than {self.max_positions} "
                             "together; shorten one of them")
        max_new_tokens = min(max_new_tokens, self.max_positions - used.item())
        # A prefix of all layers goes into the cache once; any other is read at every step.
        apart, cached = prefix, self.empty_prefix()
        if self.attention.joins_prefix and len(prefix) == len(cached):
            apart, cached = cached, apart
        cache = KVCache(cached, len(prompts), ids.size(1) + num_beams * max_new_tokens)
        ids, key_mask = (x.to(self.device, non_blocking=True) for x in (ids, key_mask))
        return DecodingStart(prompts, ids, key_mask, cache, {"prefix": apart}, max_new_tokens)


# ---- GPT-2

@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; field names as in Hugging Face's config.json."""
    vocab_size: int = 50257         # V
    n_positions: int = 1024         # the longest P + S
    n_embd: int = 768               # C
    n_layer: int = 12               # L
    n_head: int = 12                # H
    layer_norm_epsilon: float = 1e-5


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, prefix, attend, mask, cache, layer):
        heads = self.c_attn(x).unflatten(2, (3, self.n_head, -1))               # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                                  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.extend(layer, k, v)            # (B, H, S, D) each, a cached prefix in S
        pk, pv = prefix                                                 # (1 or B, H, P, D) each
        y = attend(q, k, v, pk, pv, mask)                                       # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))                        # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # GPT-2 was trained with the tanh form; the exact GELU would change every logit a little.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))            # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, prefix, attend, mask, cache, layer):
        x = x + self.attn(self.ln_1(x), prefix, attend, mask, cache, layer)     # (B, T, C)
        return x + self.mlp(self.ln_2(x))                                       # (B, T, C)


class GPT2(LanguageModel):
    """The language model LM_phi of the paper."""
    architecture = "gpt2"

    def __init__(self, config):
        super().__init__(config)
        if config.n_embd % config.n_head:
            raise ValueError(f"got width {config.n_embd} and {config.n_head} heads; expected a "
                             "multiple of the heads; correct the model's config.json")
        self.width, self.max_positions = config.n_embd, config.n_positions
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    word_embedding = property(lambda self: self.wte)

    def blocks(self):
        """The layers, each a function of the hidden states, from the lowest to the highest."""
        return list(self.h)

    def empty_prefix(self):
        """The prefix of length 0: with it, this is the plain language model. (L, 2, 1, H, 0, D)"""
        c = self.config
        return self.wte.weight.new_empty(c.n_layer, 2, 1, c.n_head, 0, c.n_embd // c.n_head)

    def hidden_states(self, ids, prefix=None, key_mask=None, cache=None, tree=None):
        """The hidden states of the tokens `ids`, after the final LayerNorm.

        ids: (B, T). prefix: (L, 2, 1 or B, H, P, D), keys then values of every layer, or of fewer,
        the upper ones. key_mask: (B, P+S) bool, False at padding, S being the cached tokens and the
        T new ones; None: no padding. cache: a `KVCache` with the tokens before these; extended in
        place. tree: see `attention_mask`. Returns (B, T, C); `head` makes logits of them. Raises
        ValueError where P + S exceeds the positions.
        """
        prefix = self.empty_prefix() if prefix is None else prefix
        positions, layers = self.positions_and_layers(ids, prefix, key_mask, cache, tree)
        x = self.wte(ids) + self.wpe(positions)                                 # (B, T, C)
        for layer, (block, (part, mask)) in enumerate(zip(self.h, layers, strict=True)):
            x = block(x, part, self.attention, mask, cache, layer)              # (B, T, C)
        if cache is not None:
            cache.length += ids.size(1)
        return self.ln_f(x)                                                     # (B, T, C)

    def head(self, hidden):
        """Logits of hidden states (..., C) -> (..., V), by the tied word embedding. Computed only
        where needed: it takes 38.6M multiplications a token for 50,257 words; all layers of the
        smallest GPT-2 take 85M.
        """
        return self.head_product(hidden, self.head_weight)
