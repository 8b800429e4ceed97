"""sample.generate for a GPU: a step of decoding is recorded once and then replayed: --graph.

A step of a small batch is hundreds of small kernels, and Python takes longer to start them than the
GPU to run them. A CUDA graph starts all of them at once; but what it replays has the same shapes
and lies at the same addresses each time. So the cache has a fixed size, with the prefix and the
prompt in front; what is a length elsewhere is a tensor here: which column is the newest, which are
read, how many tokens there are. Lengths are rounded up, so that there are few recordings. On a CPU
the same steps run one by one, so that tests can compare them. Not here: beams, and the constraint
against repetition, which look at lists of tokens. Letters as in model.py.
"""
import dataclasses

import torch
from torch.nn import functional as F

from decoding.constraints import on_device
from decoding.state import DecodingState
from model import KVCache
from prefix import tensors_of

COLUMNS = 64        # lengths are rounded up to a multiple: one recording for all tables of E2E
STEPS = 4           # after so many, see whether all texts have ended


def why_not_recordable(model, constraints, num_beams=1):
    """Why a step cannot be recorded; empty where it can."""
    if num_beams > 1:
        return f"{num_beams} beams are compared in Python"
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if constraints.no_repeat_ngram_size:
        return "the tokens so far are compared in Python, for --no-repeat-ngram-size"
    never = {*constraints.banned_tokens, *constraints.ends()}
    if constraints.min_new_tokens and len(never) >= model.config.vocab_size:
        return "every token but the end is banned, so a text ends too short"
    if model.is_encoder_decoder and not model.attention.supports_tree:
        return "this attention cannot tell where the text of a BART stands in a wider cache"
    return ""


class FixedCache(KVCache):
    """A `KVCache` that always has its full length; the newest token goes to the column `newest`."""

    def __init__(self, like, columns):
        L, _, B, H, _, D = like.kv.shape
        self.kv = like.kv.new_zeros(L, 2, B, H, columns, D)
        self.n_prefix = self.length = like.n_prefix
        self.newest = torch.zeros(1, dtype=torch.long, device=self.kv.device)

    def extend(self, layer, k, v):
        """Put k, v (B, H, 1, D) into their column; return all, (B, H, columns, D) each."""
        self.kv[layer, 0].index_copy_(2, self.newest, k)
        self.kv[layer, 1].index_copy_(2, self.newest, v)
        return self.kv[layer, 0], self.kv[layer, 1]


def round_up(n):
    return -(-n // COLUMNS) * COLUMNS


def round_up_source(inputs):
    """What a model reads besides tokens and cache: the prefix and, in an encoder-decoder, the
    encoded source, here padded to a rounded length.
    """
    if "encoded" not in inputs:
        return inputs
    kv, key_mask = inputs["encoded"]            # (L, 2, B, H, S, D) and (B, S), a prefix included
    more = round_up(kv.size(4)) - kv.size(4)
    padded = F.pad(kv, (0, 0, 0, more)), F.pad(key_mask, (0, more))
    return inputs | {"encoded": inputs["encoded"]._make(padded)}


def replay_of(once, device, generator=None):
    """The work of `once`, recorded as a CUDA graph on `device`: a function that replays it.

    generator: what `once` draws from, if it draws.
    """
    drawn = None if generator is None else generator.get_state()
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):           # PyTorch wants a first run on another stream
            once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            generator.set_state(drawn)          # that first run drew what nobody will use
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            once()
    return graph.replay


