"""Pairs of texts as tensors: what a batch is, and which pairs meet in one.

Not here: from text to tokens and to a batch, which depends on the kind of model (pairs.py), what is
learned from a batch (prefix.py). Letters as in model.py.
"""
import array
import collections
import dataclasses
import itertools
import typing

import torch


@dataclasses.dataclass(frozen=True)
class Pair:
    """A source and a target as tokens. The loss is taken on ids[start:], target and end."""
    ids: list[int]
    start: int


class Pairs(collections.abc.Sequence):
    """Many `Pair`s in little memory: all tokens in one array, 4 bytes each, where lists need 36."""

    def __init__(self):
        self.tokens, self.ends, self.starts = array.array("i"), array.array("q"), array.array("i")

    def append(self, ids, start):
        """Add a Pair."""
        self.tokens.fromlist(ids)
        self.ends.append(len(self.tokens))
        self.starts.append(start)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        i = range(len(self))[i]                 # resolves negative indices and slices
        if isinstance(i, range):
            return [self[j] for j in i]
        return Pair(self.tokens[self.ends[i - 1] if i else 0:self.ends[i]].tolist(), self.starts[i])


class Batch(typing.NamedTuple):
    """Some pairs as tensors, on the CPU until `to`."""
    inputs: dict                    # what the model reads, by the names of its `hidden_states`
    label_positions: torch.Tensor   # (N,), in the flattened (B * T): where a token is predicted
    labels: torch.Tensor            # (N,), that token
    label_weights: torch.Tensor     # (N,), how many pairs learn it there; 0: padding
    n_pairs: int
    n_labels: int                   # tokens to learn: those of the targets, their ends among them

    def to(self, device):
        inputs, *labels, n_pairs, n_labels = self
        inputs = {name: x.to(device, non_blocking=True) for name, x in inputs.items()}
        return Batch(inputs, *(x.to(device, non_blocking=True) for x in labels), n_pairs, n_labels)


def label_tensors(pairs, T):
    """The other fields of a Batch whose row b is pairs[b], right-padded to T tokens.

    Token t is predicted at position t - 1.
    """
    positions = [b * T + t - 1 for b, pair in enumerate(pairs)
                 for t in range(pair.start, len(pair.ids))]
    labels = [token for pair in pairs for token in pair.ids[pair.start:]]
    return (torch.tensor(positions), torch.tensor(labels), torch.ones(len(labels)), len(pairs),
            len(labels))


def count_labels(pairs):
    """How many tokens there are to learn in `pairs`."""
    return sum(len(pair.ids) - pair.start for pair in pairs)


def source_of(pair):
    return tuple(pair.ids[:pair.start])


def group_by(items, key):
    """Lists of the items that have the same key, in the order in which the keys appear."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def epoch_batches(pairs, batch_size, seed, epoch, share_source=0):
    """The batches of one epoch, lists of indices: similar lengths together, in random order.

    Differs from the paper, whose batches are random: similar lengths mean little padding. Sorting
    all would fix which pairs meet, so only pools of 50 batches are sorted. For the same pairs
    the result depends on seed and epoch only: a resumed run needs no state to find its place.
    share_source: up to that many pairs of one source stay together if a batch has room.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    groups = group_by(range(len(pairs)), lambda i: source_of(pairs[i]) if share_source else i)
    if share_source:
        for group in groups:            # new neighbours each epoch
            group[:] = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        groups = [group[i:i + share_source] for group in groups
                  for i in range(0, len(group), share_source)]
    order, pools = torch.randperm(len(groups), generator=generator).tolist(), []
    size = max(1, 50 * batch_size * len(groups) // len(pairs))          # groups in a pool
    for i in range(0, len(order), size):
        pool = [groups[j] for j in order[i:i + size]]
        pools += sorted(pool, key=lambda group: sum(len(pairs[j].ids) for j in group))
    flat = list(itertools.chain(*pools))
    batches = [flat[i:i + batch_size] for i in range(0, len(flat), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
