"""The bundled model keeps its promise: babble before, the whole table and nothing else after."""
import pytest
import torch
from conftest import ROOT

import sample
import train
from data.world import slot_accuracy, task

COUNT = 100


def slots(speaker, split):
    """Percent of fresh tables of a split whose every value is said, and no other."""
    examples = task("near", split, COUNT, seed=7)
    return 100 * slot_accuracy(examples, speaker.say([e.source for e in examples]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The default run, but for fewer looks at the dev set, which only choose a step."""
    out = tmp_path_factory.mktemp("bundled") / "run"
    train.main(["--device", "cpu", "--dev-every", "100", "--dev-pairs", "100", "--out", str(out)])
    return out


def test_the_default_run_tells_tables_that_it_never_learned_from(run):
    """Under 5 % of the tables are told without the prefix, over 90 % with it, and over 85 % of
    kinds that it never met. Would catch: weights, a world or defaults that no longer fit.
    """
    told = sample.Speaker(sample.Settings(run=[str(run)], device="cpu", batch_size=COUNT))
    frozen = sample.Speaker(sample.Settings(run=[str(run)], device="cpu", batch_size=COUNT))
    frozen.prefixes = {name: frozen.model.no_prefix() for name in frozen.prefixes}
    assert slots(frozen, "test-seen") < 5 and slots(frozen, "test-unseen") < 5
    assert slots(told, "test-seen") > 90 and slots(told, "test-unseen") > 85


def test_the_default_run_leaves_the_bundled_weights_alone(run):
    """Would catch: a run that trains, and saves, the model itself."""
    state = torch.load(ROOT / "weights/tiny-gpt2/model.pt", weights_only=True)
    model, _ = sample.open_model("tiny-gpt2", "cpu", "fp32")
    assert all(torch.equal(tensor, state[name].float())
               for name, tensor in model.state_dict().items())
    assert not (run / "model").exists() and (run / "prefix.pt").exists()
