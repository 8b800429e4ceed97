"""What `--model smollm2 --data e2e` means, and how many targets of a source meet in a batch."""
import collections

import pytest
import torch

from data import paper
from data.batches import Pair, epoch_batches, source_of
from train import Settings, resolve
from utils.cli import parse

OWN = paper.TRAINING["prefix"]["smollm2 e2e"]


def resolved(*flags):
    return resolve(parse(Settings, [*flags, "--out", "out/of-a-test"], ""))


@pytest.mark.parametrize("model", ["smollm2", "weights/smollm2"])
def test_smollm2_has_settings_of_its_own_for_e2e(model):
    """Would catch: the paper's settings for GPT-2, by which it learns next to nothing."""
    settings = resolved("--model", model, "--data", "e2e")
    for name, value in OWN.items():
        assert getattr(settings, name) == value, name
    assert settings.epochs is None and settings.mid_dim == 512


@pytest.mark.parametrize("model, data", [("gpt2-medium", "e2e"), ("smollm2", "webnlg"),
                                         ("smollm2", "my.jsonl")])
def test_another_model_or_data_set_has_its_own(model, data):
    """Would catch: settings of one that leak to another."""
    settings = resolved("--model", model, "--data", data)
    wanted = paper.TRAINING["prefix"].get(data, paper.TRAINING["prefix"][paper.OTHER])
    untouched = Settings()
    for name in {*OWN, *wanted}:
        assert getattr(settings, name) == wanted.get(name, getattr(untouched, name)), name


def test_another_method_has_its_own_settings():
    """Would catch: a KeyError, or a prefix's learning rate for the weights of the model."""
    settings = resolved("--model", "smollm2", "--data", "e2e", "--method", "finetune")
    assert (settings.lr, settings.epochs, settings.share_source) == (5e-5, 5, 0)


@pytest.mark.parametrize("flag, value", [
    ("--warmup", 0), ("--share-source", 0), ("--dev-every", 0), ("--dev-pairs", 500),
    ("--warmup-steps", 0), ("--warmup", 3), ("--lr", 0.5), ("--prefix-len", 4),
    ("--batch-size", 12)])
def test_a_flag_wins_even_where_it_says_the_default(flag, value):
    """Would catch: `--warmup 0` taken for no word at all."""
    settings = resolved("--model", "smollm2", "--data", "e2e", flag, str(value))
    name = flag[2:].replace("-", "_").removesuffix("_steps")
    assert getattr(settings, name) == value
    for other in OWN.keys() - {name}:
        assert getattr(settings, other) == OWN[other], other


@pytest.mark.parametrize("flag, duration", [("--epochs", (2, None)), ("--steps", (None, 2))])
def test_a_duration_takes_the_place_of_the_own_one(flag, duration):
    """Would catch: epochs beside steps, of which the steps would win."""
    settings = resolved("--model", "smollm2", "--data", "e2e", flag, "2")
    assert (settings.epochs, settings.steps) == duration and settings.warmup == OWN["warmup"]


# ---- --share-source

@pytest.fixture
def pairs():
    """1 to 8 targets of each of 60 sources, mixed."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 9, (60,), generator=generator).tolist()
    pairs = [Pair([source, *range(source % 7), target, 0], 1 + source % 7)
             for source, n in enumerate(counts) for target in range(n)]
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]


def groups_in(pairs, batches):
    """For each batch, how many of each source stand in it."""
    return [collections.Counter(source_of(pairs[i]) for i in batch) for batch in batches]


@pytest.mark.parametrize("share", [1, 3, 5])
def test_at_most_so_many_of_a_source_stay_together_and_all_are_seen(pairs, share):
    """Would catch: pairs lost where a group is cut, all of a source together after all, batches of
    another size.
    """
    for epoch in range(3):
        batches = epoch_batches(pairs, 12, 1, epoch, share_source=share)
        assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
        assert sorted(map(len, batches))[1:] == [12] * (len(batches) - 1)
        runs = []                   # neighbours of one source: what was kept together
        for batch in batches:
            for i in batch:
                if runs and source_of(pairs[runs[-1][-1]]) == source_of(pairs[i]):
                    runs[-1].append(i)
                else:
                    runs.append([i])
        groups = sum(-(-n // share) for n in collections.Counter(map(source_of, pairs)).values())
        assert len(runs) <= groups + len(batches)       # a batch that is full cuts one at most
        if share == 3:              # two groups of one source may become neighbours, by chance
            assert sum(len(run) > share for run in runs) < 0.05 * len(runs)


def test_other_targets_of_a_source_meet_in_other_epochs(pairs):
    """Would catch: groups that are the same in every epoch, so that a batch has the same company
    for ever.
    """
    def company(epoch):
        batches = epoch_batches(pairs, 12, 1, epoch, share_source=3)
        return {(i, j) for batch in batches for i in batch for j in batch
                if i < j and source_of(pairs[i]) == source_of(pairs[j])}
    one, other = company(0), company(1)
    assert one == company(0) and len(one & other) < 0.6 * len(one)
    together = set().union(*map(company, range(40)))
    sizes = collections.Counter(map(source_of, pairs)).values()
    assert len(together) == sum(n * (n - 1) // 2 for n in sizes)    # in the end each meets each
