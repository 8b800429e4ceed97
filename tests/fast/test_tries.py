"""Batches of tries, which compute once what several texts begin with."""
import pytest
import torch
from conftest import (
    batch_of,
    loss_and_gradients,
    random_bart,
    random_gpt2,
    shared_pairs,
    some_prefix,
    some_trainer,
)

from data import pairs as plain
from data.batches import Pair, count_labels
from fast import tries
from fast.checkpointing import checkpoint_blocks


def close(got, want):
    """Equal but for the order of the sums, in float64."""
    assert len(got) == len(want)
    for x, y in zip(got, want):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-10 * y.abs().max())


def test_a_trie_has_every_beginning_once():
    """The drawing in `collate_tries`, beside a text of its own. Would catch: a node that sees its
    cousin, padding without anything to see, a token that two pairs learn and one counts.
    """
    rows = [[Pair([51, 52, 1, 2, 3], 2), Pair([51, 52, 1, 4, 5], 2)], [Pair([51, 60], 1)]]
    batch = tries.collate_tries(rows)
    tree = batch.inputs["tree"]
    assert batch.inputs["ids"].tolist() == [[51, 52, 1, 2, 4], [51, 0, 0, 0, 0]]
    assert tree[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0],
                                      [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    assert torch.equal(tree[1], torch.eye(5, dtype=torch.bool))
    learned = zip(batch.label_positions.tolist(), batch.labels.tolist(),
                  batch.label_weights.tolist())
    assert sorted(learned) == [(1, 1, 2), (2, 2, 1), (2, 4, 1), (3, 3, 1), (4, 5, 1), (5, 60, 1)]
    assert (batch.n_pairs, batch.n_labels) == (3, 7) == (3, batch.label_weights.sum())


def test_one_text_may_be_the_beginning_of_another():
    """Would catch: an end that is read where it is another text's middle, and taken for its own."""
    nodes, labels = tries.trie([Pair([1, 2, 3], 1), Pair([1, 2, 3, 4], 1), Pair([1, 2, 3], 1)])
    assert nodes == {(-1, 1): 0, (0, 2): 1, (1, 3): 2}
    assert labels == {(0, 2): 3, (1, 3): 3, (2, 4): 1}


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_pairs_that_share_a_source_have_the_gradient_they_have_alone(kind):
    """Would catch: a target that sees another, a source counted once where it has six targets, a
    mean over rows in place of pairs; of BART, a target that sees its neighbour's source.
    """
    model = kind()
    learner, pairs = some_prefix(model), shared_pairs()
    plain_batch = batch_of(model, pairs)
    alone = loss_and_gradients(model, learner, plain_batch)
    batch = tries.collate(pairs, model)
    assert (batch.n_pairs, batch.n_labels) == (plain_batch.n_pairs, plain_batch.n_labels)
    if kind is random_gpt2:
        assert batch.inputs["ids"].numel() < 0.5 * plain_batch.inputs["ids"].numel()
    else:
        assert len(batch.inputs["ids"]) == len(batch.inputs["source"]) < 14     # for 14 pairs
    close(loss_and_gradients(model, learner, batch), alone)
    checkpoint_blocks(model)
    close(loss_and_gradients(model, learner, batch), alone)
    thetas = []
    for collate in (None, tries.collate):       # and the whole step: batch size counts pairs
        trainer = some_trainer(model, collate=collate)
        trainer.train_step(pairs)
        thetas.append(torch.cat([theta.detach().flatten()
                                 for theta in trainer.learner.parameters()]))
    assert torch.allclose(*thetas, rtol=1e-8)


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_the_dev_loss_of_tries_is_that_of_pair_by_pair(kind):
    """Would catch: pairs lost or counted twice where groups are packed into batches."""
    model, pairs = kind(), shared_pairs()
    batches = tries.dev_batches(pairs, 4, model)
    assert sum(batch.n_pairs for batch in batches) == 14
    assert all(batch.n_pairs <= 4 for batch in batches)
    losses = [some_trainer(model, dev=dev).dev_loss()
              for dev in (batches, plain.dev_batches(pairs, 4, model))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_source_of_bart_is_read_once_for_all_its_targets(bart):
    """Would catch: a dev set whose reports are read as often as they have headlines; short reports
    beside long ones, padded to their length.
    """
    pairs, reads = [], []
    for n in range(8):                      # in lengths 50, 10, 50, 10, ...
        source = [n, *range(100, 109 if n % 2 else 149)]
        pairs += [Pair([*source, *target], len(source)) for target in ([5, 6], [5, 7])]
    alone = loss_and_gradients(bart, some_prefix(bart), batch_of(bart, pairs))[0].item()
    encode = bart.encode
    bart.encode = lambda ids, *rest: reads.append(tuple(ids.shape)) or encode(ids, *rest)
    loss = some_trainer(bart, dev=tries.dev_batches(pairs, 8, bart)).dev_loss()
    assert loss == pytest.approx(alone / (16 * 2), rel=1e-12)
    assert reads == [(4, 50), (4, 10)]


def test_many_targets_of_one_source_do_not_stand_beside_few_of_another(bart):
    """Would catch: a row of six targets, and all others padded to its length."""
    pairs = [Pair([1, 2, 3, *[n] * 20], 3) for n in range(6)]
    pairs += [Pair([n, 2, 3, *[n] * 20], 3) for n in range(4, 8)]

    def shape(pairs):
        return tries.collate(pairs, bart).inputs["ids"].shape
    assert shape(pairs) == (10, 20)                         # a source is read in no time
    long = [Pair([*pair.ids[:3], *[9] * 500, *pair.ids[3:]], 503) for pair in pairs]
    assert shape(long) == (5, 1 + 6 * 19)                   # and here it takes all


@pytest.mark.parametrize("targets", [(4, 4, 4, 4), (16, 4, 4)])
def test_rows_are_cut_where_that_saves_work(targets):
    """Would catch: neighbours torn apart for nothing; rows of very different length, all padded to
    the longest; sources cut in the middle, where each would fill a row.
    """
    # Each source and its targets have 60 + 96 nodes: the more targets, the shorter.
    pairs = [Pair([source, *range(100, 159), target, *[7] * (96 // many - 1), 0], 60)
             for source, many in enumerate(targets) for target in range(many)]
    assert [len(row) for row in tries.in_rows(pairs[:targets[0]], 1000)] == [targets[0]]
    rows = tries.in_rows(pairs[::-1], 100)  # where the model is narrow, to compare tokens counts
    assert [{pair.ids[0] for pair in row} for row in rows] == [{n} for n in range(len(targets))]
    assert {len(tries.trie(row)[0]) for row in rows} == {60 + 96}


def test_a_row_may_be_longer_than_the_positions(model):
    """What counts is how far a token sees. Would catch: padding that counts itself up to positions
    that are not there, beside a row of many targets.
    """
    torch.manual_seed(5)
    many = [Pair([5, 6, *torch.randint(257, (12,)).tolist()], 2) for _ in range(9)]
    short, learner = Pair([7, 8], 1), some_prefix(model)
    batch = tries.collate_tries([many, [short]])
    assert batch.inputs["ids"].size(1) > 64 and batch.n_labels == count_labels([*many, short])
    close(loss_and_gradients(model, learner, batch),
          loss_and_gradients(model, learner, batch_of(model, [*many, short])))
