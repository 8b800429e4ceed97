"""GPT-2 and BART, written out by hand, with attention that takes a prefix of extra keys and values.

`attend` is the definition of attention with a prefix (Li & Liang 2021, section 4.2, equation 3: the
activations h_i of a prefix position are read from P_theta, all others are computed by the language
model) and the only softmax over keys in the core. The models follow Radford et al. 2019 and Lewis
et al. 2019 and the layout of the Hugging Face checkpoints, whose names they keep. prefix.py,
train.py and sample.py call them. Not here: the prefix itself (tensors only), training, decoding,
dropout (a frozen model runs without), files (checkpoint.py, convert.py).

Letters, true in every file:
B batch    T queries   S keys of the text   P prefix length   V vocabulary
L layers   H heads     D head size          C width = H * D
"""
import dataclasses
import math
import types
import typing

import torch
from torch import nn
from torch.nn import functional as F


def may_look(real, T, causal):
    """Who sees whom: all see the prefix, a token itself and what is before it, nobody padding.

              prefix   text
              p0 p1    s0 s1 s2     P = 2, S = 3; the third token of the text is padding:
        t=0    1  1     1  0  0     real = 1 1 1 1 0. The T queries are the last T of the S
        t=1    1  1     1  1  0     tokens, so the triangle stands in the lower right corner:
        t=2    1  1     1  1  0     the last query sees the last key.

    real: (B, P+S) bool, which keys exist; row by row, so prefixes may differ in length too. Or
    (B, T, P+S), for each query its own keys: texts that branch (a tree), as in beam search, where
    one row holds all beams and a token may look at its ancestors only.
    Returns (B, 1, T, P+S) bool, True = may look.
    """
    if real.dim() == 3:
        return real[:, None]                                                    # (B, 1, T, P+S)
    order = torch.ones(T, real.size(1), dtype=torch.bool, device=real.device)   # (T, P+S)
    if causal:
        # The trap of a prefix: `is_causal=True` of PyTorch's fused attention puts the triangle in
        # the upper left corner, where the first P tokens of the text would see too little.
        order = order.tril(real.size(1) - T)
    return real[:, None, None, :] & order                                       # (B, 1, T, P+S)


def attend(q, k, v, pk, pv, real, causal):
    """Attention with a prefix: softmax(q [pk; k]^T / sqrt(D)) [pv; v].

    q: (B, H, T, D); k, v: (B, H, S, D), the keys and values of the text.
    pk, pv: (1 or B, H, P, D), the prefix; one for the whole batch or one per row; P may be 0.
    real, causal: see `may_look`. A query that may look nowhere (padding) gets 0, not NaN.
    Returns (B, H, T, D).
    """
    B, H, T, D = q.shape
    if pk.size(2):                          # else nothing to put in front, and no copy of k and v
        k = torch.cat((pk.expand(B, -1, -1, -1), k), 2)         # (B, H, P+S, D)
        v = torch.cat((pv.expand(B, -1, -1, -1), v), 2)         # (B, H, P+S, D)
    hidden = ~may_look(real, T, causal)                         # (B, 1, T, P+S)
    scores = (q / math.sqrt(D)) @ k.transpose(2, 3)             # (B, H, T, P+S)
    # So low that the softmax makes it 0, but finite, or a query without any key would become NaN.
    low = hidden.to(q.dtype) * (torch.finfo(q.dtype).min / 2)   # (B, 1, T, P+S)
    y = (scores + low).softmax(-1) @ v                          # (B, H, T, D)
    # Such a query gets 0, as PyTorch's scaled_dot_product_attention has it.
    return y.masked_fill(hidden.all(3, keepdim=True), 0)        # (B, H, T, D)


