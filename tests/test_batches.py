"""Batches: which pairs meet, with how little padding, and where the labels are."""
import hashlib
import math
import random

import pytest
import torch

from data.batches import Pair, Pairs, count_labels, epoch_batches
from data.causal import collate
from data.pairs import dev_batches, digest


def test_every_epoch_sees_every_pair_once_in_another_order():
    """Would catch: pairs lost at the end of a pool, or an order that never changes."""
    pairs = [Pair([0] * (1 + i * 7 % 40), 1) for i in range(1234)]
    epochs = [epoch_batches(pairs, 10, seed=1, epoch=e) for e in (0, 1)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(1234))
        assert len(batches) == math.ceil(1234 / 10)
    assert epochs[0] != epochs[1] and epochs[0] == epoch_batches(pairs, 10, seed=1, epoch=0)
    assert epochs[0] != epoch_batches(pairs, 10, seed=2, epoch=0)


def test_a_batch_holds_similar_lengths():
    """Would catch: batches that are mostly padding. Random ones of these would be half padding."""
    pairs = [Pair([0] * (1 + i * 7 % 40), 1) for i in range(2000)]
    batches = epoch_batches(pairs, 10, 1, 0)
    cells = sum(len(b) * max(len(pairs[i].ids) for i in b) for b in batches)
    assert sum(len(p.ids) for p in pairs) > 0.9 * cells


def test_batches_come_in_no_order_and_other_pairs_meet():
    """Would catch: an epoch from short to long, the same batches in every epoch."""
    pairs = [Pair([0] * (1 + i * 7 % 37), 1) for i in range(400)]
    longest = [max(len(pairs[i].ids) for i in batch) for batch in epoch_batches(pairs, 10, 1, 0)]
    assert longest != sorted(longest)
    one, other = ({frozenset(batch) for batch in epoch_batches(pairs, 10, 1, epoch)}
                  for epoch in (0, 1))
    assert one != other


def test_a_shared_epoch_sees_every_pair_once_and_keeps_sources_together():
    """Would catch: pairs lost or seen twice, batches of another size (the number of steps of an
    epoch would be wrong), sources torn apart, an order that is not a function of seed and epoch.
    """
    rng = torch.Generator().manual_seed(1)
    pairs = [Pair([n, *range(n % 7), 0], 1 + n % 7)
             for n in range(300) for _ in range(1 + int(torch.randint(8, (1,), generator=rng)))]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=rng).tolist()]
    epochs = [epoch_batches(pairs, 10, 1, epoch, share_source=10) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
        assert len(batches) == -(-len(pairs) // 10)
        assert sorted(map(len, batches))[1:] == [10] * (len(batches) - 1)
        rows = sum(len({tuple(pairs[i].ids[:pairs[i].start]) for i in batch}) for batch in batches)
        assert rows <= 300 + len(batches)           # each batch tears one source at most
    assert epochs[0] != epochs[1]
    assert epochs[0] == epoch_batches(pairs, 10, 1, 0, share_source=10)


def test_a_label_is_predicted_from_the_token_before_it(model):
    """Would catch: labels of the source or of padding, a shift by one, a last token that is read
    for nothing.
    """
    pairs = [Pair([51, 52, 1, 2, 3], 2), Pair([61, 4], 1)]
    batch = collate(pairs, model)
    assert batch.inputs["ids"].tolist() == [[51, 52, 1, 2], [61, 0, 0, 0]]
    assert batch.label_positions.tolist() == [1, 2, 3, 4]       # 52, 1, 2 and, in row 1, 61
    assert batch.labels.tolist() == [1, 2, 3, 4]
    assert batch.label_weights.tolist() == [1, 1, 1, 1]
    assert (batch.n_pairs, batch.n_labels) == (2, 4) == (2, count_labels(pairs))


def test_the_dev_set_is_sorted_and_whole(model):
    """Would catch: dev pairs that are left out or padded to the longest of all."""
    pairs = [Pair([7] * (2 + i * 7 % 40), 1) for i in range(103)]
    batches = dev_batches(pairs, 10, model)
    assert sum(batch.n_pairs for batch in batches) == 103 and len(batches) == 11
    assert sum(batch.n_labels for batch in batches) == count_labels(pairs)
    cells = sum(batch.inputs["ids"].numel() for batch in batches)
    assert sum(len(pair.ids) - 1 for pair in pairs) > 0.9 * cells


def test_pairs_in_one_array_are_the_pairs():
    """Would catch: a pair with the tokens of its neighbour."""
    rng = random.Random(0)
    plain = [Pair([rng.randrange(2 ** 31) for _ in range(2 + n % 5)], n % 3) for n in range(50)]
    pairs = Pairs()
    for pair in plain:
        pairs.append(pair.ids, pair.start)
    assert list(pairs) == plain and pairs[-1] == plain[-1] and pairs[3:40:7] == plain[3:40:7]
    assert random.Random(1).sample(pairs, 9) == random.Random(1).sample(plain, 9)
    assert epoch_batches(pairs, 4, 1, 0) == epoch_batches(plain, 4, 1, 0)
    text = repr([(pair.ids, pair.start) for pair in plain])
    assert digest(pairs[:20], plain[20:]) == hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(IndexError):
        pairs[50]
