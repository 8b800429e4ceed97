"""BART: an encoder reads the source, a decoder attends to it while it generates the target.

Lewis et al. 2019, with the names of the Hugging Face checkpoint, around the same `attend` as GPT-2.
There are three kinds of attention in it, and each has a prefix of its own (Li & Liang 2021, section
5.3 and the official code). Differs from the paper: its trainer leaves BART's dropout on while the
prefixes learn; here it is off, as for GPT-2. Not here: how the prefixes learn (bart/prefix.py).
Letters as in the top-level model.py; S is the length of the source here.
"""
import dataclasses
import typing

import torch
from torch import nn
from torch.nn import functional as F

from model import DecodingStart, KVCache, LanguageModel, pad, position_ids


class ThreePrefixes(typing.NamedTuple):
    """A prefix of BART: one for each kind of attention, each (L, 2, 1 or B, H, P, D), keys then
    values of every layer, or of fewer, the upper ones. Their lengths P may differ and be 0: no
    prefix there.
    """
    encoder: torch.Tensor       # in front of the source, where the source attends to itself
    decoder: torch.Tensor       # in front of the target, where the target attends to itself
    cross: torch.Tensor         # in front of the source, where the target attends to it

    def to(self, like):
        """All three in another dtype, or as the tensor `like`."""
        return ThreePrefixes(*(prefix.to(like) for prefix in self))


class EncodedSource(typing.NamedTuple):
    """What the decoder sees of a source: computed once, seen by every layer and token."""
    kv: torch.Tensor            # (L, 2, B, H, S, D), each decoder layer's keys and values of it
    key_mask: torch.Tensor      # (1 or B, S) bool, False at padding; decoding puts P more in front


@dataclasses.dataclass(frozen=True)
class BARTConfig:
    """The shape of a BART, by default of bart-large; field names as in its config.json."""
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


