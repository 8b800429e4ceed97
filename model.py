"""GPT-2, written out by hand, with attention that takes a prefix of extra keys and values.

`attend` is the definition of attention with a prefix (Li & Liang 2021, section 4.2, equation 3: the
activations h_i of a prefix position are read from P_theta, all others are computed by the language
model) and the only softmax over keys in the core. The model follows Radford et al. 2019 and the
layout of the Hugging Face checkpoints, whose names it keeps. prefix.py, train.py and sample.py call
it. Not here: the prefix itself (this file sees tensors only), training, decoding, dropout (a frozen
model runs without it, as in the official code for GPT-2), and the reading of foreign files
(convert.py).

Letters, true in every file:
B batch    T queries   S keys of the text   P prefix length   V vocabulary
L layers   H heads     D head size          C width = H * D
"""
import dataclasses
import hashlib
import json
import math
import pickle
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from plumbing import whole_file


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
    # The lowest finite number, not -inf: a row without any key would become NaN. Its weights, equal
    # and meaningless, are then set to 0, as PyTorch's scaled_dot_product_attention has it.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).masked_fill(hidden, 0)         # (B, H, T, P+S)
    return weights @ v                                          # (B, H, T, D)


class Cache:
    """Keys and values of the tokens read so far, so that decoding computes each token once.

    One tensor for all layers, allocated once with room for `room` tokens. A prefix (L, 2, 1 or B,
    H, P, D) given here lies in front, as if its positions were tokens that have been read: then
    `forward` is given none, and no step has to put the two together.
    """

    def __init__(self, model, batch, room, prefix=None):
        c, like = model.config, model.wte.weight
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
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]     # (B, H, S, D) each


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

    architecture = "gpt2"
    # How a Hugging Face checkpoint differs from this file, by the ends of its names (convert.py
    # reads it).
    checkpoint_root = "transformer."                # stands in front of every name, or does not
    checkpoint_transposed = ("attn.c_attn.weight", "attn.c_proj.weight",  # Conv1D: (in, out), where
                             "mlp.c_fc.weight", "mlp.c_proj.weight")       # nn.Linear has (out, in)
    checkpoint_ignored = ("attn.bias", "attn.masked_bias")            # the causal mask, as a buffer
    checkpoint_tied = {"lm_head.weight": "wte.weight"}

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
        for layer, block in enumerate(self.h):
            x = block(x, prefix[layer], real, layer, cache, attend)             # (B, T, C)
        if cache is not None:
            cache.length += ids.size(1)
        return self.ln_f(x)                                                     # (B, T, C)

    def head(self, hidden):
        """Logits of hidden states (..., C) -> (..., V). The head is the word embedding, transposed.

        Apart from `forward`, so that it is computed only where a logit is wanted: for 50,257 words
        it takes 38.6M multiplications a token, all layers of the smallest GPT-2 together 85M.
        """
        return F.linear(hidden, self.wte.weight)


ARCHITECTURES = {"gpt2": (GPT2Config, GPT2)}
# What reading a file that is damaged, or is something else, can raise.
UNREADABLE = (OSError, EOFError, LookupError, ArithmeticError, AttributeError, TypeError,
              ValueError, RuntimeError, pickle.UnpicklingError)


def why(error):
    """What is wrong with a file, in a few words."""
    if isinstance(error, pickle.UnpicklingError):   # PyTorch's own words advise to run it
        return "it holds code, or is no file of tensors"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def fingerprint(model):
    """A name for these very weights: 16 digits of SHA-256 of all names, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save(model, directory):
    """Write DIRECTORY/config.json and DIRECTORY/model.pt, each whole or not at all."""
    directory = Path(directory)
    about = {"architecture": model.architecture, "fingerprint": fingerprint(model),
             "config": dataclasses.asdict(model.config)}
    # Without its config.json the directory is no model: a kill between the two files cannot leave
    # new weights under an old fingerprint.
    (directory / "config.json").unlink(missing_ok=True)
    with whole_file(directory / "model.pt") as file:
        torch.save(model.state_dict(), file)
    with whole_file(directory / "config.json", "w") as file:    # last: its presence says "complete"
        json.dump(about, file, indent=1)


def load(directory, device="cpu", dtype=torch.float32):
    """The frozen model in DIRECTORY: every weight has requires_grad False.

    Raises ValueError where the directory does not hold a model written by `save`.
    """
    directory = Path(directory)
    try:
        about = json.loads((directory / "config.json").read_text("utf-8"))
        config_class, model_class = ARCHITECTURES[about["architecture"]]
        config, mark = config_class(**about["config"]), about["fingerprint"]
        state = torch.load(directory / "model.pt", map_location="cpu", weights_only=True)
        with torch.device("meta"):         # no numbers yet: they come from the file, without a copy
            model = model_class(config)
        model.load_state_dict(state, assign=True)
        if fingerprint(model) != mark:
            raise ValueError("model.pt holds other weights than config.json tells of")
    except FileNotFoundError as error:
        raise ValueError(f"got {directory}, which has no {Path(error.filename).name}; expected "
                         "what convert.py writes; make it with `python convert.py`") from error
    except UNREADABLE as error:
        raise ValueError(f"got {directory}, whose files do not fit ({why(error)}); expected what "
                         "convert.py writes; make it again") from error
    model.fingerprint = mark
    return model.to(device, dtype).requires_grad_(False).eval()
