"""Batches of similar lengths, and of tries, which compute once what several texts begin with."""
import math

import pytest
import torch
from conftest import gradients, random_bart, random_gpt2, shared_pairs, some_learner
from test_bart_train import some_prefixes

from batches import batch_of, batches_of_epoch, collate_tries, in_rows, trie
from data.sequence import Pair
from loss import dev_loss, target_nats
from train import Run, Settings


def test_every_epoch_sees_every_pair_once_in_another_order():
    """Would catch: pairs lost at the end of a pool, or an order that never changes."""
    pairs = [Pair([0] * (1 + i * 7 % 40), 1) for i in range(1234)]
    epochs = [batches_of_epoch(pairs, 10, seed=1, epoch=e) for e in (0, 1)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(1234))
        assert len(batches) == math.ceil(1234 / 10)
    assert epochs[0] != epochs[1] and epochs[0] == batches_of_epoch(pairs, 10, seed=1, epoch=0)
    assert epochs[0] != batches_of_epoch(pairs, 10, seed=2, epoch=0)


def test_a_batch_holds_similar_lengths():
    """Would catch: batches that are mostly padding. Random ones of these would be half padding."""
    pairs = [Pair([0] * (1 + i * 7 % 40), 1) for i in range(2000)]
    batches = batches_of_epoch(pairs, 10, 1, 0)
    cells = sum(len(b) * max(len(pairs[i].ids) for i in b) for b in batches)
    assert sum(len(p.ids) for p in pairs) > 0.9 * cells


# ---- what several texts begin with, computed once

def test_batches_come_in_no_order_and_other_pairs_meet():
    """Would catch: an epoch from short to long, the same batches in every epoch."""
    pairs = [Pair([0] * (1 + i * 7 % 37), 1) for i in range(400)]
    longest = [max(len(pairs[i].ids) for i in batch)
               for batch in batches_of_epoch(pairs, 10, 1, 0)]
    assert longest != sorted(longest)
    one, other = ({frozenset(batch) for batch in batches_of_epoch(pairs, 10, 1, epoch)}
                  for epoch in (0, 1))
    assert one != other


