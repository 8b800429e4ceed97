"""Decode, keep every text, score every part. The scores themselves: test_scores.py."""
import json
from pathlib import Path

import pytest
import torch
from conftest import random_gpt2

import sample
from data import tasks
from data.example import Example
from pretrained import checkpoint
from pretrained.load import load_model
from pretrained.run_directory import save_prefix
from scripts import evaluate, scores


def test_a_file_called_like_the_world_is_not_the_world(run, monkeypatch, capsys):
    """Would catch: an own file scored by the values of a table that it does not have."""
    data = run.parent / "worldly.jsonl"
    data.write_text((run.parent / "my.test.jsonl").read_text())
    data.with_name("worldly.test.jsonl").write_text((run.parent / "my.test.jsonl").read_text())
    monkeypatch.chdir(run.parent)
    evaluated(run, monkeypatch, "--data", "worldly.jsonl")
    assert "slots" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ["[1]", "3", '{"text": "x"}', '{"source": 5, "text": "x"}',
                                  '{"source": "n : 0"}', '{"source": "n : 0", "text": 5}', "junk"])
def test_foreign_lines_in_the_file_of_a_split_are_one_sentence(tmp_path, line):
    """Would catch: an AttributeError or a KeyError, after all is decoded or before."""
    example, about = Example("n : 0", ("x",), ""), {"data": "x"}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(about) + "\n" + line + "\n" + json.dumps(about) + "\n")
    with pytest.raises(ValueError, match="got .*test.jsonl, .*; expected .*; ") as caught:
        evaluate.saved_outputs(path, about, [example])
    assert "\n" not in str(caught.value)
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="got .*test.jsonl, .*; expected .*; "):
        evaluate.saved_outputs(path, about, [example])


def test_seen_and_unseen_are_parted_by_topic():
    """Would catch: the parts exchanged, or a text that is in neither."""
    topics = ["Airport", "Artist", "Food", "Athlete", "Airport"]
    examples = [Example("s", ("t",), topic) for topic in topics]
    found = evaluate.parts_of("webnlg", examples, topics=True)
    assert found["all"] == [0, 1, 2, 3, 4]
    assert found["seen"] == [0, 2, 4] and found["unseen"] == [1, 3]
    assert found["Airport"] == [0, 4] and found["Artist"] == [1]
    assert evaluate.parts_of("e2e", examples, topics=False) == {"all": [0, 1, 2, 3, 4]}
    without = [Example("s", ("t",)) for _ in topics]        # no second row that is the first
    assert evaluate.parts_of("e2e", without, topics=True) == {"all": [0, 1, 2, 3, 4]}


def test_no_topic_takes_the_place_of_a_total():
    """Would catch: the score of one topic under the name of all, texts without a topic lost."""
    topics = ["all", "seen", "Food", "", "no topic", "topic all", "unseen"]
    examples = [Example("s", ("t",), topic) for topic in topics]
    found = evaluate.parts_of("webnlg", examples, topics=True)
    assert found["all"] == list(range(7)) and found["seen"] == [2]
    assert found["unseen"] == [0, 1, 3, 4, 5, 6]
    assert found["topic all"] == [0] and found["topic seen"] == [1] and found["Food"] == [2]
    assert found["no topic"] == [3] and found["topic no topic"] == [4]
    assert found["topic topic all"] == [5] and found["topic unseen"] == [6]
    assert evaluate.parts_of("own.jsonl", examples, topics=True)["seen"] == [1]


def test_what_is_missing_has_a_dash_and_a_reason(run, monkeypatch, capsys):
    """Would catch: a column left out without a word, a reason told once for every topic."""
    def some_fail(outputs, references, rule):
        if len(outputs) < 2:
            raise ValueError("one text is too few")
        return {"X": 1.0}

    def fails(*_):
        raise OSError("no such machine")
    monkeypatch.setattr(scores, "SCORERS", {"Y Z": fails, "X": some_fail})
    evaluate.main(["--run", str(run), "--device", "cpu", "--max-new-tokens", "6", "--topics"])
    told = capsys.readouterr()
    table = [line.split() for line in told.out.splitlines() if line[:3] in ("   ", "all", "b  ")]
    assert table == [["sources", "X", "Y", "Z"], ["all", "3", "1.00", "-", "-"],
                     ["b", "1", "-", "-", "-"]]
    assert "no Y, Z: no such machine\n" in told.err
    assert "no X for b: one text is too few\n" in told.err
    found = json.loads((run / "test.scores.json").read_text())["scores"]
    assert found == {"all": {"tables": 3, "X": 1.0}, "a": {"tables": 2, "X": 1.0},
                     "b": {"tables": 1}}


