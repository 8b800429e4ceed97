"""What decoding needs of a model: a batch of prompts is read, then what is said, token by token.

There is a reader for each model, with the same four things: `prompts`, `room`, `logits` and `read`.
Called by sample.py, for itself and for the search (beam.py). Not here: which token is said.
Letters as in model.py; K beams, N tokens said after the prompt by all beams together.
"""
import torch
from torch.nn import functional as F

from model import Cache, Memory, Places
from model import attend as written_out


def stacked(prefixes, B):
    """Prefixes of different lengths as one of B rows (L, 2, B, H, P, D), and which of its keys are
    real, (B, P).

    prefixes: a list of B folded ones (L, 2, 1, H, P_b, D), or one (L, 2, 1 or B, H, P, D), which
    stays as it is. A shorter one stands on the right, next to the text; what is in front of it is
    no key, so every row gets what it would get alone.
    """
    if not isinstance(prefixes, list):
        return prefixes, prefixes.new_ones(B, prefixes.size(4), dtype=torch.bool)
    P = max(p.size(4) for p in prefixes)
    wide = [F.pad(p, (0, 0, P - p.size(4), 0)) for p in prefixes]       # (L, 2, 1, H, P, D)
    gap = torch.tensor([[P - p.size(4)] for p in prefixes], device=prefixes[0].device)  # (B, 1)
    # (L, 2, B, H, P, D) and (B, P)
    return torch.cat(wide, 2), torch.arange(P, device=gap.device) >= gap


class GPT2Reader:
    """A batch of ragged prompts, read behind their prefixes; then it reads what is said.

    `prompts`: what each text begins with; `room`: how many tokens each may say; `logits` (B, V) of
    the first of them.
    prompts: lists of tokens. prefix: (L, 2, 1 or B, H, P, D), or a list with one (L, 2, 1, H, P, D)
    for each prompt, of any lengths. max_new, beams: what it has to keep room for. attend: see
    GPT2.forward. Raises ValueError for an empty prompt or one that fills all positions.
    """

    @torch.no_grad()
    def __init__(self, model, prompts, prefix=None, max_new=0, beams=1, attend=written_out):
        if not prompts or not all(prompts):
            raise ValueError("got an empty prompt, or none; expected a token at least in each")
        self.model, self.prompts, self.attend = model, prompts, attend
        B, T, device = len(prompts), max(map(len, prompts)), model.wte.weight.device
        prefix = model.no_prefix() if prefix is None else prefix
        lengths = [p.size(4) for p in prefix] if isinstance(prefix, list) else [prefix.size(4)] * B
        P, longest = max(zip(lengths, map(len, prompts)), key=sum)
        self.room = min(max_new, model.config.n_positions - P - longest)    # tokens of each text
        if P + longest >= model.config.n_positions:
            raise ValueError(f"got a prefix of {P} and a prompt of {longest} tokens; expected less "
                             f"than {model.config.n_positions} together; shorten one of them")
        prefix, front = stacked(prefix, B)              # (L, 2, 1 or B, H, P, D), (B, P)
        # Padding goes in front, so that the newest token of every row stands in the last column.
        ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)    # (B, T)
        pad = torch.tensor([[T - len(p)] for p in prompts], device=device)              # (B, 1)
        self.real = torch.cat((front, torch.arange(T, device=device) >= pad), 1)        # (B, P+T)
        # Attention written out would put prefix and text together anew at every step; so the prefix
        # becomes the beginning of the cache. A fused kernel reads the one copy for the whole batch.
        held, self.prefix = (prefix, None) if attend is written_out else (None, prefix)
        self.cache = Cache(model, B, self.real.size(1) + beams * self.room, held)
        hidden = model(ids, self.prefix, self.real, self.cache, attend)                 # (B, T, C)
        self.logits = model.head(hidden[:, -1])                                         # (B, V)

    @torch.no_grad()
    def read(self, ids, tree=None):
        """Logits (B, K, V) of what follows each of the tokens ids (B, K).

        K = 1: the next token of the text. More: a token of each beam; tree (B, K, N) then says
        which of the N tokens read since the prompt, the last K of them these, are its own past.
        """
        real = F.pad(self.real, (0, 1), value=True)                                     # (B, P+S)
        if tree is None:
            self.real = real
        else:
            real = torch.cat((self.real[:, None].expand(-1, ids.size(1), -1), tree), 2)
        return self.model.head(self.model(ids, self.prefix, real, self.cache, self.attend))


class BARTReader:
    """A batch of ragged sources, each read once; then it reads what is said.

    sources: lists of tokens. prefix: `Places`, for all or a row each, or a list with one for each
    source, of any lengths. The rest as of GPT2Reader.
    """

    @torch.no_grad()
    def __init__(self, model, sources, prefix=None, max_new=0, beams=1, attend=written_out):
        if not sources or not all(sources):
            raise ValueError("got an empty source, or none; expected a token at least in each")
        self.model, self.attend = model, attend
        self.prompts = [[model.config.decoder_start_token_id] for _ in sources]
        self.room = min(max_new, model.config.n_positions - 1)
        B, prefix = len(sources), model.no_prefix() if prefix is None else prefix
        parts = map(list, zip(*prefix)) if isinstance(prefix, list) else prefix
        parts, fronts = zip(*(stacked(part, B) for part in parts))
        self.prefix, front = Places(*parts), Places(*fronts)    # (B, P) each
        device, S = model.wte.weight.device, max(map(len, sources))
        ids = torch.tensor([s + [0] * (S - len(s)) for s in sources], device=device)    # (B, S)
        long = torch.tensor([[len(s)] for s in sources], device=device)                 # (B, 1)
        # Padding behind: a source begins at position 0, wherever its neighbours end.
        real = torch.arange(S, device=device) < long                                    # (B, S)
        memory = model.encode(ids, torch.cat((front.encoder, real), 1), self.prefix, attend)
        self.memory = Memory(memory.kv, torch.cat((front.cross, real), 1))              # (B, P+S)
        if attend is written_out:               # as of GPT-2: put the two together once for all
            cross = self.prefix.cross.expand(-1, -1, B, -1, -1, -1)         # (L, 2, B, H, P, D)
            self.memory = self.memory._replace(kv=torch.cat((cross, memory.kv), 4))     # P+S keys
            self.prefix = self.prefix._replace(cross=model.no_prefix().cross)
        begin = torch.tensor(self.prompts, device=device)                               # (B, 1)
        self.cache = Cache(model, B, 1 + beams * self.room)
        self.real = front.decoder                                                       # (B, P)
        self.logits = self.read(begin)[:, 0]                                            # (B, V)

    @torch.no_grad()
    def read(self, ids, tree=None):
        """Logits (B, K, V) of what follows each of the tokens ids (B, K); see GPT2Reader."""
        real = F.pad(self.real, (0, 1), value=True)                                     # (B, P+S)
        if tree is None:
            self.real = real
        else:
            real = torch.cat((self.real[:, None].expand(-1, ids.size(1), -1), tree), 2)
        return self.model.head(self.model(ids, self.prefix, real, self.cache, self.attend,
                                          self.memory))


def reader_of(model, prompts, prefix=None, max_new=0, beams=1, attend=written_out):
    """The reader that `model` needs; for BART the prompts are its sources."""
    kind = BARTReader if model.architecture == "bart" else GPT2Reader
    return kind(model, prompts, prefix, max_new, beams, attend)
