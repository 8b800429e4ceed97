"""scripts.real_data: what is planned, what a rate hangs on, and one run of each kind to its end."""
import json

import pytest

from baselines import untrained
from data import tasks
from scripts import draw_real_data, real_data
from scripts import real_data_plan as plan
from scripts.real_data import Settings
from scripts.real_data_plan import Run
from scripts.results import read_rows, write_rows


def grid(group, method, losses):
    rates = plan.RATES[method.split()[0]]
    return [{"group": group, "method": method, "lr": lr, "best_dev_loss": loss}
            for lr, loss in zip(rates, losses)]


def test_rate_is_the_one_with_the_lowest_dev_loss_of_a_whole_grid():
    rows = grid("grid", "prefix", (3.0, 1.0, 2.0))
    assert plan.best_rate(rows, "grid", "prefix") == 1e-3
    assert plan.best_rate(rows[:2], "grid", "prefix") is None
    assert plan.best_rate(rows, "low-grid", "prefix") is None
    assert plan.best_rate(rows, "grid", "finetune") is None
    more = {"group": "grid", "method": "prefix", "lr": 4e-3, "best_dev_loss": 0.5}
    assert plan.best_rate([*rows, more], "grid", "prefix") == 1e-3      # not of the protocol
    assert plan.incomplete_grids(rows) == ["grid", "low-grid"]


def test_plan_waits_for_the_grids_and_then_has_every_group():
    assert {run.group for run in plan.plan([])} == {"untrained", "grid", "low-grid"}
    rows = [row for method in plan.RATES for row in grid("grid", method, (3, 2, 1))]
    assert plan.incomplete_grids(rows) == ["low-grid"]
    for method in ("prefix words", "prefix uniform", "finetune"):
        rows += grid("low-grid", method, (1, 2, 3))
    assert plan.incomplete_grids(rows) == []
    runs = plan.plan(rows)
    assert {run.group for run in runs} == {*plan.GROUPS} - {"seeds"}
    assert len({run.name for run in runs}) == len(runs)
    flags = {run.name: " ".join(run.flags) for run in runs}
    assert "--lr 0.002" in flags["e2e-prefix"] and "--steps 720" in flags["e2e-prefix"]
    assert "--prefix-layers 10-29" in flags["layers-20"]
    assert "--prefix-len 100" in flags["length-100"]
    assert flags["low-50-1-prefix-words"].count("--prefix-len") == 0
    assert "--lr 3e-05" in flags["low-500-2-finetune"]
    assert "--lr 0.001 " in flags["webnlg-prefix"] and "--lr 0.002 " in flags["scitldr-prefix"]
    assert "--lr 0.0003 " in flags["webnlg-finetune"] + " "


def test_a_run_is_repeated_with_two_more_seeds():
    """Would catch: seeds that do not arrive, a grid's run or a typo that repeats nothing."""
    rows = [row for method in plan.RATES for row in grid("grid", method, (3, 2, 1))]
    runs = plan.plan(rows)
    again = plan.repeats(runs, ["e2e-prefix", "e2e-finetune", "e2e-prefix"])
    assert [(run.group, run.name, run.flags[-2:]) for run in again] == [
        ("seeds", f"e2e-{method}-seed-{seed}", ("--seed", str(seed)))
        for method in ("prefix", "finetune") for seed in (102, 103)]
    first = next(run for run in runs if run.name == "e2e-prefix")
    assert again[0].flags[:-2] == first.flags and again[0].beams
    for name in ("e2e-prefx", "grid-prefix-0.001", "template-e2e", "low-50-1-finetune"):
        with pytest.raises(ValueError, match="got --again .*e2e-prefix"):
            plan.repeats(runs, [name])


def test_a_directory_of_another_run_is_refused(tmp_path):
    """Would catch: a run of another model, or before a change of the protocol, taken for this."""
    run = Run("main", "e2e-prefix", "e2e", ("--lr", "0.001", "--prefix-len", "10"))
    (tmp_path / "config.json").write_text(json.dumps(
        {"settings": {"model": "smollm2", "lr": 0.001, "prefix_len": 10, "steps": 720}}))
    real_data.refuse_another(run, Settings(), tmp_path)
    with pytest.raises(ValueError, match="'model': 'smollm2'.*expected .*'gpt2'.* another --out"):
        real_data.refuse_another(run, Settings(model="gpt2"), tmp_path)
    with pytest.raises(ValueError, match="'lr': 0.001}.*'lr': '0.002'}"):
        real_data.refuse_another(run._replace(flags=("--lr", "0.002")), Settings(), tmp_path)


