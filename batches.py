"""Pairs of texts as tensors: which of them meet in a batch, and what is computed once for several.

For GPT-2 source and target are one sequence, for BART the source is the encoder's and the target
the decoder's. Called by train.py, and by loss.py for the dev set. Not here: from text to tokens
(data/sequence.py), what is learned from a batch (loss.py). Letters as in model.py.
"""
import collections
import itertools
import os.path
import typing

import numpy
import torch

from data.sequence import Pair

# What a layer computes for a token alone takes as long as to compare it with so many others, in
# widths C: measured on a CPU (Zen 5, GPT-2 small, fp32 and bf16). By multiplications alone it would
# be 6, but they are not what comparing waits for. Elsewhere it may cost some speed, nothing else.
BALANCE = 1.3


def tokens_of(pairs):
    """How many tokens there are to learn: those of the targets, their ends among them."""
    return sum(len(pair.ids) - pair.start for pair in pairs)


def grouped(things, key):
    """Lists of the things that have the same key, in the order in which the keys appear."""
    groups = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return list(groups.values())


def source_of(pair):
    return tuple(pair.ids[:pair.start])


def batches_of_epoch(pairs, batch_size, seed, epoch, share=False):
    """The batches of one epoch, lists of indices: similar lengths together, in random order.

    Similar lengths mean little padding. Sorting all would fix which pairs meet, so only pools of 50
    batches are sorted. A function of (seed, epoch) alone: a resumed run needs no state to find its
    place. share: the pairs of one source stay together, but for those where a batch is full.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    groups = grouped(range(len(pairs)), lambda i: source_of(pairs[i]) if share else i)
    order, pools = torch.randperm(len(groups), generator=generator).tolist(), []
    size = max(1, 50 * batch_size * len(groups) // len(pairs))          # groups in a pool
    for i in range(0, len(order), size):
        pool = [groups[j] for j in order[i:i + size]]
        pools += sorted(pool, key=lambda group: sum(len(pairs[j].ids) for j in group))
    flat = list(itertools.chain(*pools))
    batches = [flat[i:i + batch_size] for i in range(0, len(flat), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class Batch(typing.NamedTuple):
    """Some pairs as tensors. Where a token is learned is worked out on the CPU: to count such
    places, a GPU would have to be waited for.
    """
    ids: torch.Tensor               # (B, T) tokens, padded behind
    place: torch.Tensor             # (N,), in the flattened (B * T): where a token is predicted
    label: torch.Tensor             # (N,), that token
    times: torch.Tensor             # (N,), how many pairs learn it there; 0: padding
    look: torch.Tensor = None       # (B, T, T) bool, of tries: who may look where
    source: tuple = None            # of BART: its tokens (B, S), and which of them are real (B, S)

    def to(self, device):
        *own, source = self
        own = (None if x is None else x.to(device, non_blocking=True) for x in own)
        return Batch(*own, source and tuple(x.to(device, non_blocking=True) for x in source))


def padded(texts):
    """Lists of tokens as ids (B, T), padded behind, and which of them are real, (B, T) bool."""
    T = max(map(len, texts))
    ids = torch.tensor([text + [0] * (T - len(text)) for text in texts])                    # (B, T)
    return ids, torch.arange(T) < torch.tensor([[len(text)] for text in texts])             # (B, T)


def collate(pairs, device):
    """A `Batch` with a row for each pair. A token is predicted from the one before it, and the last
    token of a row is only predicted: the model need not read it.
    """
    ids, _ = padded([p.ids[:-1] for p in pairs])                                            # (B, T)
    place = [b * ids.size(1) + t - 1 for b, p in enumerate(pairs)
             for t in range(p.start, len(p.ids))]
    label = [token for p in pairs for token in p.ids[p.start:]]
    return Batch(ids, torch.tensor(place), torch.tensor(label), torch.ones(len(label))).to(device)


def trie(pairs):
    """The texts of some pairs as a trie, where every beginning stands once, whoever begins so.

    Returns {(parent, token): node} of all tokens that are read, in the order of their nodes 0, 1,
    ..., which -1, nothing read yet, is the root of; and {(node, token): times}, how many pairs
    learn to say that token behind that node. The last token of a text is only said.
    """
    nodes, learned = {}, collections.Counter()
    for pair in pairs:
        node = -1
        for t, token in enumerate(pair.ids):
            if t >= pair.start:
                learned[node, token] += 1
            if t < len(pair.ids) - 1:
                node = nodes.setdefault((node, token), len(nodes))
    return nodes, learned


def collate_tries(rows, device):
    """A `Batch` with a row for each list of pairs: their trie, node after node.

    The table s1 s2 and two texts on it, "a b c" and "a d e", whose last tokens nobody reads:

        s1 - s2 - a - b             s1 s2  a  b  d      A node looks at itself and its ancestors:
                    - d         s1   1  0  0  0  0      it sees what it would see in a text alone.
                                s2   1  1  0  0  0      So it gets the position it had there, for
                                a    1  1  1  0  0      the model counts what a token sees. Behind
                                b    1  1  1  1  0      s2 a is learned twice, and behind a both b
                                d    1  1  1  0  1      and d.
    """
    made = [trie(row) for row in rows]
    B, T = len(made), max(len(nodes) for nodes, _ in made)
    ids = numpy.zeros((B, T), int)                                                          # (B, T)
    look = numpy.eye(T, dtype=bool)[None].repeat(B, 0)      # (B, T, T); padding sees itself
    for b, (nodes, _) in enumerate(made):
        for (parent, token), node in nodes.items():
            ids[b, node] = token
            if parent >= 0:
                look[b, node] |= look[b, parent]
    place = [b * T + node for b, (_, learned) in enumerate(made) for node, _ in learned]
    label = [token for _, learned in made for _, token in learned]
    times = [float(times) for _, learned in made for times in learned.values()]
    return Batch(torch.from_numpy(ids), torch.tensor(place), torch.tensor(label),
                 torch.tensor(times), torch.from_numpy(look)).to(device)


def by_source(pairs, most):
    """Lists of pairs that have a source in common, at most so many in each."""
    return [group[i:i + most] for group in grouped(pairs, source_of)
            for i in range(0, len(group), most)]


def in_rows(pairs, C):
    """Lists of pairs, each to be a row of a GPT-2 of width C, so that least is computed.

    In one row everything is shared and nothing is padding, but each token is compared with all. So
    each source may have a row, or a row ends where the tries of all are of about the same size.
    """
    pairs = sorted(pairs, key=lambda pair: pair.ids)        # neighbours begin most alike
    read = [[], *(pair.ids[:-1] for pair in pairs)]
    old = [len(os.path.commonprefix(two)) for two in itertools.pairwise(read)]  # nodes that a pair
    new = [len(ids) - n for ids, n in zip(read[1:], old)]       # finds there, and that it brings
    total = list(itertools.accumulate(new))

    def work(rows):                                             # rows of numbers of pairs
        T = max(old[row[0]] + sum(new[i] for i in row) for row in rows)
        return len(rows) * T * (T + BALANCE * C)
    most = 1 + 3 * total[-1] // C           # shorter rows would not become faster by being cut
    numbers = range(len(pairs))
    ways = [grouped(numbers, lambda i: (total[i] - 1) * count // total[-1])
            for count in range(1, most + 1)]
    ways.append(grouped(numbers, lambda i: source_of(pairs[i])))
    return [[pairs[i] for i in row] for row in min(ways, key=work)]


def batch_of(model, pairs, share=False):
    """The `Batch` of `pairs` for this model; share: what several of them begin with, above all a
    source with several targets, is computed once.

    Of BART the rows are the targets, behind the token that every target begins with; the sources
    are the encoder's, and share says that each is read once for all its targets.
    """
    device = model.wte.weight.device
    if model.architecture != "bart":
        if not share:
            return collate(pairs, device)
        return collate_tries(in_rows(pairs, model.config.n_embd), device)

    def cells(rows):        # B * (S + T), padding too
        return len(rows) * (max(row[0].start for row in rows) + max(map(tokens_of, rows)))
    rows = [[pair] for pair in pairs]
    if share:               # whole groups, or halves of them and smaller: what computes least
        rows = min((by_source(pairs, most) for most in range(1, len(pairs) + 1)), key=cells)
    begin = [model.config.decoder_start_token_id]
    said = [[Pair(begin + p.ids[p.start:], 1) for p in row] for row in rows]
    targets = collate_tries(said, "cpu") if share else collate([p for p, in said], "cpu")
    return targets._replace(source=padded([p.ids[:p.start] for p, *_ in rows])).to(device)
