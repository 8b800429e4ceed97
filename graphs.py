"""sample.generate again, for a GPU: a step of decoding is recorded once and then replayed.

A step of a small batch is hundreds of small kernels, and Python takes longer to start them than the
GPU to run them. A CUDA graph starts all of them at once; but what it replays has the same shapes
and lies at the same addresses each time. So the cache has a fixed size, with the prefix and the
prompt in front; what is a length elsewhere is a tensor here: which column is the newest, which are
real, how much has been said. Lengths are rounded up, so that there are few recordings. Called by
opening.py, for sample.py --graph. On a CPU the same steps run one by one, so that tests can compare
them. Not here: beams, and the rule against repetition, which look at lists of tokens. Letters as in
model.py; "room" is how many columns the cache has.
"""
import dataclasses

import torch
from torch.nn import functional as F

from model import Cache, Memory, Places
from model import attend as written_out
from reader import reader_of

COLUMNS = 64        # lengths are rounded up to a multiple: one recording for all tables of E2E
STEPS = 4           # after so many, see whether all texts have ended


def impossible(model, rules, attend, beam=1):
    """Why a step cannot be recorded; empty where it can."""
    if beam > 1:
        return f"{beam} beams are compared in Python"
    if model.wte.weight.device.type != "cuda":
        return f"the model is on {model.wte.weight.device}"
    if rules.no_repeat:
        return "what has been said is looked at in Python, for --no-repeat"
    if model.architecture == "bart" and attend is not written_out:
        return "the fused kernel cannot tell where the text of a BART stands in a wider cache"
    return ""


class Columns(Cache):
    """A `Cache` that always has its full length; the newest token goes to the column `newest`."""

    def __init__(self, model, batch, room):
        super().__init__(model, batch, room)
        self.newest = torch.zeros(1, dtype=torch.long, device=self.kv.device)

    def extend(self, layer, k, v):
        """Put k, v (B, H, 1, D) into their column; return all, (B, H, room, D) each."""
        self.kv[layer, 0].index_copy_(2, self.newest, k)
        self.kv[layer, 1].index_copy_(2, self.newest, v)
        return self.kv[layer, 0], self.kv[layer, 1]


def rounded(n):
    return -(-n // COLUMNS) * COLUMNS


def beside(reader):
    """What the model reads beside tokens and cache: the prefix, and of a BART the source, its
    length rounded up. A list of tensors, the prefix first.
    """
    if reader.model.architecture == "gpt2":
        return [reader.model.no_prefix() if reader.prefix is None else reader.prefix]
    kv, real = reader.memory
    more = rounded(kv.size(4)) - kv.size(4)
    return [*reader.prefix, F.pad(kv, (0, 0, 0, more)), F.pad(real, (0, more))]


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

    def __init__(self, reader, beside, room, rules, choose):
        self.model, self.attend = reader.model, reader.attend
        self.rules, self.choose = rules, choose
        (B, V), device = reader.logits.shape, reader.logits.device
        self.cache = Columns(self.model, B, room)
        in_front = reader.real.size(1) - reader.cache.length    # keys that are not in the cache
        self.real = torch.zeros(B, in_front + room, dtype=torch.bool, device=device)    # (B, P+S)
        self.beside = [torch.zeros_like(x) for x in beside]
        self.said = torch.zeros(B, max(1, rules.max_new), dtype=torch.long, device=device)
        self.n = torch.ones(1, dtype=torch.long, device=device)         # so many columns of said
        self.done = torch.zeros(B, dtype=torch.bool, device=device)             # (B,)
        self.banned, self.end = torch.zeros(2, V, dtype=torch.bool, device=device)      # (V,) each
        self.banned[list(rules.banned)] = True
        self.end[rules.eos] = True

    def begin(self, reader, beside, ids):
        """Put everything in place: prompts that have been read, the first tokens ids (B,)."""
        length = reader.cache.length
        self.cache.kv[:, :, :, :, :length] = reader.cache.kv[:, :, :, :, :length]
        # What earlier texts left in the columns behind stays there; no one sees it.
        self.real.fill_(False)[:, :reader.real.size(1)] = reader.real
        for mine, its in zip(self.beside, beside):
            mine.copy_(its)
        self.cache.newest.fill_(length)
        self.said[:, 0] = ids
        self.n.fill_(1)
        self.done.copy_(ids == self.rules.eos)

    def take(self):
        """Read the newest tokens and choose the next. Nothing here waits for what the GPU finds."""
        rules, column = self.rules, self.cache.newest + self.real.size(1) - self.cache.kv.size(4)
        self.real.index_fill_(1, column, True)                                  # (B, P+S)
        ids = self.said.index_select(1, self.n - 1)                             # (B, 1)
        if self.model.architecture == "gpt2":
            x = self.model(ids, *self.beside, self.real, self.cache, self.attend)
        else:           # as of a tree: then a token's position is how much it sees
            *prefix, kv, source = self.beside
            x = self.model(ids, Places(*prefix), self.real[:, None], self.cache, self.attend,
                           Memory(kv, source))                                  # (B, 1, C)
        hidden = self.banned | (self.end & (self.n < rules.min_new))            # (V,)
        ids = self.choose(self.model.head(x[:, 0]).masked_fill(hidden, float("-inf")))  # (B,)
        if rules.last is not None:
            ids = ids.masked_fill(self.n == rules.max_new - 1, rules.last)      # (B,)
        self.said.index_copy_(1, self.n, ids[:, None])
        self.done |= ids == rules.eos
        self.n += 1
        self.cache.newest += 1


class Generate:
    """sample.generate with recorded steps: called alike, says the same; it keeps the recordings.

    generator: what `choose` draws from. It may draw a few times more than sample.generate, when the
    texts have ended and that is not noticed yet: the words of a later batch are others then.
    """

    def __init__(self, generator):
        self.generator, self.steps = generator, {}

    @torch.no_grad()
    def __call__(self, model, prompts, rules, prefix, choose, attend=written_out):
        reader = reader_of(model, prompts, prefix, rules.max_new, attend=attend)
        rules, eos = dataclasses.replace(rules, max_new=reader.room), rules.eos
        rules.forbid(reader.logits, 0, ())
        ids, extra, room = choose(reader.logits), beside(reader), rounded(reader.cache.kv.size(4))
        shape = model, choose, attend, rules, len(prompts), room, *(x.shape for x in extra)
        if shape not in self.steps:
            self.steps[shape] = Step(reader, extra, room, rules, choose)
            if ids.is_cuda and rules.max_new > 1:
                self.steps[shape].take = replay_of(self.steps[shape].take, ids.device,
                                                   self.generator)
        step = self.steps[shape]
        step.begin(reader, extra, ids)
        for n in range(1, rules.max_new):
            step.take()
            # To know this, Python has to wait for the GPU. So it asks now and then only.
            if n % STEPS == 0 and n >= rules.min_new and step.done.all():
                break
        rows = step.said[:, :rules.max_new].tolist()
        return [row[:row.index(eos)] if eos in row else row for row in rows]