def test_texts_of_a_part_are_not_those_of_all(tmp_path):
    """Would catch: after a call with --limit 6, six texts scored as the whole test set."""
    folders = {real_data.folder_of_texts(tmp_path, Settings(limit=limit), beams)
               for limit in (0, 6) for beams in (False, True)}
    assert len(folders) == 4


def test_a_row_without_the_score_that_decides_is_not_kept():
    """Would catch: a missing package that leaves "not run yet" in the results for ever."""
    real_data.check_score(Run("webnlg", "a", "webnlg"), {"all": {"BLEU": 1.0}})
    real_data.check_score(Run("scitldr", "a", "scitldr"), {"all": {"R-L": 1.0}})
    for data, scores in (("webnlg", {}), ("scitldr", {"BLEU": 1.0}), ("e2e", {"R-L": 1.0})):
        with pytest.raises(ValueError, match="got no .* which decides; .*run the same command"):
            real_data.check_score(Run("", "a", data), {"all": scores})


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


def test_a_line_of_something_else_is_told(tmp_path):
    """Would catch: "KeyError: 'name'", which nobody expected."""
    rows = tmp_path / "rows.jsonl"
    for line in ({"group": "main"}, {"name": "x", "model": "gpt2"}):
        rows.write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match="no JSON object with name, group .*mend it, or name"):
            real_data.main(["--out", str(tmp_path), "--results", str(rows)])
        assert json.loads(rows.read_text()) == line


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "3"])
def test_a_row_that_is_no_object_is_an_error_and_not_a_cut(tmp_path, line):
    """Would catch: a traceback from JSON without end; a damaged line that is dropped in silence."""
    (tmp_path / "rows.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match="a line of which is no JSON object.*mend it, or name"):
        read_rows(tmp_path / "rows.jsonl")


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
            Run("main", "e2e-finetune", "low-50-1", ("--method", "finetune", "--share-source",
                                                     "3", *few), True)]
    monkeypatch.setattr(real_data, "plan", lambda rows: runs)
    monkeypatch.setenv("PATH", "")      # no Java: METEOR takes ten seconds, and has its own tests
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


# ---- verdicts and page

GROUP_OF = {"e2e": "main", "template": "untrained", "layers": "layers", "length": "length",
            "low": "low", "webnlg": "webnlg", "full": "full", "tried": "tried", "seeds": "seeds"}


def made_rows(scores):
    """Rows of a results file with these scores: {name: BLEU, or {part: BLEU}}."""
    rows = []
    for name, score in scores.items():
        parts = score if isinstance(score, dict) else {"all": score}
        found = {part: {"BLEU": x} for part, x in parts.items()}
        rows.append({"name": name, "group": "seeds" if "-seed-" in name else
                     GROUP_OF[name.split("-")[0]], "data": "webnlg" if "webnlg" in name
                     else "e2e", "greedy": found, "beams": found, "model": "smollm2", "limit": 0,
                     "machine": "a machine", "torch": "2", "date": "today", "lr": 1e-3,
                     "texts": [["name : A", "A | b"]]})
    return rows


LOW = {f"low-{size}-{part}-{method}": size / 10 + gap
       for size in (50, 100) for part in (1, 2)
       for method, gap in (("prefix-words", 3), ("prefix-uniform", 0), ("finetune", 2.5))}
ALL = {"e2e-prefix": 64, "e2e-finetune": 65, "length-1": 50, "length-100": 62, "layers-30": 60,
       "layers-20": 58.9, **LOW,
       "webnlg-prefix": {"all": 40, "seen": 44, "unseen": 36},
       "webnlg-finetune": {"all": 42, "seen": 47, "unseen": 37}}


def found(scores):
    results = draw_real_data.Results(made_rows(scores))
    return [verdict for _, _, verdict in draw_real_data.verdicts(results)]


def test_verdicts_are_those_of_the_protocol():
    """Would catch: a limit of one BLEU that counts on the wrong side, methods exchanged."""
    assert found(ALL) == ["in part", "does not hold", "in part", "holds", "holds", "does not hold"]
    better = ALL | {"webnlg-finetune": {"all": 41, "seen": 40, "unseen": 34.9}, "layers-20": 59,
                    **{name: 5 for name in LOW if "finetune" in name}}
    assert found(better) == ["holds", "holds", "holds", "holds", "holds", "holds"]
    one = ALL | {name: 20 for name in LOW if "uniform" in name and "100" in name}
    assert found(one | {name: 1 for name in LOW if "50-" in name and "finetune" in name})[1:4] == [
        "in part", "in part", "in part"]
    behind = ALL | {name: 20 if "100" in name else 1 for name in LOW if "finetune" in name}
    assert found(behind)[1] == "does not hold"
    weak = ALL | {"webnlg-prefix": {"all": 15, "seen": 20, "unseen": 10},
                  "webnlg-finetune": {"all": 52, "seen": 57, "unseen": 46.9}}
    assert found(weak)[2] == "does not hold"            # it loses less, but by a tenth only