def test_the_real_test_set_has_its_published_parts(real_data):
    """WebNLG: 971 entries are seen, 891 unseen. Would catch: a category on the wrong side."""
    found = evaluate.parts_of("webnlg", tasks.load("webnlg", "test", real_data), topics=True)
    assert {name: len(found[name]) for name in ("all", "seen", "unseen")} == {
        "all": 1862, "seen": 971, "unseen": 891}
    assert len(found) == 3 + 15


@pytest.fixture
def run(tmp_path, model_directory):
    """A run on disk with a random prefix, and its data: six tables to train and three to test."""
    rows = [{"source": f"n : {i}", "target": [f"it is {i}", f"this is {i}"], "topic": "ab"[i % 2]}
            for i in range(9)]
    for name, part in (("my.jsonl", rows[:6]), ("my.test.jsonl", rows[6:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    model = load_model(str(model_directory), "cpu", "fp32")[0]
    torch.manual_seed(1)
    save_prefix(tmp_path / "run" / "prefix.pt", torch.randn(3, 2, 1, 4, 4, 6), model)
    about = {"settings": {"model": str(model_directory), "data": str(tmp_path / "my.jsonl"),
                          "data_dir": ""}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    return tmp_path / "run"


def evaluated(run, monkeypatch, *flags):
    """Call the program; the scorers are left out, they have their own tests and take seconds."""
    monkeypatch.setattr(scores, "SCORERS", {})
    evaluate.main(["--run", str(run), "--device", "cpu", "--max-new-tokens", "6", "--batch-size",
                   "2", *flags])
    return [json.loads(line) for line in (run / "test.jsonl").read_text("utf-8").splitlines()]


def test_a_stopped_evaluation_goes_on_where_it_was(run, monkeypatch, capsys):
    """Would catch: texts decoded again, or kept although the run or the flags have changed."""
    rows = evaluated(run, monkeypatch)
    assert len(rows) == 4 and [row["source"] for row in rows[1:]] == ["n : 6", "n : 7", "n : 8"]
    path = run / "test.jsonl"
    lines = path.read_text("utf-8").splitlines()
    # As a kill leaves it: two texts, of which the second is cut off; the first was changed by hand,
    # so that it can be told from a new one.
    first = json.loads(lines[1]) | {"text": "kept"}
    path.write_bytes(f"{lines[0]}\n{json.dumps(first)}\n{lines[2][:20]}".encode() + b"\xc3")
    again = evaluated(run, monkeypatch)
    assert [row["text"] for row in again[1:]] == ["kept"] + [row["text"] for row in rows[2:]]
    assert len(evaluated(run, monkeypatch, "--examples", "2")) == 4     # all texts stay
    assert json.loads((run / "test.scores.json").read_text())["scores"]["all"]["tables"] == 2
    with pytest.raises(ValueError, match="another num_beams .1, now 3., min_new_tokens .0, now 1.; "
                                         "expected"):
        evaluated(run, monkeypatch, "--num-beams", "3", "--min-new-tokens", "1")
    model = load_model(json.loads((run / "config.json").read_text())["settings"]["model"],
                       "cpu", "fp32")[0]
    data = Path(run).parent / "my.test.jsonl"
    data.write_text("\n".join(data.read_text().splitlines()[::-1]))
    with pytest.raises(ValueError, match="text 1 is about 'n : 6'; expected 'n : 8'"):
        evaluated(run, monkeypatch)
    save_prefix(run / "prefix.pt", torch.zeros(3, 2, 1, 4, 4, 6), model)
    with pytest.raises(ValueError, match="decoded with another prefix"):
        evaluated(run, monkeypatch)
    capsys.readouterr()


def test_references_that_change_are_the_stored_ones(run, monkeypatch):
    """Would catch: scores of new references beside a file that shows the old ones."""
    evaluated(run, monkeypatch)
    data = Path(run).parent / "my.test.jsonl"
    data.write_text(data.read_text().replace("this is 7", "seven").replace('"b"', '"new"'))
    rows = evaluated(run, monkeypatch)
    assert rows[2]["references"] == ["it is 7", "seven"] and rows[2]["topic"] == "new"
    assert rows[1]["references"] == ["it is 6", "this is 6"] and rows[2]["source"] == "n : 7"


@pytest.mark.parametrize("lines", ['{"a": 1}\n{"x": 1}', '{"a": 1}\nnull', "5\n",
                                   '{"a": 1}\n{"source": "s", "text": 3}'])
def test_texts_of_another_program_are_refused(tmp_path, lines):
    """Would catch: a traceback for a line that is JSON and no text of ours."""
    (tmp_path / "test.jsonl").write_text(lines + "\n")
    with pytest.raises(ValueError, match="no source or no text|is no JSON object"):
        evaluate.decode(None, [Example("s", ("t",))], tmp_path / "test.jsonl", {"a": 1}, 1)


def test_two_sources_that_begin_alike_are_told_apart(tmp_path):
    """Would catch: a message that says that it got what it expected."""
    begin = "name : a very long name of a restaurant | food : "
    row = json.dumps({"source": begin + "Thai", "text": "t"})
    (tmp_path / "test.jsonl").write_text('{"a": 1}\n' + row + "\n")
    with pytest.raises(ValueError, match=r"about '\.\.\..* : Thai'; expected '.* : Italian'"):
        evaluate.decode(None, [Example(begin + "Italian", ("t",))], tmp_path / "test.jsonl",
                        {"a": 1}, 1)


def test_a_fine_tuned_model_that_has_learned_on_is_not_scored_with_old_texts(run, monkeypatch):
    """Would catch: old texts under new scores; such a run has no prefix whose digest would differ.
    """
    (run / "prefix.pt").unlink()
    checkpoint.save(random_gpt2(seed=1).float(), run / "model")
    evaluated(run, monkeypatch)
    checkpoint.save(random_gpt2(seed=2).float(), run / "model")
    with pytest.raises(ValueError, match="decoded with another model"):
        evaluated(run, monkeypatch)


def test_the_program_writes_texts_and_scores(run, monkeypatch, capsys):
    """Would catch: scores of another split, a part that is missing, references not kept."""
    rows = evaluated(run, monkeypatch, "--topics", "--beam", "2")
    assert rows[0]["split"] == "test" and rows[0]["num_beams"] == 2 and rows[0]["dtype"] == "fp32"
    assert rows[1]["references"] == ["it is 6", "this is 6"] and rows[1]["topic"] == "a"
    found = json.loads((run / "test.scores.json").read_text())
    assert {k: v["tables"] for k, v in found["scores"].items()} == {"all": 3, "a": 2, "b": 1}
    assert "all" in capsys.readouterr().out


def test_each_part_is_scored_on_its_own_texts_by_the_rule_of_its_data(run, monkeypatch):
    """Would catch: texts of other tables, E2E's rule for all, flags that decoding never gets."""
    about = json.loads((run / "config.json").read_text())
    data, folder = about["settings"]["data"], str(run.parent)
    about["settings"] |= {"data": "dart", "data_dir": folder}
    (run / "config.json").write_text(json.dumps(about))
    examples, calls, rules = tasks.load(data, "test"), [], []
    monkeypatch.setattr(tasks, "load", lambda *given, keys: calls.append(given) or examples)

    def generate(generator, sources, runs=None):
        assert generator.settings.length_penalty == 0.5
        return [f"it is {source[-1]}" for source in sources]
    monkeypatch.setattr(sample.Generator, "generate", generate)

    def right(outputs, references, rule):
        rules.append(rule)
        return {"right": sum(text in some for text, some in zip(outputs, references, strict=True))}
    monkeypatch.setattr(scores, "SCORERS", {"right": right})
    evaluate.main(["--run", str(run), "--device", "cpu", "--topics", "--length-penalty", "0.5",
                   "--beam", "2", "--max-new", "6"])
    found = json.loads((run / "test.scores.json").read_text())["scores"]
    assert {part: numbers["right"] for part, numbers in found.items()} == {
        "all": 3, "a": 2, "b": 1}
    assert calls == [("dart", "test", folder)] and set(rules) == {scores.RULES["dart"]}


def test_no_run_and_no_test_set_are_errors_of_one_sentence(run, monkeypatch):
    """Would catch: a traceback."""
    with pytest.raises(ValueError, match="got no --run; expected"):
        evaluate.main([])
    Path(run).parent.joinpath("my.test.jsonl").unlink()
    with pytest.raises(ValueError, match="got no test split"):
        evaluated(run, monkeypatch)