class BARTAttention(nn.Module):
    """Encoder, decoder and cross-attention: the keys and values are handed in, from the text itself
    or from elsewhere.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def split_heads(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)                 # (B, H, T, D)

    def keys_and_values(self, x):
        return self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x))   # (B, H, S, D)

    def forward(self, x, k, v, prefix, attend, mask):
        pk, pv = prefix                                                 # (1 or B, H, P, D) each
        y = attend(self.split_heads(self.q_proj(x)), k, v, pk, pv, mask)        # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))                      # (B, T, C)


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.d_model, config.encoder_ffn_dim
        self.self_attn = BARTAttention(C, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.fc1, self.fc2 = nn.Linear(C, inner), nn.Linear(inner, C)
        self.final_layer_norm = nn.LayerNorm(C)

    def forward(self, x, prefix, attend, mask):
        k, v = self.self_attn.keys_and_values(x)                                # (B, H, S, D) each
        y = self.self_attn(x, k, v, prefix, attend, mask)                       # (B, S, C)
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

    def forward(self, x, prefix, cross_prefix, source_kv, attend, mask, cross_mask, cache, layer):
        k, v = self.self_attn.keys_and_values(x)                                # (B, H, T, D) each
        if cache is not None:
            k, v = cache.extend(layer, k, v)                # (B, H, ., D) each, all tokens so far
        y = self.self_attn(x, k, v, prefix, attend, mask)                       # (B, T, C)
        x = self.self_attn_layer_norm(x + y)
        k, v = source_kv                                                        # (B, H, S, D) each
        y = self.encoder_attn(x, k, v, cross_prefix, attend, cross_mask)        # (B, T, C)
        x = self.encoder_attn_layer_norm(x + y)
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))         # (B, T, C)


class Stack(nn.Module):
    """The encoder, or the decoder: positions and layers. Word embeddings are shared."""

    def __init__(self, config, layers):
        super().__init__()
        # 2 rows more than positions, as fairseq had them for padding: text begins in row 2.
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 2, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(layers)

    def embed(self, words, positions, n_tokens):
        """words: (B, T, C); positions: (T,) or (B, T); n_tokens: of the text so far, 0 where it
        branches, so that it is not known here. Returns (B, T, C).
        """
        limit = len(self.embed_positions.weight) - 2
        if n_tokens > limit:
            raise ValueError(f"got a text of {n_tokens} tokens; expected at most {limit}, the "
                             "positions of this model; shorten it")
        return self.layernorm_embedding(words + self.embed_positions(positions + 2))    # (B, T, C)


class BART(LanguageModel):
    """The encoder-decoder; its methods mirror GPT2's."""
    architecture, is_encoder_decoder = "bart", True

    def __init__(self, config):
        super().__init__(config)
        for heads in (config.encoder_attention_heads, config.decoder_attention_heads):
            if config.d_model % heads:
                raise ValueError(f"got width {config.d_model} and {heads} heads; expected a "
                                 "multiple of the heads; correct the model's config.json")
        self.width, self.max_positions = config.d_model, config.max_position_embeddings
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, (EncoderLayer(config) for _ in range(config.encoder_layers)))
        self.decoder = Stack(config, (DecoderLayer(config) for _ in range(config.decoder_layers)))
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))

    @property
    def word_embedding(self):
        return self.shared

    def blocks(self):
        """The layers, each a function of the hidden states: the encoder's, then the decoder's."""
        return [*self.encoder.layers, *self.decoder.layers]

    def empty_prefix(self):
        """The prefix of length 0 in all three places."""
        c = self.config

        def empty(layers, heads):
            return self.shared.weight.new_empty(layers, 2, 1, heads, 0, c.d_model // heads)
        return ThreePrefixes(empty(c.encoder_layers, c.encoder_attention_heads),
                             empty(c.decoder_layers, c.decoder_attention_heads),
                             empty(c.decoder_layers, c.decoder_attention_heads))

    def encode(self, source, source_mask=None, prefix=None, prefix_mask=None):
        """Read sources (B, S) once, for any number of calls of the decoder: an `EncodedSource`.

        source_mask: (B, S) bool, False at padding. prefix: `ThreePrefixes`. prefix_mask: (B, P)
        bool, where not all of the encoder's prefix is there in every row.
        """
        prefix = self.empty_prefix() if prefix is None else prefix
        if source_mask is None:
            source_mask = torch.ones_like(source[:1], dtype=torch.bool)         # (1, S)
        if prefix_mask is None:
            prefix_mask = source_mask.new_ones(len(source_mask), prefix.encoder.size(4))
        key_mask = torch.cat((prefix_mask, source_mask), 1)                     # (1 or B, P+S)
        # The text starts at position 0 whatever the prefix, as in the official code: a prefix of
        # BART takes no token's place, so it may even be longer than the positions.
        positions = torch.arange(source.size(1), device=source.device)          # (S,)
        x = self.encoder.embed(self.shared(source), positions, source.size(1))  # (B, S, C)
        layers = self.prefix_and_mask(prefix.encoder, len(self.encoder.layers), key_mask,
                                      source.size(1), causal=False)
        for block, (part, mask) in zip(self.encoder.layers, layers, strict=True):
            x = block(x, part, self.attention, mask)                            # (B, S, C)
        kv = [torch.stack(block.encoder_attn.keys_and_values(x)) for block in self.decoder.layers]
        return EncodedSource(torch.stack(kv), source_mask)                      # (L, 2, B, H, S, D)

    def hidden_states(self, ids, source=None, source_mask=None, prefix=None, key_mask=None,
                      cache=None, tree=None, encoded=None):
        """The hidden states of the target's tokens `ids` (B, T), which begin with </s>: (B, T, C).

        source, source_mask: what the encoder reads, see `encode`; or `encoded`, what it has read.
        prefix: `ThreePrefixes`. key_mask, cache, tree: as in GPT2.hidden_states, for the decoder's
        attention to the target.
        """
        prefix = self.empty_prefix() if prefix is None else prefix
        if encoded is None:
            encoded = self.encode(source, source_mask, prefix)
        T, keys = ids.size(1), prefix.decoder.size(4) + ids.size(1)
        n_tokens = T                                                            # of the target
        if cache is not None:
            keys, n_tokens = keys + cache.length, T + cache.length - cache.n_prefix
        if key_mask is None:
            key_mask = torch.ones(1, keys, dtype=torch.bool, device=ids.device)     # (1, keys)
        # Positions start at 0 here, too; padding takes up positions, as in transformers.
        positions = torch.arange(n_tokens - T, n_tokens, device=ids.device)     # (T,)
        if tree is not None:                    # a token stands behind its own past
            positions = position_ids(key_mask[:, keys - n_tokens:], T, tree)    # (B, T)
        n_layers = len(self.decoder.layers)
        layers = self.prefix_and_mask(prefix.decoder, n_layers, key_mask, T, True, tree)
        # The prefix's keys that the mask lacks: all while learning, none in decoding.
        n_cross = prefix.cross.size(4) + encoded.kv.size(4) - encoded.key_mask.size(1)
        source_mask = F.pad(encoded.key_mask, (n_cross, 0), value=True)         # (1 or B, P+S)
        cross_layers = self.prefix_and_mask(prefix.cross, n_layers, source_mask, T, causal=False)
        x = self.decoder.embed(self.shared(ids), positions, n_tokens if tree is None else 0)
        layers = zip(self.decoder.layers, layers, cross_layers, encoded.kv, strict=True)
        for layer, (block, (part, mask), (cross, cross_mask), source_kv) in enumerate(layers):
            x = block(x, part, cross, source_kv, self.attention, mask, cross_mask, cache, layer)
        if cache is not None:
            cache.length += T
        return x                                                                # (B, T, C)

    def head(self, hidden):
        """Logits of hidden states (..., C) -> (..., V). The head is the word embedding again."""
        return self.head_product(hidden, self.head_weight, self.final_logits_bias[0])

    @torch.no_grad()
    def prefix_from_tokens(self, ids):
        """The keys and values that the model computes for P tokens, a list, as `ThreePrefixes`.

        "cross" is exactly those tokens, encoded alone, in front of the encoded source. "encoder"
        and "decoder" only come close: the text keeps its positions.
        """
        tokens, empty = torch.tensor([ids], device=self.device), self.empty_prefix()    # (1, P)
        mask = self.attention.mask(torch.ones_like(tokens, dtype=torch.bool), len(ids), False)
        x = self.encoder.embed(self.shared(tokens), torch.arange(len(ids), device=self.device),
                               len(ids))                                        # (1, P, C)
        encoder_kv = []
        for block, nothing in zip(self.encoder.layers, empty.encoder, strict=True):
            encoder_kv.append(torch.stack(block.self_attn.keys_and_values(x)))  # (2, 1, H, P, D)
            x = block(x, nothing, self.attention, mask)                         # (1, P, C)
        encoded, cache = self.encode(tokens), KVCache(empty.decoder, 1, len(ids))
        self.hidden_states(tokens, encoded=encoded, cache=cache)
        return ThreePrefixes(torch.stack(encoder_kv), cache.kv, encoded.kv)

    def start_decoding(self, prompts, prefix, prefix_mask, max_new_tokens, num_beams=1):
        """Read `prompts`, the sources, once, and get ready to write: see GPT2.start_decoding.

        prefix: `ThreePrefixes`; prefix_mask: three masks (B, P) alike, on the CPU.
        """
        # Padding stands behind: a source begins at position 0, wherever its neighbours end.
        source, mask, *prefix_mask = (x.to(self.device, non_blocking=True)      # (B, S) each
                                      for x in (*pad(prompts), *prefix_mask))   # (B, P) each
        prefix_mask = ThreePrefixes(*prefix_mask)
        encoded = self.encode(source, mask, prefix, prefix_mask.encoder)
        key_mask = torch.cat((prefix_mask.cross, mask), 1)                      # (B, P+S)
        apart, cached = prefix, self.empty_prefix()
        kv = encoded.kv
        every_layer = all(len(part) == len(full) for part, full in zip(prefix, cached))
        if self.attention.joins_prefix and every_layer:
            apart, cached = cached, apart
            kv = torch.cat((prefix.cross.expand(-1, -1, len(source), -1, -1, -1), kv), 4)
        max_new_tokens = min(max_new_tokens, self.max_positions - 1)
        cache = KVCache(cached.decoder, len(source), 1 + num_beams * max_new_tokens)
        start = self.config.decoder_start_token_id
        ids = source.new_full((len(source), 1), start)                          # (B, 1)
        key_mask_of_target = F.pad(prefix_mask.decoder, (0, 1), value=True)     # (B, P+1)
        inputs = {"prefix": apart, "encoded": EncodedSource(kv, key_mask)}
        return DecodingStart([[start]] * len(source), ids, key_mask_of_target, cache, inputs,
                             max_new_tokens)
