"""scripts.real_data: what is planned, what a rate hangs on, and one run of each kind to its end."""
import json

import pytest

from baselines import untrained
from data import tasks
from scripts import real_data
from scripts.real_data import Run, Settings


def grid(group, method, losses):
    rates = real_data.RATES[method.split()[0]]
    return [{"group": group, "method": method, "lr": lr, "best_dev_loss": loss}
            for lr, loss in zip(rates, losses)]


def test_rate_is_the_one_with_the_lowest_dev_loss_of_a_whole_grid():
    rows = grid("grid", "prefix", (3.0, 1.0, 2.0))
    assert real_data.best_rate(rows, "grid", "prefix") == 1e-3
    assert real_data.best_rate(rows[:2], "grid", "prefix") is None
    assert real_data.best_rate(rows, "low-grid", "prefix") is None
    assert real_data.best_rate(rows, "grid", "finetune") is None


def test_plan_waits_for_the_grids_and_then_has_every_group():
    assert {run.group for run in real_data.plan([])} == {"untrained", "grid", "low-grid"}
    rows = [row for method in real_data.RATES for row in grid("grid", method, (3, 2, 1))]
    for method in ("prefix words", "prefix uniform", "finetune"):
        rows += grid("low-grid", method, (1, 2, 3))
    runs = real_data.plan(rows)
    assert {run.group for run in runs} == {*real_data.GROUPS}
    assert len({run.name for run in runs}) == len(runs)
    flags = {run.name: " ".join(run.flags) for run in runs}
    assert "--lr 0.002" in flags["e2e-prefix"] and "--steps 720" in flags["e2e-prefix"]
    assert "--prefix-layers 10-29" in flags["layers-20"]
    assert "--prefix-len 100" in flags["length-100"]
    assert flags["low-50-1-prefix-words"].count("--prefix-len") == 0
    assert "--lr 3e-05" in flags["low-500-2-finetune"]


def test_little_data_are_samples_with_a_dev_set_of_their_own(real_data_dir, tmp_path):
    settings = Settings(data_dir=str(real_data_dir), out=str(tmp_path))
    path = real_data.low_data("low-50-2", settings)
    train, dev = (tasks.load(path, split) for split in ("train", "dev"))
    assert sum(len(e.targets) for e in train) == 50 and sum(len(e.targets) for e in dev) == 15
    before = (tmp_path / "low-50-2.jsonl").read_bytes()
    real_data.low_data("low-50-2", settings)
    assert (tmp_path / "low-50-2.jsonl").read_bytes() == before
    real_data.low_data("low-50-1", settings)
    assert (tmp_path / "low-50-1.jsonl").read_bytes() != before


def test_templates_tell_the_table():
    source = ("name : Blue Spice | Type : pub | food : Thai | price : £20-25 | customer rating : "
              "3 out of 5 | area : riverside | family friendly : no | near : The Sorrento")
    assert untrained.e2e_template(source) == (
        "Blue Spice is a non family friendly Thai pub in the riverside area near The Sorrento. It "
        "has a price range of £20-25 and a customer rating of 3 out of 5.")
    assert untrained.e2e_template("name : Cocum") == "Cocum is a place."
    assert untrained.webnlg_template(" | A_B : birthPlace : \"C : D\" | A_B : age : 3") == (
        "The birth place of A B is C : D. The age of A B is 3.")


def test_what_is_said():
    rows = [{"source": "name : A | near : B C", "text": "a is by b c."},
            {"source": "name : D | near : E", "text": "It is by E."}, {"source": "name : F",
                                                                       "text": "F"}]
    assert real_data.said(rows) == {"said": {"name": 66.7, "near": 100.0}}


def test_unknown_group_is_told():
    with pytest.raises(ValueError, match="got --only .*'gird'.*expected untrained"):
        real_data.main(["--only", "gird"])


@pytest.fixture
def real_data_dir(real_data):
    return real_data


@pytest.mark.slow
def test_runs_to_their_end_once(real_data_dir, tmp_path, monkeypatch):
    """A template, a prefix in few pairs and fine-tuning, on the bundled model; what is in the
    results is not run again, and a run that was stopped goes on. Two rates of one method are two
    runs: the second was taken for the first, whose name is the same up to the decimal point.
    """
    few = ("--steps", "4", "--batch-size", "4", "--dev-pairs", "8")
    runs = [Run("untrained", "template-e2e", "e2e"),
            Run("low", "low-50-1-prefix", "low-50-1", ("--prefix-len", "3", *few)),
            *(Run("grid", f"grid-prefix-{lr}", "low-50-1", ("--lr", lr, *few))
              for lr in ("0.001", "0.002")),
            Run("main", "e2e-finetune", "e2e", ("--method", "finetune", "--share-source", "3",
                                                *few), True)]
    monkeypatch.setattr(real_data, "plan", lambda rows: runs)
    words = ["--model", "tiny-gpt2", "--data-dir", str(real_data_dir), "--limit", "6", "--out",
             str(tmp_path / "out"), "--results", str(tmp_path / "rows.jsonl")]
    call, seen = real_data.call, []

    def stop_twice(words, *rest):
        seen.append(words)
        if len(seen) == 1:
            call([*words, "--stop-at", "2"])
            raise KeyboardInterrupt
        if "--num-beams" not in words and "scripts.evaluate" in words and not again:
            again.append(words)
            raise KeyboardInterrupt                 # before the beams, behind the greedy texts
        return call(words, *rest)
    again = []
    monkeypatch.setattr(real_data, "call", stop_twice)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            real_data.main(words)
    real_data.main(words)
    assert seen[1][:2] == ["train.py", "--resume"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [run.name for run in runs]
    assert rows[0]["greedy"]["all"]["BLEU"] > 20 and rows[0]["greedy"]["said"]["name"] == 100
    assert rows[1]["steps"] == 4 and rows[1]["greedy"]["all"]["tables"] == 6
    assert [row["lr"] for row in rows[2:4]] == [1e-3, 2e-3]
    assert rows[4]["method"] == "finetune" and {"greedy", "beams"} <= rows[4].keys()
    assert sum("train.py" in words for words in seen) == 5      # fine-tuning was not begun again
    parts = [json.loads(line) for line in
             (tmp_path / "out" / "e2e-finetune.parts.jsonl").read_text().splitlines()]
    assert rows[4]["train_seconds"] == parts[0]["seconds"] and len(parts) == 1
    real_data.main(words)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 5
