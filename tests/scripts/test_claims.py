"""The claims and their figure: what is run, what is chosen, and that every verdict can fall."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT, random_gpt2

from data.paper import resolve_training
from data.toy_world.tables import task
from pretrained.architectures import parse_layers
from scripts import claims, draw_claims
from train import Settings
from utils.cli import parse


def result(method, size, lr, seed, dev, seen, unseen, style="near"):
    """A row of a results file with these slot accuracies."""
    def scores(slots):
        return {"slots": slots, "exact": slots / 2, "bleu": slots / 3}
    about = {"model": "tiny-gpt2", "references": "varied", "test_seed": 1, "tables": 200}
    return {**about, "style": style, "size": size,
            "method": method, "lr": lr, "seed": seed, "dev-kinds": scores(dev),
            "test-seen": scores(seen), "test-unseen": scores(unseen)}


def world(small, tiny, tuned):
    """Results in which each method has (seen, unseen) at 2,000 tables and (seen) where less."""
    rows = []
    for method, about in (("prefix 1 %", small), ("prefix 0.1 %", tiny), ("fine-tuning", tuned)):
        for size, (seen, unseen) in about.items():
            rows += [result(method, size, 1e-3, seed, seen, seen + seed, unseen + seed)
                     for seed in (1, 2, 3)]
    return draw_claims.Results(rows)


def verdicts(results):
    return [verdict for _, verdict in draw_claims.verdicts(results, "slots")]


def test_every_verdict_can_fall():
    """Would catch: a claim that is called true whatever the figures are."""
    little = {50: (90, 90), 100: (90, 90), 200: (90, 90)}
    good = world(little | {2000: (95, 95)}, {2000: (90, 90)},
                 {50: (70, 60), 100: (70, 60), 200: (70, 60), 2000: (97, 80)})
    assert verdicts(good) == ["holds"] * 3
    bad = world({50: (50, 50), 100: (50, 50), 200: (50, 50), 2000: (60, 50)}, {2000: (20, 10)},
                {50: (70, 60), 100: (70, 60), 200: (70, 60), 2000: (97, 80)})
    assert verdicts(bad) == ["does not hold"] * 3
    mixed = world(little | {200: (70, 60), 2000: (95, 80)}, {2000: (60, 60)},
                  {50: (70, 60), 100: (70, 60), 200: (70, 60), 2000: (97, 80)})
    assert verdicts(mixed) == ["does not hold", "in part", "in part"]   # claim 1 knows no part
    behind_once = world(little | {200: (50, 60), 2000: (95, 80)}, {2000: (60, 60)},
                        {50: (70, 60), 100: (70, 60), 200: (70, 60), 2000: (97, 80)})
    assert verdicts(behind_once)[1] == "does not hold"


def test_a_rate_is_chosen_on_the_kinds_kept_for_it():
    """Would catch: a rate chosen by the test tables, which flatters the method with more rates."""
    rows = [result("fine-tuning", 50, 1e-3, 1, dev=80, seen=10, unseen=10),
            result("fine-tuning", 50, 1e-4, 1, dev=70, seen=99, unseen=99)]
    results = draw_claims.Results(rows)
    assert results.chosen("near", 50, "fine-tuning") == 1e-3
    assert results.best("near", 50, "fine-tuning", "test-seen")[0] == 10


def test_means_must_differ_by_more_than_chance():
    """Would catch: a winner called on seeds that scatter, or on a tenth of a point."""
    assert draw_claims.ahead((90, 1, 3), (80, 1, 3)) == 1
    assert draw_claims.ahead((80, 1, 3), (90, 1, 3)) == -1
    assert draw_claims.ahead((90, 20, 3), (80, 20, 3)) == 0         # standard error 16
    assert draw_claims.ahead((90.9, 0, 3), (90, 0, 3)) == 0


def test_every_planned_run_is_a_command_that_train_accepts(tmp_path):
    """Would catch: a flag that train.py does not have; a method run with fewer rates or seeds."""
    jobs = claims.plan(claims.Settings())
    assert len(jobs) == len({json.dumps(job) for job in jobs})
    for job in jobs:
        words = claims.command(job, "world", str(tmp_path / "run"))
        settings = resolve_training(parse(Settings, words[1:], ""))
        assert (settings.examples, settings.lr, settings.seed) == (job["size"], job["lr"],
                                                                   job["seed"])
        if settings.method == "prefix":     # what is stored of the bundled model's 981,760
            assert settings.prefix_len * 2 * 4 * 128 / 981_760 < 0.0105
    layers = {job["method"]: parse_layers(
        parse(Settings, claims.command(job, "world", "run")[1:], "").prefix_layers, random_gpt2(
            n_layer=4)) for job in jobs if job["method"].startswith("prefix")}
    assert layers == {"prefix 1 %": 4, "prefix 0.1 %": 4, "prefix 1 %, upper 3 of 4 layers": 3,
                      "prefix 1 %, upper 2 of 4 layers": 2, "prefix 1 %, upper 1 of 4 layers": 1}
    near = [job for job in jobs if job["style"] == "near" and job["method"] == "fine-tuning"]
    assert {(job["size"], job["lr"], job["seed"]) for job in near} == {
        (size, lr, seed) for size in (50, 100, 200, 500, 2000) for lr in claims.TUNING_RATES
        for seed in (1, 2, 3)}


@pytest.fixture
def words(tmp_path):
    """Flags that leave six runs of the plan, with results in a file of their own."""
    return ["--results", str(tmp_path / "r.jsonl"), "--styles", "near", "--sizes", "50",
            "--seeds", "1", "--tables", "3", "--jobs", "1", "--no-picture"]


def test_a_stopped_call_goes_on_and_runs_nothing_twice(tmp_path, words):
    """Would catch: a result that is lost or counted twice."""
    jobs = claims.plan(parse(claims.Settings, words, ""))
    assert len(jobs) == 6
    done = [json.dumps(job) for job in jobs]
    (tmp_path / "r.jsonl").write_text("\n".join(done) + '\n{"cut by a ki')
    claims.main(words)                      # all six are there: nothing is left to run
    assert (tmp_path / "r.jsonl").read_text() == "\n".join(done) + "\n"
    other = claims.plan(parse(claims.Settings, [*words, "--tables", "4"], ""))
    assert not any(job.items() <= json.loads(line).items() for job in other for line in done)
    (tmp_path / "r.jsonl").write_text('{"model": }\n' + "\n".join(done))
    with pytest.raises(ValueError, match="r.jsonl, a line of which is no JSON.*name another"):
        claims.main(words)


@pytest.mark.slow
def test_a_run_is_trained_decoded_and_scored(words, monkeypatch):
    """One real run of four steps. Would catch: a flag, a file or a score that has moved."""
    monkeypatch.setitem(claims.STEPS, 50, 4)
    done = claims.carry_out(claims.plan(parse(claims.Settings, words, ""))[0])
    assert done["method"] == "prefix 1 %" and done["dev_loss"] < 5
    assert all(0 <= done[split]["slots"] <= 100 for split in claims.SPLITS)


def test_one_writers_references_are_a_function_of_the_table(tmp_path):
    """Would catch: a "deterministic" task in which the reference still varies."""
    path = claims.one_writers_tables("near", tmp_path)
    rows = [json.loads(text) for text in open(path, encoding="utf-8")]
    usual = {e.source: e.targets for e in task("near", "train")}
    assert len(rows) == 2000
    for row in rows[:200]:
        assert row["target"] in usual[row["source"]] and " which " in row["target"]
    again = claims.one_writers_tables("near", tmp_path)
    assert [json.loads(text) for text in open(again, encoding="utf-8")] == rows


@pytest.mark.parametrize("words, message", [
    (["--styles", "neer"], "got .'neer'.; expected --styles of near, hard"),
    (["--sizes", "51"], "got .51.")])
def test_an_unknown_style_or_size_is_refused(words, message):
    """Would catch: a typing error that runs nothing and reports success."""
    with pytest.raises(ValueError, match=message):
        claims.main(words)


def test_the_table_and_the_picture_are_made_from_the_file_alone(tmp_path):
    """Would catch: a table in the docs that is typed by hand, or a picture that needs a model."""
    pytest.importorskip("matplotlib", reason="draws with the package matplotlib")
    page, picture, results = (tmp_path / name for name in ("page.md", "claims.png", "r.jsonl"))
    page.write_text("a\n<!-- claims -->\nold\n<!-- end of claims -->\nb\n")
    words = [sys.executable, "-m", "scripts.draw_claims", "--results", str(results), "--page",
             str(page), "--picture", str(picture)]
    little = {50: (90, 90), 100: (90, 90), 200: (90, 90), 500: (90, 90), 2000: (90, 90)}
    rows = world(little, {2000: (90, 90)}, little).rows
    rows += [x | {"tables": 20, "test-seen": x["dev-kinds"]} for x in rows]     # of a trial
    results.write_text("\n".join(map(json.dumps, rows)))
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    text = page.read_text()
    assert text.startswith("a\n") and text.endswith("b\n") and "\nold\n" not in text
    assert "| near | 500 | prefix 1 % | 0.001 | 92.0 / 92.0 |" in text
    assert picture.stat().st_size > 10_000
    results.write_text("\n".join(json.dumps(x) for x in rows if x["size"] != 100))
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "without runs of near, 100 tables, prefix 1 %" in ended.stderr
    assert ended.stderr.count("\n") == 1 and page.read_text() == text