def test_a_gap_of_one_is_none_whatever_the_floats():
    """Would catch: 31.02 - 32.02 = -1.0000000000000036, more than one behind."""
    for ours, other in ((63.74, 64.74), (31.02, 32.02), (0.1, 1.1)):
        assert draw_real_data.more_than_one(ours - other) == 0
        assert draw_real_data.more_than_one(other - ours) == 0
        assert draw_real_data.more_than_one(ours - 0.01 - other) == -1


def test_three_seeds_decide_where_both_have_them():
    """Would catch: a mean of the seeds that one side has, the first seed alone."""
    seeds = {"e2e-prefix-seed-102": 61, "e2e-prefix-seed-103": 61.1, "e2e-finetune-seed-102": 63}
    near = ALL | {"webnlg-finetune": ALL["webnlg-prefix"]}
    assert found(near)[0] == found(near | seeds)[0] == "holds"
    assert found(near | seeds | {"e2e-finetune-seed-103": 63})[0] == "in part"


def test_rows_of_other_groups_decide_nothing_and_names_are_unique():
    """Would catch: a run beside the protocol in the place of one of it; the last of two rows."""
    rows = made_rows(ALL)
    other = rows[0] | {"group": "tried", "beams": {"all": {"BLEU": 1}}}
    with pytest.raises(ValueError, match="more than one row of e2e-prefix"):
        draw_real_data.Results([*rows, rows[0]])
    waits = draw_real_data.Results([other, *rows[1:]])
    assert [verdict for *_, verdict in draw_real_data.verdicts(waits)][0] == "not run yet"
    full = [row | {"name": f"full-{row['name']}", "group": "full"} for row in rows]
    assert next(draw_real_data.verdicts(draw_real_data.Results(full)))[2] == "in part"


def test_a_row_shows_the_score_that_decides():
    row = {"name": "scitldr-prefix", "data": "scitldr", "greedy": {"all": {"BLEU": 7, "R-L": 33}},
           "beams": False}
    assert "| R-L 33.0 |" in draw_real_data.run_line(row)


def test_what_was_not_run_has_no_verdict(tmp_path, capsys):
    """Would catch: a verdict from half the runs; a page that is lost; a picture without points."""
    rows = made_rows({name: score for name, score in ALL.items() if "100" not in name})
    page, results = tmp_path / "page.md", tmp_path / "rows.jsonl"
    page.write_text("before\n<!-- results -->\nearlier words\n<!-- end of results -->\nafter")
    write_rows(results, [*rows, {"name": "x", "model": "gpt2", "limit": 0}])
    words = ["--results", str(results), "--page", str(page), "--picture", str(tmp_path / "a.png")]
    draw_real_data.main(words)
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter") and "earlier" not in text
    verdict = [line.split("| ")[-1] for line in text.splitlines() if line[:3] in ("| 2", "| 5")]
    assert verdict == ["**not run yet** |"] * 2
    assert "| webnlg-prefix | 0.001 |  |  | 44.0 / 36.0 / 40.0 |" in text
    assert "- `name : A`<br>A | b" in text and "62.9 / 45.6 / 55.1" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for its tables; expected <!-- results -->"):
        draw_real_data.main(words)
    with pytest.raises(ValueError, match="without runs of gpt2-xl on whole test sets"):
        draw_real_data.main([*words, "--model", "gpt2-xl"])


def test_first_texts_are_of_unseen_categories(tmp_path):
    """Would catch: texts about topics that training has, shown as those of new ones."""
    rows = [{"about": 1}, {"source": "a", "topic": "Food", "text": "b"},
            {"source": "c", "topic": "Artist", "text": "d"}]
    write_rows(tmp_path / "test.jsonl", rows)
    assert real_data.first_texts(tmp_path / "test.jsonl", "webnlg") == [["c", "d"]]
    assert real_data.first_texts(tmp_path / "test.jsonl", "e2e", 1) == [["a", "b"]]