class Step:
    """One token for each of B texts, from tensors at fixed addresses to the same tensors."""

    def __init__(self, state, inputs, columns, constraints, sample):
        self.model, self.constraints, self.sample = state.model, constraints, sample
        (B, V), device = state.logits.shape, state.logits.device
        self.cache = FixedCache(state.cache, columns)
        in_front = state.key_mask.size(1) - state.cache.length      # keys that are not in the cache
        self.key_mask = torch.zeros(B, in_front + columns, dtype=torch.bool, device=device)
        self.inputs = {name: x._make(map(torch.zeros_like, x)) if isinstance(x, tuple) else
                       torch.zeros_like(x) for name, x in inputs.items()}
        self.tokens = torch.zeros(B, max(1, constraints.max_new_tokens), dtype=torch.long,
                                  device=device)
        self.n = torch.ones(1, dtype=torch.long, device=device)     # columns of `tokens` in use
        self.done = torch.zeros(B, dtype=torch.bool, device=device)             # (B,)
        self.banned, self.end = torch.zeros(2, V, dtype=torch.bool, device=device)      # (V,) each
        self.banned.index_fill_(0, on_device(constraints.banned_tokens, device), True)
        self.end.index_fill_(0, on_device(tuple(constraints.ends()), device), True)

    def begin(self, state, inputs, ids):
        """Put everything in place: prompts that have been read, the first tokens ids (B,)."""
        length = state.cache.length
        self.cache.kv[:, :, :, :, :length] = state.cache.kv[:, :, :, :, :length]
        # What earlier texts left in the columns behind stays there; no query sees it.
        self.key_mask.fill_(False)[:, :state.key_mask.size(1)] = state.key_mask
        for name, x in inputs.items():
            for mine, its in zip(tensors_of(self.inputs[name]), tensors_of(x)):
                mine.copy_(its)
        self.cache.newest.fill_(length)
        self.tokens[:, 0] = ids
        self.n.fill_(1)
        self.done.copy_(self.constraints.ended(ids))

    def take(self):
        """Read the newest tokens and choose the next. Nothing here waits for what the GPU finds."""
        rules, in_front = self.constraints, self.key_mask.size(1) - self.cache.kv.size(4)
        self.key_mask.index_fill_(1, self.cache.newest + in_front, True)        # (B, P+S)
        ids = self.tokens.index_select(1, self.n - 1)                           # (B, 1)
        # Passed as a tree: so the position is the number of keys seen, not the cache's length.
        tree = None
        if self.model.attention.supports_tree:
            tree = self.key_mask[:, None, in_front + self.cache.n_prefix:]      # (B, 1, columns)
        hidden = self.model.hidden_states(ids, key_mask=self.key_mask, cache=self.cache, tree=tree,
                                          **self.inputs)                        # (B, 1, C)
        self.cache.length = self.cache.n_prefix     # `newest` counts here, this must not grow
        never = self.banned | (self.end & (self.n < rules.min_new_tokens))      # (V,)
        logits = self.model.head(hidden[:, 0]).masked_fill(never, float("-inf"))    # (B, V)
        ids = self.sample(logits)                                               # (B,)
        if rules.forced_eos_token_id is not None:
            last = self.n == rules.max_new_tokens - 1                           # (1,)
            ids = ids.masked_fill(last, rules.forced_eos_token_id)              # (B,)
        self.tokens.index_copy_(1, self.n, ids[:, None])
        self.done |= rules.ended(ids)
        self.n += 1
        self.cache.newest += 1


class RecordedGenerate:
    """sample.generate with recorded steps: called alike, the same tokens; it keeps the recordings.

    generator: what `sample` draws from. Whether all texts have ended is checked every few steps
    only, so it may draw more often than sample.generate: then later batches get other tokens.
    """

    def __init__(self, generator):
        self.generator, self.steps = generator, {}

    @torch.no_grad()
    def __call__(self, model, prompts, constraints, prefix, sample):
        state = DecodingState(model, prompts, prefix, constraints.max_new_tokens)
        rules = dataclasses.replace(constraints, max_new_tokens=state.max_new_tokens)
        rules.apply(state.logits, 0, ())
        ids, inputs = sample(state.logits), round_up_source(state.inputs)       # (B,)
        columns = round_up(state.cache.kv.size(4))
        shapes = [part.shape for x in inputs.values() for part in tensors_of(x)]
        key = model, model.attention, sample, rules, len(prompts), columns, *shapes
        if key not in self.steps:
            self.steps[key] = Step(state, inputs, columns, rules, sample)
            if ids.is_cuda and rules.max_new_tokens > 1:
                self.steps[key].take = replay_of(self.steps[key].take, ids.device, self.generator)
        step = self.steps[key]
        step.begin(state, inputs, ids)
        for n in range(1, rules.max_new_tokens):
            step.take()
            # To know this, Python has to wait for the GPU. So it asks now and then only.
            if n % STEPS == 0 and n >= rules.min_new_tokens and step.done.all():
                break
        rows = step.tokens[:, :rules.max_new_tokens].tolist()
        return [rules.until_end(row) for row in rows]
