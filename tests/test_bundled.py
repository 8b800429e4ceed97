"""The bundled models keep their promise: babble before, every fact and nothing else after."""
import pytest
from conftest import ROOT

import sample
import train
from data import headlines, world

COUNT = 100


def slots(model, speaker, split):
    """Percent of fresh sources of a split whose every value is said, and no other."""
    if model == "tiny-bart":
        examples, score = headlines.task(split, COUNT, seed=7), headlines.headline_accuracy
    else:
        examples, score = world.task("near", split, COUNT, seed=7), world.slot_accuracy
    return 100 * score(examples, speaker.say([e.source for e in examples]))


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-bart"])
def run(request, tmp_path_factory):
    """(model, directory, the model's file before) of its default run, but for fewer looks at the
    dev set, which only choose a step.
    """
    out = tmp_path_factory.mktemp("bundled") / "run"
    before = (ROOT / "weights" / request.param / "model.pt").read_bytes()
    train.main(["--model", request.param, "--device", "cpu", "--dev-every", "100", "--dev-pairs",
                "100", "--out", str(out)])
    return request.param, out, before


def test_the_default_run_tells_what_it_never_learned_from(run):
    """Under 5 % of the tables are told, or reports summarised, without the prefix. With it over
    90 % of the tables and 85 % of the reports, and over 85 and 65 % of kinds that it never met.
    Would catch: weights, a world or defaults that no longer fit.
    """
    model, out, _ = run
    seen, unseen = (90, 85) if model == "tiny-gpt2" else (85, 65)
    told = sample.Speaker(sample.Settings(run=[str(out)], device="cpu", batch_size=COUNT))
    frozen = sample.Speaker(sample.Settings(run=[str(out)], device="cpu", batch_size=COUNT))
    frozen.prefixes = {name: frozen.model.no_prefix() for name in frozen.prefixes}
    assert slots(model, frozen, "test-seen") < 5 and slots(model, frozen, "test-unseen") < 5
    assert slots(model, told, "test-seen") > seen
    assert slots(model, told, "test-unseen") > unseen


def test_the_default_run_leaves_the_bundled_weights_alone(run):
    """Would catch: a run that trains, and saves, the model itself."""
    model, out, before = run
    assert (ROOT / "weights" / model / "model.pt").read_bytes() == before
    assert not (out / "model").exists() and (out / "prefix.pt").exists()
