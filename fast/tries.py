"""Batches of tries: what several texts begin with is computed once for all of them.

A table of E2E has about 8 references. Source and references become a tree of tokens, in which each
beginning stands once; a mask tells every token its own past, so losses and gradients are those of
the pairs one by one. For --share-source, and for the dev loss of --fast. The same functions as the
plain ones of data/. Letters as in model.py.
"""
import collections
import itertools
import os.path

import torch

from data.batches import Batch, count_labels, group_by, source_of
from data.seq2seq import decoder_pairs
from model import pad

# A layer's work for one token costs as much as comparing that token with BALANCE * C others:
# measured on a CPU (Zen 5, GPT-2 small, fp32 and bf16). By multiplications alone it would be 6.
# Elsewhere another value may be a little faster; the results are the same.
BALANCE = 1.3


def trie(pairs):
    """The texts of some pairs as a trie, where every beginning stands once, whoever begins so.

    Returns {(parent, token): node} of all tokens that are read; nodes are numbered 0, 1, ... in the
    order of the dictionary, and the root, nothing read yet, is -1. And {(node, token): count}, how
    many pairs learn that token after that node. The last token of a text is only predicted.
    """
    nodes, labels = {}, collections.Counter()
    for pair in pairs:
        node = -1
        for t, token in enumerate(pair.ids):
            if t >= pair.start:
                labels[node, token] += 1
            if t < len(pair.ids) - 1:
                node = nodes.setdefault((node, token), len(nodes))
    return nodes, labels


def collate_tries(rows):
    """A `Batch` with a row for each list of pairs: their trie, node after node.

    The table s1 s2 and two texts on it, "a b c" and "a d e", whose last tokens nobody reads:

        s1 - s2 - a - b             s1 s2  a  b  d      A node sees itself and its ancestors: what
                    - d         s1   1  0  0  0  0      it would see in a text alone. So it gets the
                                s2   1  1  0  0  0      position it had there, for the model counts
                                a    1  1  1  0  0      what a token sees. Behind s2 a is learned
                                b    1  1  1  1  0      twice, and behind a both b and d.
                                d    1  1  1  0  1
    """
    tries = [trie(row) for row in rows]
    B, T = len(tries), max(len(nodes) for nodes, _ in tries)
    ids = torch.zeros(B, T, dtype=torch.long)                                   # (B, T)
    tree = torch.eye(T, dtype=torch.bool).repeat(B, 1, 1)   # (B, T, T); padding sees itself
    for b, (nodes, _) in enumerate(tries):
        ids[b, :len(nodes)] = torch.tensor([token for _, token in nodes])
        own = tree[b].numpy()                                                   # (T, T), no copy
        for (parent, _), node in nodes.items():
            if parent >= 0:
                own[node] |= own[parent]
    positions = [b * T + node for b, (_, labels) in enumerate(tries) for node, _ in labels]
    labels = [token for _, labels in tries for _, token in labels]
    weights = [float(count) for _, labels in tries for count in labels.values()]
    pairs = [pair for row in rows for pair in row]
    return Batch({"ids": ids, "tree": tree}, torch.tensor(positions), torch.tensor(labels),
                 torch.tensor(weights), len(pairs), count_labels(pairs))


def by_source(pairs, limit):
    """Lists of pairs that have a source in common, at most `limit` in each."""
    return [group[i:i + limit] for group in group_by(pairs, source_of)
            for i in range(0, len(group), limit)]


def in_rows(pairs, C):
    """Lists of pairs, each to be a row of a model of width C, so that least is computed.

    In one row everything is shared and nothing is padding, but each token is compared with all. So
    these ways are compared: a row for each source, or 1, 2, ... rows with tries of similar size.
    """
    pairs = sorted(pairs, key=lambda pair: pair.ids)        # neighbours begin most alike
    read = [[], *(pair.ids[:-1] for pair in pairs)]
    old = [len(os.path.commonprefix(two)) for two in itertools.pairwise(read)]  # shared with the
    new = [len(ids) - n for ids, n in zip(read[1:], old)]       # pair before it; the pair's own
    total = list(itertools.accumulate(new))

    def work(rows):                                             # lists of indices of pairs
        T = max(old[row[0]] + sum(new[i] for i in row) for row in rows)
        return len(rows) * T * (T + BALANCE * C)
    most = 1 + 3 * total[-1] // C           # shorter rows would not become faster by being cut
    numbers = range(len(pairs))
    ways = [group_by(numbers, lambda i, count=count: (total[i] - 1) * count // total[-1])
            for count in range(1, most + 1)]
    ways.append(group_by(numbers, lambda i: source_of(pairs[i])))
    return [[pairs[i] for i in row] for row in min(ways, key=work)]


def in_rows_of_sources(pairs):
    """The same for an encoder-decoder: each row is one source, for all its targets or some."""
    def cells(rows):        # B * (S + T), padding too
        return len(rows) * (max(row[0].start for row in rows) + max(map(count_labels, rows)))
    # Whole groups, or halves of them and smaller: what computes least.
    return min((by_source(pairs, limit) for limit in range(1, len(pairs) + 1)), key=cells)


def collate(pairs, model):
    """A `Batch` of tries. For an encoder-decoder a row has the targets of one source, which the
    encoder reads once for all of them.
    """
    if not model.is_encoder_decoder:
        return collate_tries(in_rows(pairs, model.width))
    rows = in_rows_of_sources(pairs)
    batch = collate_tries([decoder_pairs(row, model) for row in rows])
    source, source_mask = pad([pair.ids[:pair.start] for pair, *_ in rows])     # (B, S) each
    inputs = batch.inputs | {"source": source, "source_mask": source_mask}
    # The token that every target begins with is not learned, so the labels are those of `pairs`.
    return batch._replace(inputs=inputs)


def dev_batches(pairs, batch_size, model):
    """All pairs as Batches of tries: those of a source together, and sources of similar length."""
    groups = by_source(pairs, batch_size)
    groups.sort(key=lambda group: group[0].start + count_labels(group))     # else much is padding
    batches = []
    while groups:
        batch = groups.pop()
        while groups and len(batch) + len(groups[-1]) <= batch_size:
            batch += groups.pop()
        batches.append(collate(batch, model))
    return batches