class Cache:
    """Keys and values of the tokens read so far, so that decoding computes each token once.

    One tensor for all layers, allocated once with room for `room` tokens. A prefix (L, 2, 1 or B,
    H, P, D) given here lies in front, as if its positions were tokens that have been read: then
    `forward` is given none, and no step has to put the two together.
    """

    def __init__(self, model, batch, room, prefix=None):
        c, like = model.config.at("decoder"), model.wte.weight
        self.kv = like.new_zeros(c.n_layer, 2, batch, c.n_head, room, c.n_embd // c.n_head)
        self.length = 0                                         # tokens read; the model advances it
        if prefix is not None:
            self.length = prefix.size(4)
            self.kv[:, :, :, :, :self.length] = prefix          # (L, 2, B, H, P, D)

    def extend(self, layer, k, v):
        """Put the newest k, v (B, H, T, D) behind the old ones; return all, (B, H, S, D) each."""
        end = self.length + k.size(2)
        if end > self.kv.size(4):
            raise ValueError(f"got token {end}, but this cache has room for {self.kv.size(4)}; "
                             "make it with more room")
        keys, values = self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]
        keys[:, :, self.length:] = k                                            # (B, H, S, D) each
        values[:, :, self.length:] = v
        return keys, values


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; field names as in Hugging Face's config.json."""
    vocab_size: int = 50257         # V
    n_positions: int = 1024         # the longest P + S
    n_embd: int = 768               # C
    n_layer: int = 12               # L
    n_head: int = 12                # H
    layer_norm_epsilon: float = 1e-5

    def at(self, place):
        """The sizes of the keys and values at `place`: GPT-2 has one place only, "decoder"."""
        return self

    @property
    def forced(self):
        """The first and the last token of what is said, where they are forced: nothing is here."""
        return {}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, prefix, real, layer, cache, attend):
        heads = self.c_attn(x).unflatten(2, (3, self.n_head, -1))               # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                                  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                    # (B, H, S, D) each
        pk, pv = prefix                                                 # (1 or B, H, P, D) each
        y = attend(q, k, v, pk, pv, real, causal=True)                          # (B, H, T, D)
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

    def forward(self, x, prefix, real, layer, cache, attend):
        x = x + self.attn(self.ln_1(x), prefix, real, layer, cache, attend)     # (B, T, C)
        return x + self.mlp(self.ln_2(x))                                       # (B, T, C)


