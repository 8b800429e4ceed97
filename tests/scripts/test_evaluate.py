"""Scores come from others' packages: what they get, and what is kept on disk."""
import json
import shutil
import sys
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

OFFICIAL = {"BLEU": 72.03, "ROUGE-L": 79.10, "CIDEr": 2.304}    # e2e-metrics on its own example


def need(*packages):
    for package in packages:
        pytest.importorskip(package, reason=f"a score needs it: pip install {package}")


@pytest.fixture(scope="module")
def example(real_data):
    """The official scorer's own texts and references."""
    folder = real_data / "metrics" / "e2e"
    if not folder.is_dir():
        pytest.skip("put e2e-metrics' example-inputs into metrics/e2e/ of the data to run this")
    texts = (folder / "e2e_example.out.txt").read_text("utf-8").splitlines()
    blocks = (folder / "e2e_example.ref.txt").read_text("utf-8").strip().split("\n\n")
    return texts, [block.splitlines() for block in blocks]


def test_the_official_example_has_its_official_scores(example, monkeypatch):
    """BLEU, ROUGE-L and CIDEr to the digits that are published. NIST differs: see `nltk_scores`.

    Would catch: another case or tokenisation, references in the wrong place or left out.
    """
    need("sacrebleu", "nltk")
    monkeypatch.delitem(scores.SCORERS, "METEOR")     # takes half a minute to start
    numbers, missing = scores.score(*example, scores.RULES["e2e"])
    for name in OFFICIAL:
        if name in numbers:
            assert abs(numbers[name] - OFFICIAL[name]) < 0.005, name
    assert "BLEU" in numbers and 6.2 < numbers["NIST"] < 7.79
    if "ROUGE-L and CIDEr" in missing:
        pytest.skip("BLEU was compared; for ROUGE-L and CIDEr install pycocoevalcap and Java")
    assert OFFICIAL.keys() <= numbers.keys()


def test_webnlg_is_scored_on_lower_cased_ascii_words_and_three_references():
    """Would catch: an accent, a capital or a fourth reference that decides."""
    need("sacrebleu", "unidecode")
    rule = scores.RULES["webnlg"]
    assert scores.prepare("José's  (Café)", rule) == "jose ' s ( cafe )"
    assert scores.prepare("José's", scores.RULES["dart"]) == "josé ' s"
    wrong = "nothing of this fits at all"
    text, same = ["Ålesund lies in Norway, (Europe)"], "alesund lies in norway , ( europe )"
    for references, bleu in (([wrong, wrong, same], 100), ([wrong, wrong, wrong, same], 0)):
        numbers = scores.sacrebleu_scores(
            [scores.prepare(t, rule) for t in text],
            [[scores.prepare(r, rule) for r in references[:rule.references]]], rule)
        assert abs(numbers["BLEU"] - bleu) < 1e-9


def test_the_best_of_several_references_counts():
    """Would catch: only the first reference compared, or a text with another's references."""
    need("sacrebleu", "rouge_score")
    texts = ["the red ship sails today", "a small bridge was built here"]
    references = [["something else is here", texts[0], "no"], [texts[1]]]
    assert scores.sacrebleu_scores(texts, references, scores.Rule())["BLEU"] > 99.99
    assert scores.rouge_scores(texts, references, scores.Rule())["R-2"] > 99.99
    swapped = scores.sacrebleu_scores(texts, references[::-1], scores.Rule())
    assert swapped["BLEU"] < 5


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\u2028"])
def test_a_line_break_in_a_reference_moves_no_other(line_break):
    """Would catch: a tokenizer that takes each line for a text, and all later ones for others."""
    need("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("METEOR, ROUGE-L and CIDEr need Java")
    texts = ["the cat sat on the mat", "a dog ran over the hill"]
    references = [[f"the cat sat{line_break}on the mat"], ["a dog ran over the hill"]]
    both = scores.treebank(texts, references, scores.Rule())
    assert both == 2 * [{0: [texts[0]], 1: [texts[1]]}]


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


def test_a_missing_package_is_named_and_the_others_are_shown(monkeypatch):
    """Would catch: an evaluation that ends after hours of decoding for want of one package."""
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)             # no Java
    texts = ["the red ship sails from the port today"]
    numbers, missing = scores.score(texts, [texts])
    assert missing["R-1, R-2 and R-L"] == "rouge_score" and "R-1" not in numbers
    assert missing["METEOR"] in ("java", "pycocoevalcap") and "METEOR" not in numbers
    need("sacrebleu")
    assert numbers["BLEU"] > 99.99


def test_seen_and_unseen_are_parted_by_topic():
    """Would catch: the parts exchanged, or a text that is in neither."""
    topics = ["Airport", "Artist", "Food", "Athlete", "Airport"]
    examples = [Example("s", ("t",), topic) for topic in topics]
    found = evaluate.parts_of("webnlg", examples, topics=True)
    assert found["all"] == [0, 1, 2, 3, 4]
    assert found["seen"] == [0, 2, 4] and found["unseen"] == [1, 3]
    assert found["Airport"] == [0, 4] and found["Artist"] == [1]
    assert evaluate.parts_of("e2e", examples, topics=False) == {"all": [0, 1, 2, 3, 4]}


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


def test_two_sources_that_begin_alike_are_told_apart(tmp_path):
    """Would catch: a message that shows the same words as got and as expected."""
    path, long = tmp_path / "test.jsonl", "name : a very long name of a restaurant | food : "
    path.write_text('{"a": 1}\n' + json.dumps({"source": long + "Thai", "text": "t"}))
    with pytest.raises(ValueError, match="about '.* food : Thai'; expected '.* food : Italian'"):
        evaluate.decode(None, [Example(long + "Italian", ("t",))], path, {"a": 1}, 1)


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
    monkeypatch.setattr(tasks, "load", lambda *given: calls.append(given) or examples)

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


def test_words_are_compared_by_their_stems():
    """Would catch: rouge-score without its stemmer, a mean over something else than the texts."""
    need("rouge_score")
    found = scores.rouge_scores(["the ships sail", "a b", "c"],
                                [["the ship sailed"], ["x"], ["y"]], scores.Rule())
    assert found["R-1"] == pytest.approx(100 / 3)


def test_no_run_and_no_test_set_are_errors_of_one_sentence(run, monkeypatch):
    """Would catch: a traceback."""
    with pytest.raises(ValueError, match="got no --run; expected"):
        evaluate.main([])
    Path(run).parent.joinpath("my.test.jsonl").unlink()
    with pytest.raises(ValueError, match="got no test split"):
        evaluated(run, monkeypatch)
