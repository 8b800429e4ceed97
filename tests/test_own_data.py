"""Your own data in every form that is read, and what a bundled model says of them."""
import csv
import gzip
import json
import shutil

import pytest
from conftest import ROOT

import train
from data import own
from data.example import Example
from data.requests import answer_line, read_requests
from data.tasks import load, train_and_dev
from data.toy_world.tables import task
from data.toy_world.text import known_share
from pretrained.run_directory import names_of

ROWS = [("a, b", 'the "first"'), ("c", "two\nlines"), ("a, b", "third"), ("d\te", "fourth £")]


def write_form(path, rows=ROWS, names=("source", "target")):
    """`rows` as the ending of `path` says, packed where it ends in .gz."""
    suffix = own.suffix_of(path)
    if suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",").writerows([names, *rows])
    else:
        objects = [json.dumps(dict(zip(names, row))) for row in rows]
        text = f"[{', '.join(objects)}]" if suffix == ".json" else "\n".join(objects)
        path.write_text(text, encoding="utf-8")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("name", ["my.jsonl", "my.json", "my.csv"])
@pytest.mark.parametrize("empty", ["train", "dev"])
def test_a_file_without_a_row_is_named(tmp_path, name, empty):
    """Would catch: "division by zero" and "expects a non-empty TensorList", or a file of others."""
    path = tmp_path / name
    dev = path.with_name(f"my.dev{path.suffix}")
    for split, file in (("train", path), ("dev", dev)):
        write_form(file, [] if split == empty else ROWS)
    wrong = path if empty == "train" else dev
    with pytest.raises(ValueError, match=f"{wrong.name}: got (no example|an empty file), exp"):
        train_and_dev(str(path))


@pytest.mark.parametrize("name", ["my.jsonl", "my.JSONL", "my.json", "my.csv", "my.tsv",
                                  "my.CSV.gz"])
def test_all_forms_hold_the_same_pairs(tmp_path, name):
    """Would catch: a quoted comma that cuts a text, a dev file in another form that is not seen and
    a tenth held out in its place.
    """
    path = write_form(tmp_path / name, names=("text", "summary"))
    write_form(tmp_path / "my.dev.csv", [("x", "y")], ("text", "summary"))
    found = {split: load(str(path), split, keys=("text", "summary")) for split in ("train", "dev")}
    assert found["train"] == [Example("a, b", ('the "first"', "third")),
                              Example("c", ("two\nlines",)), Example("d\te", ("fourth £",))]
    assert found["dev"] == [Example("x", ("y",))]
    assert own.name_of(path) == "my"


def test_a_json_file_may_hold_json_lines(tmp_path):
    """As many a download does. Would catch: "Extra data"."""
    path = write_form(tmp_path / "my.jsonl").rename(tmp_path / "my.json")
    write_form(tmp_path / "my.dev.jsonl")
    assert len(load(str(path), "train")) == 3


def test_a_folder_has_a_file_for_each_split(tmp_path):
    """Would catch: train.csv passed over, and a dev set cut from it although there is one."""
    write_form(tmp_path / "train.csv")
    write_form(tmp_path / "validation.json", ROWS[:1])
    assert [len(load(str(tmp_path), split)) for split in ("train", "dev")] == [3, 1]
    with pytest.raises(ValueError, match="no test split for .*, expected test.jsonl in it; put"):
        load(str(tmp_path), "test")
    (tmp_path / "validation.json").unlink()
    assert [len(load(str(tmp_path), split)) for split in ("train", "dev")] == [2, 1]
    (tmp_path / "train.csv").unlink()
    with pytest.raises(ValueError, match="no dev split for .*, expected dev.jsonl in it"):
        load(str(tmp_path), "dev")


@pytest.mark.parametrize("text", [
    "id;source;target\n1;a, b;c\n2;d;e, f\n", '"id";"source";"target"\n1;"a, b";c\n2;d;"e, f"\n',
    "\ufeff\n\nid\tsource\ttarget\r\n1\ta, b\tc\r\n2\td\te, f\r\n",
    'id,"source",target\n1,"a, b",c\n2,d,"e, f"\n',
    'source,"x;y;z;w",target\n"a, b",,c\nd,,"e, f"\n'])
def test_a_csv_file_may_have_semicolons_or_tabs(tmp_path, text):
    """As a spreadsheet writes it where the comma is the decimal point. Would catch: one column of
    everything; a comma in a text, or semicolons in a name, that are taken for the columns' ends.
    """
    (tmp_path / "my.csv").write_bytes(text.encode())
    write_form(tmp_path / "my.dev.csv")
    assert load(str(tmp_path / "my.csv"), "train") == [Example("a, b", ("c",)),
                                                       Example("d", ("e, f",))]
    assert [source for source, _ in read_requests(tmp_path / "my.csv", [])] == ["a, b", "d"]