def test_a_trie_has_every_beginning_once():
    """The drawing in `collate_tries`, beside a text of its own. Would catch: a node that sees its
    cousin, padding without anything to see, a token that two pairs learn and one counts.
    """
    rows = [[Pair([51, 52, 1, 2, 3], 2), Pair([51, 52, 1, 4, 5], 2)], [Pair([51, 60], 1)]]
    batch = collate_tries(rows, "cpu")
    assert batch.ids.tolist() == [[51, 52, 1, 2, 4], [51, 0, 0, 0, 0]]
    assert batch.look[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0],
                                            [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    assert torch.equal(batch.look[1], torch.eye(5, dtype=torch.bool))
    learned = zip(batch.place.tolist(), batch.label.tolist(), batch.times.tolist())
    assert sorted(learned) == [(1, 1, 2), (2, 2, 1), (2, 4, 1), (3, 3, 1), (4, 5, 1), (5, 60, 1)]


def test_one_text_may_be_the_beginning_of_another():
    """Would catch: an end that is read where it is another text's middle, and taken for its own."""
    nodes, learned = trie([Pair([1, 2, 3], 1), Pair([1, 2, 3, 4], 1), Pair([1, 2, 3], 1)])
    assert nodes == {(-1, 1): 0, (0, 2): 1, (1, 3): 2}
    assert learned == {(0, 2): 3, (1, 3): 3, (2, 4): 1}


def learner_of(model):
    return some_learner(model) if model.architecture == "gpt2" else some_prefixes(model)


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_pairs_that_share_a_source_have_the_gradient_they_have_alone(kind):
    """Would catch: a target that sees another, a source counted once where it has six targets, a
    mean over rows in place of pairs; of BART, a target that looks at its neighbour's source.
    """
    model = kind()
    learner, pairs = learner_of(model), shared_pairs()
    alone = gradients(model, learner, batch_of(model, pairs))
    batch = batch_of(model, pairs, share=True)
    if model.architecture == "gpt2":
        assert batch.ids.numel() < 0.5 * batch_of(model, pairs).ids.numel()
    else:
        assert len(batch.ids) == len(batch.source[0]) < 14          # sources, for 14 pairs
    for got, want in zip(gradients(model, learner, batch), alone, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10 * want.abs().max())
    pytest.importorskip("step", reason="step.py, a side door, is not here").checkpoint_blocks(model)
    for got, want in zip(gradients(model, learner, batch), alone, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10 * want.abs().max())
    thetas = []
    for share in (False, True):         # and the whole step: batch size counts pairs, not rows
        run = Run(Settings(lr=1e-2, steps=10, out="unused", share_source=share), model,
                  learner_of(model))
        run.update(pairs)
        thetas.append(torch.cat([theta.detach().flatten() for theta in run.learner.parameters()]))
    assert torch.allclose(*thetas, rtol=1e-8)


def test_a_source_of_bart_is_read_once_for_all_its_targets(bart):
    """Would catch: a dev set whose reports are read as often as they have headlines; short reports
    beside long ones, padded to their length.
    """
    pairs, reads, learner = [], [], some_prefixes(bart)
    for n in range(8):                      # in lengths 50, 10, 50, 10, ...
        source = [n, *range(100, 109 if n % 2 else 149)]
        pairs += [Pair([*source, *target], len(source)) for target in ([5, 6], [5, 7])]
    alone = target_nats(bart, learner(), batch_of(bart, pairs)).item()
    encode = bart.encode
    bart.encode = lambda ids, *rest: reads.append(tuple(ids.shape)) or encode(ids, *rest)
    assert dev_loss(bart, learner, pairs, 8) == pytest.approx(alone / (16 * 2), rel=1e-12)
    assert reads == [(4, 50), (4, 10)]


def test_many_targets_of_one_source_do_not_stand_beside_few_of_another(bart):
    """Would catch: a row of six targets, and all others padded to its length."""
    pairs = [Pair([1, 2, 3, *[n] * 20], 3) for n in range(6)]
    pairs += [Pair([n, 2, 3, *[n] * 20], 3) for n in range(4, 8)]
    assert batch_of(bart, pairs, share=True).ids.shape == (10, 20)  # a source is read in no time
    long = [Pair([*pair.ids[:3], *[9] * 500, *pair.ids[3:]], 503) for pair in pairs]
    assert batch_of(bart, long, share=True).ids.shape == (5, 1 + 6 * 19)    # and here it takes all


@pytest.mark.parametrize("targets", [(4, 4, 4, 4), (16, 4, 4)])
def test_rows_are_cut_where_that_saves_work(targets):
    """Would catch: neighbours torn apart for nothing; rows of very different length, all padded to
    the longest; sources cut in the middle, where each would fill a row.
    """
    # Each source and its targets have 60 + 96 nodes: the more targets, the shorter.
    pairs = [Pair([source, *range(100, 159), target, *[7] * (96 // many - 1), 0], 60)
             for source, many in enumerate(targets) for target in range(many)]
    assert [len(row) for row in in_rows(pairs[:targets[0]], 1000)] == [targets[0]]
    rows = in_rows(pairs[::-1], 100)        # where the model is narrow, to compare tokens counts
    assert [{pair.ids[0] for pair in row} for row in rows] == [{n} for n in range(len(targets))]
    assert {len(trie(row)[0]) for row in rows} == {60 + 96}


def test_a_row_may_be_longer_than_the_positions(model):
    """What counts is how far a token sees. Would catch: padding that counts itself up to positions
    that are not there, beside a row of many targets.
    """
    torch.manual_seed(5)
    many = [Pair([5, 6, *torch.randint(257, (12,)).tolist()], 2) for _ in range(9)]
    short, learner = Pair([7, 8], 1), some_learner(model)
    batch = collate_tries([many, [short]], "cpu")
    assert batch.ids.size(1) > 64
    for got, want in zip(gradients(model, learner, batch),
                         gradients(model, learner, batch_of(model, [*many, short])), strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10 * want.abs().max())


def test_a_shared_epoch_sees_every_pair_once_and_keeps_sources_together():
    """Would catch: pairs lost or seen twice, batches of another size (the number of steps of an
    epoch would be wrong), sources torn apart, an order that is not a function of seed and epoch.
    """
    rng = torch.Generator().manual_seed(1)
    pairs = [Pair([n, *range(n % 7), 0], 1 + n % 7)
             for n in range(300) for _ in range(1 + int(torch.randint(8, (1,), generator=rng)))]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=rng).tolist()]
    epochs = [batches_of_epoch(pairs, 10, 1, epoch, share=True) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
        assert len(batches) == -(-len(pairs) // 10)
        assert sorted(map(len, batches))[1:] == [10] * (len(batches) - 1)
        rows = sum(len({tuple(pairs[i].ids[:pairs[i].start]) for i in batch}) for batch in batches)
        assert rows <= 300 + len(batches)           # each batch tears one source at most
    assert epochs[0] != epochs[1]
    assert epochs[0] == batches_of_epoch(pairs, 10, 1, 0, share=True)