class GPT2(nn.Module):
    """The language model LM_phi. `fingerprint` tells whose weights these are (set by `load`)."""

    architecture, places = "gpt2", ("decoder",)
    # How a Hugging Face checkpoint differs from this file, by the ends of its names (convert.py
    # reads it).
    checkpoint_root = "transformer."                # stands in front of every name, or does not
    checkpoint_transposed = ("attn.c_attn.weight", "attn.c_proj.weight",  # Conv1D: (in, out), where
                             "mlp.c_fc.weight", "mlp.c_proj.weight")       # nn.Linear has (out, in)
    checkpoint_ignored = ("attn.bias", "attn.masked_bias")            # the causal mask, as a buffer
    checkpoint_tied = {"lm_head.weight": "wte.weight"}
    checkpoint_zero = ()                            # what a checkpoint may lack: it is 0 then

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"got width {config.n_embd} and {config.n_head} heads; expected a "
                             "multiple of the heads; correct the model's config.json")
        self.config = config
        self.fingerprint = ""
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def no_prefix(self):
        """The prefix of length 0: with it, this is the plain language model. (L, 2, 1, H, 0, D)"""
        c = self.config
        return self.wte.weight.new_empty(c.n_layer, 2, 1, c.n_head, 0, c.n_embd // c.n_head)

    def forward(self, ids, prefix=None, real=None, cache=None, attend=attend):
        """Hidden states of the tokens `ids`, after the final LayerNorm.

        ids: (B, T) token numbers. prefix: (L, 2, 1 or B, H, P, D), keys then values of every layer.
        real: (B, P+S) bool, False at padding; S counts the cached tokens and the T new ones; or
        (B, T, P+S), see `may_look`. None: no padding. cache: a `Cache` holding the tokens before
        these; extended in place. attend: another implementation of `attend`, the same function.
        Returns (B, T, C); `head` makes logits of them. Raises ValueError where P + S exceeds the
        positions.
        """
        prefix = self.no_prefix() if prefix is None else prefix
        past = 0 if cache is None else cache.length
        keys = prefix.size(4) + past + ids.size(1)                              # P+S
        if real is None:
            real = torch.ones(1, keys, dtype=torch.bool, device=ids.device)     # (1, P+S)
        # A token's position is the number of real keys in front of it. So text starts at position
        # P, as in the official code (a prefix takes the place of P tokens), left padding shifts
        # nothing, and rows with prefixes of different lengths need no special case.
        counted = real.sum(2) if real.dim() == 3 else real.cumsum(1)[:, -ids.size(1):]
        positions = (counted - 1).clamp(min=0)                                  # (1 or B, T)
        # Only more keys than positions can be too many; where branches or padding share positions
        # they need not be.
        if keys > self.config.n_positions <= positions.max():
            raise ValueError(f"got a prefix of {prefix.size(4)} and {past + ids.size(1)} tokens; "
                             f"expected at most {self.config.n_positions} together, the positions "
                             "of this model; shorten one of them")
        x = self.wte(ids) + self.wpe(positions)                                 # (B, T, C)
        for layer, (block, part) in enumerate(zip(self.h, prefix, strict=True)):
            x = block(x, part, real, layer, cache, attend)                      # (B, T, C)
        if cache is not None:
            cache.length += ids.size(1)
        return self.ln_f(x)                                                     # (B, T, C)

    def head(self, hidden):
        """Logits of hidden states (..., C) -> (..., V). The head is the word embedding, transposed.

        Apart from `forward`, so that it is computed only where a logit is wanted: for 50,257 words
        it takes 38.6M multiplications a token, all layers of the smallest GPT-2 together 85M.
        """
        return F.linear(hidden, self.wte.weight)


# ---- BART: an encoder reads the source, a decoder looks at it while it writes the target

class Places(typing.NamedTuple):
    """A prefix of BART: one for each kind of attention, each (L, 2, 1 or B, H, P, D), keys then
    values of every layer. Their lengths P may differ and be 0: no prefix there.
    """
    encoder: torch.Tensor       # in front of the source, as the source looks at itself
    decoder: torch.Tensor       # in front of the target, as the target looks at itself
    cross: torch.Tensor         # in front of the source, as the target looks at it

    def to(self, like):
        """All three in another dtype, or as the tensor `like`."""
        return Places(*(prefix.to(like) for prefix in self))


class Memory(typing.NamedTuple):
    """What the decoder sees of a source: computed once, looked at by every layer and token."""
    kv: torch.Tensor            # (L, 2, B, H, S, D), each decoder layer's keys and values of it
    real: torch.Tensor          # (1 or B, S) bool, False at padding; or (B, P+S), see `encode`


@dataclasses.dataclass(frozen=True)
class BARTConfig:
    """The shape of a BART, the large one where nothing is said; names as in config.json."""
    vocab_size: int = 50265                 # V
    max_position_embeddings: int = 1024     # the longest source, and the longest target
    d_model: int = 1024                     # C
    encoder_layers: int = 12                # L
    decoder_layers: int = 12                # L
    encoder_attention_heads: int = 16       # H
    decoder_attention_heads: int = 16       # H
    encoder_ffn_dim: int = 4096
    decoder_ffn_dim: int = 4096
    decoder_start_token_id: int = 2         # </s> stands in front of every target
    # How its makers decode with it: num_beams, forced_bos_token_id, ...; under their names.
    decoding: dict = dataclasses.field(default_factory=dict)

    def at(self, place):
        """The sizes of the keys and values at `place`, under GPT-2's names."""
        L, H = ((self.encoder_layers, self.encoder_attention_heads) if place == "encoder" else
                (self.decoder_layers, self.decoder_attention_heads))
        return types.SimpleNamespace(n_layer=L, n_head=H, n_embd=self.d_model)

    @property
    def n_positions(self):
        return self.max_position_embeddings

    @property
    def forced(self):
        """The first and the last token of what is said, where the makers force them."""
        return {"first": self.decoding.get("forced_bos_token_id"),
                "last": self.decoding.get("forced_eos_token_id")}


class BARTAttention(nn.Module):
    """Encoder, decoder and cross-attention: the keys and values are handed in, from the text itself
    or from elsewhere.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)                 # (B, H, T, D)

    def keys_and_values(self, x):
        return self.split(self.k_proj(x)), self.split(self.v_proj(x))           # (B, H, S, D) each

    def forward(self, x, k, v, prefix, real, causal, attend):
        pk, pv = prefix                                                 # (1 or B, H, P, D) each
        y = attend(self.split(self.q_proj(x)), k, v, pk, pv, real, causal)      # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))                      # (B, T, C)


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.d_model, config.encoder_ffn_dim
        self.self_attn = BARTAttention(C, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.fc1, self.fc2 = nn.Linear(C, inner), nn.Linear(inner, C)
        self.final_layer_norm = nn.LayerNorm(C)

    def forward(self, x, prefix, real, attend):
        k, v = self.self_attn.keys_and_values(x)                                # (B, H, S, D) each
        y = self.self_attn(x, k, v, prefix, real, False, attend)                # (B, S, C)
        x = self.self_attn_layer_norm(x + y)    # after the sum, where GPT-2 has it before the layer
        # BART was trained with the exact GELU; GPT-2's tanh form would change every logit a little.
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))         # (B, S, C)


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.d_model, config.decoder_ffn_dim
        self.self_attn = BARTAttention(C, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.encoder_attn = BARTAttention(C, config.decoder_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(C)
        self.fc1, self.fc2 = nn.Linear(C, inner), nn.Linear(inner, C)
        self.final_layer_norm = nn.LayerNorm(C)

    def forward(self, x, prefix, real, memory, cross_prefix, cross_real, layer, cache, attend):
        k, v = self.self_attn.keys_and_values(x)                                # (B, H, T, D) each
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                    # (B, H, S, D) each
        y = self.self_attn(x, k, v, prefix, real, True, attend)                 # (B, T, C)
        x = self.self_attn_layer_norm(x + y)
        k, v = memory                                                   # (B, H, S, D), the source's
        y = self.encoder_attn(x, k, v, cross_prefix, cross_real, False, attend)  # (B, T, C)
        x = self.encoder_attn_layer_norm(x + y)
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))         # (B, T, C)


class Stack(nn.Module):
    """The encoder, or the decoder: positions and layers. The words are shared by both."""

    def __init__(self, config, layers):
        super().__init__()
        # 2 rows more than positions, as fairseq had them for padding: text begins in row 2.
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 2, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(layers)

    def embed(self, words, where, read):
        """words: (B, T, C); where: (T,) or (B, T), their positions; read: tokens so far, these too,
        which is more than positions only where texts branch. Returns (B, T, C).
        """
        most = len(self.embed_positions.weight) - 2
        if read > most <= where.max():
            raise ValueError(f"got a text of {where.max() + 1} tokens; expected at most {most}, "
                             "the positions of this model; shorten it")
        return self.layernorm_embedding(words + self.embed_positions(where + 2))    # (B, T, C)


class BART(nn.Module):
    """Lewis et al. 2019. Differs from the official code, whose trainer leaves BART's dropout on."""

    architecture, places = "bart", Places._fields
    checkpoint_root, checkpoint_transposed = "model.", ()
    checkpoint_ignored = ("encoder.version", "decoder.version")         # of fairseq's, in old files
    checkpoint_tied = {"encoder.embed_tokens.weight": "shared.weight",
                       "decoder.embed_tokens.weight": "shared.weight",
                       "lm_head.weight": "shared.weight"}
    checkpoint_zero = ("final_logits_bias",)

    def __init__(self, config):
        super().__init__()
        for heads in (config.encoder_attention_heads, config.decoder_attention_heads):
            if config.d_model % heads:
                raise ValueError(f"got width {config.d_model} and {heads} heads; expected a "
                                 "multiple of the heads; correct the model's config.json")
        self.config = config
        self.fingerprint = ""
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, (EncoderLayer(config) for _ in range(config.encoder_layers)))
        self.decoder = Stack(config, (DecoderLayer(config) for _ in range(config.decoder_layers)))
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))

    @property
    def wte(self):
        """The word embedding under GPT-2's name: the programs ask it for device and dtype."""
        return self.shared

    def no_prefix(self):
        """The prefix of length 0 at every place."""
        sizes = (self.config.at(place) for place in self.places)
        return Places(*(self.shared.weight.new_empty(s.n_layer, 2, 1, s.n_head, 0,
                                                     s.n_embd // s.n_head) for s in sizes))

    def encode(self, ids, real=None, prefix=None, attend=attend):
        """Read sources ids (B, S) once, for any number of calls of the decoder: a `Memory`.

        real: (B, S) bool, False at padding; or (B, P+S), where not all of the encoder's prefix is
        real either. prefix: `Places`. attend: see GPT2.forward.
        """
        prefix = self.no_prefix() if prefix is None else prefix
        real = torch.ones_like(ids[:1], dtype=torch.bool) if real is None else real  # (1 or B, S)
        front = prefix.encoder.size(4) + ids.size(1) - real.size(1)
        keys = F.pad(real, (front, 0), value=True)                              # (1 or B, P+S)
        # The text starts at position 0 whatever the prefix, as in the official code: a prefix of
        # BART takes no one's place, so it may even be longer than the positions.
        where = torch.arange(ids.size(1), device=ids.device)                    # (S,)
        x = self.encoder.embed(self.shared(ids), where, ids.size(1))            # (B, S, C)
        for block, part in zip(self.encoder.layers, prefix.encoder, strict=True):
            x = block(x, part, keys, attend)                                    # (B, S, C)
        kv = [torch.stack(block.encoder_attn.keys_and_values(x)) for block in self.decoder.layers]
        return Memory(torch.stack(kv), keys[:, -ids.size(1):])              # kv (L, 2, B, H, S, D)

    def forward(self, ids, prefix=None, real=None, cache=None, attend=attend, memory=None):
        """Hidden states of the target's tokens `ids` (B, T), which begin with </s>: (B, T, C).

        prefix: `Places`. real, cache, attend: as in GPT2.forward, of the decoder's own attention.
        memory: the source, from `encode`.
        """
        prefix = self.no_prefix() if prefix is None else prefix
        past, P = 0 if cache is None else cache.length, prefix.decoder.size(4)
        where = torch.arange(past, past + ids.size(1), device=ids.device)       # (T,)
        if real is None:
            real = torch.ones(1, P + past + ids.size(1), dtype=torch.bool, device=ids.device)
        elif real.dim() == 3:               # texts that branch: a token stands behind its own past
            where = real[:, :, P:].sum(2) - 1                                   # (B, T)
        front = prefix.cross.size(4) + memory.kv.size(4) - memory.real.size(1)
        source = F.pad(memory.real, (front, 0), value=True)                     # (1 or B, P+S)
        x = self.decoder.embed(self.shared(ids), where, past + ids.size(1))     # (B, T, C)
        layers = zip(self.decoder.layers, prefix.decoder, memory.kv, prefix.cross, strict=True)
        for layer, (block, part, kv, cross) in enumerate(layers):
            x = block(x, part, real, kv, cross, source, layer, cache, attend)   # (B, T, C)
        if cache is not None:
            cache.length += ids.size(1)
        return x                                                                # (B, T, C)

    def head(self, hidden):
        """Logits of hidden states (..., C) -> (..., V). The head is the word embedding again."""
        return F.linear(hidden, self.shared.weight, self.final_logits_bias[0])


ARCHITECTURES = {"gpt2": (GPT2Config, GPT2), "bart": (BARTConfig, BART)}