@pytest.mark.parametrize("name, text", [
    ("my.csv", "id;table;target\n1;a;b\n"), ("my.tsv", "id\ttable\ttarget\n1\ta\tb\n"),
    ("my.jsonl", '{"id": 1, "table": "a", "target": "b"}'),
    ("my.json", '[{"id": 1, "table": "a", "target": "b"}]')])
def test_a_mistyped_column_is_answered_with_the_nearest(tmp_path, name, text):
    """Would catch: an advice to rename, for a letter in the wrong place of a flag."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"\['id', 'table', 'target'\], expected .*; did you "
                                         "mean table[?] rename"):
        load(str(tmp_path / name), "train", keys=("tabel", "target"))


@pytest.mark.parametrize("name, text, words", [
    ("my.csv", "article,summary\na,b\n", r"line 1: got the columns \['article', 'summary'\], "
     "expected source and target among them; .*--source-key and --target-key"),
    ("my.csv", "source,target\na,b\na,b,c\n", "line 3: got 3 fields"),
    ("my.csv", "", r"got the columns \[\], expected source and target"),
    ("my.json", '[{"source": "a", "target": "b"}, 3]', "entry 2: got a int, 3, expected an object"),
    ("my.jsonl", '{"text": "a"}', "line 1: got the keys .*--source-key and --target-key"),
    ("my.xlsx", "", r"convert it, as with `python -c 'import pandas; pandas.read_excel"),
    ("my.txt", "a\tb\n", r"read_table\(.*\).to_csv\(.*my.csv.*, index=False\)'`"),
])
def test_what_is_not_plain_is_answered_with_the_next_step(tmp_path, name, text, words):
    """Would catch: a traceback, a column that is guessed, an advice without its command."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / name), "train")


def test_the_run_is_called_as_the_data_and_its_sources_are_read_as_they_were(tmp_path):
    """Would catch: out/tiny-gpt2-my.csv; sources that sample.py looks for under another name."""
    args = train.Settings(data=str(tmp_path / "my.csv.gz"))
    assert next(iter(names_of(args))) == "out/tiny-gpt2-my"
    path = write_form(tmp_path / "in.csv", names=("text", "summary"))
    assert [source for source, _ in read_requests(path, ["r"], "text")] == ["a, b", "c", "a, b",
                                                                             "d\te"]


def test_a_run_is_found_with_or_without_a_slash_at_its_end(tmp_path):
    """Would catch: `--run out/A/`, as a shell completes it, that no line of the file can name."""
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"source": "x", "run": run})
                              for run in ("out/A", "out/A/", "A", "B/")))
    found = [run for _, run in read_requests(path, ["out/A/", "out/B"])]
    assert found == ["out/A/"] * 3 + ["out/B"]
    path.write_text('{"source": "x", "run": 3}')
    with pytest.raises(ValueError, match="got the run 3"):
        list(read_requests(path, ["out/A/", "out/B"]))


def test_answers_are_lines():
    """Would catch: a text of two lines that shifts all that come after it."""
    assert answer_line("x", "a\nb") == "a b\n"
    assert json.loads(answer_line("x", "a\nb", "A", True)) == {"source": "x", "text": "a\nb",
                                                               "run": "A"}


def test_the_toy_says_what_it_is_for(tmp_path, monkeypatch, capsys):
    """Would catch: own texts that come out empty, and nobody knows why; the same said of the toy's
    own world, or of another model.
    """
    monkeypatch.chdir(tmp_path)
    write_form(tmp_path / "my.csv", [(f"Der Zug hielt {i}", "There is a bridge") for i in range(9)])
    train.main(["--data", "my.csv", "--steps", "1", "--batch-size", "2", "--device", "cpu",
                "--out", "my run"])
    out = capsys.readouterr().out
    assert "tiny-gpt2 is a toy" in out and "take a real model, --model smollm2" in out
    assert "knows 50% of the words of my.csv" in out
    assert "decode with: python sample.py --run 'my run' 'Der Zug hielt " in out
    before, after = out.split("the frozen model without a prefix has ")
    assert before.endswith("lower is better; ") and float(after.split("\n")[0]) > 3
    shutil.copytree(ROOT / "weights/tiny-gpt2", tmp_path / "another")
    for more in (["--data", "my.csv", "--model", "another"], ["--examples", "3"]):
        train.main([*more, "--steps", "1", "--dev-pairs", "2", "--device", "cpu"])
        assert "is a toy" not in capsys.readouterr().out


def test_the_share_of_words_that_the_toy_knows():
    """Would catch: a share of letters or lines, or one of a list that lacks the world's words."""
    assert known_share(["There IS a bridge,", "Zug Zug"]) == pytest.approx(4 / 6)
    texts = [text for example in task("near", "dev", 50) for text in example.targets]
    assert 0.8 < known_share(texts) < 1     # the names of the dev set were made up for it


def test_a_file_without_rows_is_told(tmp_path):
    """Would catch: "0 pairs, every one with a target too long" for a table that has only names."""
    for name, text in (("a.csv", "source,target\n"), ("b.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: got no example, expected at least one"):
            own.load(str(tmp_path / name), ("train", "dev"), 0)
