"""What is no text is no example: every reader's rows pass one check, and a message stays short.

The forms of the files are in test_data.py and test_summaries.py.
"""
import bz2
import gzip
import itertools
import json
import lzma
import os
import zipfile

import pytest
from test_data import webnlg_json, write

from data import example, formats, summaries
from data.example import LONGEST_BLANK, Example, examples
from data.requests import read_requests
from data.tasks import load
from data.tokenizer import load_tokenizer

TRIPLE = [("A", "is", "B")]
DART = "dart-v1.1.1-full-dev.json"
NO_TEXTS = [None, 7, ["a"], {"text": "a"}, True, "", " \n", "\ud83d"]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)     # in ASCII: "\\ud83d" is legal there


def dart(text="A is B.", triples=(("A", "IS", "B"),)):
    return json.dumps([{"tripleset": triples, "annotations": [{"text": text}]}])


def xml(lex, head=""):
    return (f'{head}<benchmark><entries><entry category="City" eid="Id1"><modifiedtripleset>'
            f"<mtriple>A | is | B</mtriple></modifiedtripleset>{lex}</entry></entries></benchmark>")


def own(**changes):
    return jsonl({"source": "a", "target": "b"}, {"source": "c", "target": "d"} | changes)


def dialogue(**changes):
    return jsonl({"dialogue": "a", "summary": "b"} | changes)


# A file of each reader with `text` where a target stands, a source, a topic: name of the task, the
# file, its text.
PLACES = {
    "own target": ("", "my.jsonl", lambda text: own(target=[text])),
    "own source": ("", "my.jsonl", lambda text: own(source=text)),
    "webnlg target": ("webnlg", "dev.json",
                      lambda text: webnlg_json([("City", TRIPLE, [(text, "good")])])),
    "webnlg source": ("webnlg", "dev.json",
                      lambda text: webnlg_json([("City", [("A", "is", text)], [("b", "good")])])),
    "webnlg topic": ("webnlg", "dev.json",
                     lambda text: webnlg_json([(text, TRIPLE, [("b", "good")])])),
    "dart target": ("dart", DART, dart),
    "dart source": ("dart", DART, lambda text: dart(triples=[["A", "IS", text]])),
    "dart relation": ("dart", DART, lambda text: dart(triples=[["A", text, "B"]])),
    "dialogsum target": ("dialogsum", "dialogsum.dev.jsonl", lambda text: dialogue(summary=text)),
    "dialogsum source": ("dialogsum", "dialogsum.dev.jsonl", lambda text: dialogue(dialogue=text)),
    "scitldr target": ("scitldr", "scitldr_a_dev.jsonl",
                       lambda text: jsonl({"source": ["a"], "target": [text]})),
    "scitldr source": ("scitldr", "scitldr_a_dev.jsonl",
                       lambda text: jsonl({"source": [text], "target": ["b"]})),
}


def refusal(folder, name, file, text):
    """The message with which this file is refused; it is short, and begins with the place."""
    path = write(folder / file, text)
    with pytest.raises(ValueError) as caught:
        load(name or str(path), "train" if not name else "dev", None if not name else folder)
    message = str(caught.value)
    assert message.startswith(str(path)) or message.startswith(str(folder)), message
    assert "\n" not in message and "expected" in message
    assert len(message) - len(str(path)) < 320, "a message is read on a terminal"
    return message.removeprefix(str(path))


@pytest.mark.parametrize("no_text", NO_TEXTS, ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_text_is_refused_by_every_reader_with_its_place(tmp_path, place, no_text):
    """Would catch: "None" learned as a target, a list learned as its brackets, a number's digits;
    a prefix that learns to say nothing.
    """
    name, file, text = PLACES[place]
    message = refusal(tmp_path, name, file, text(no_text))
    if no_text in ("", " \n") and place in ("dart target", "scitldr target", "scitldr source"):
        assert "got no example" in message      # releases that are known to have blanks
    else:
        assert message.startswith(", line 2:" if not name else
                                  ", line 1:" if file.endswith(".jsonl") else ", entry 1:")


@pytest.mark.parametrize("topic", [7, 0, ["a"], {}, False, " "])
@pytest.mark.parametrize("name, file, text", [("", "my.jsonl", own),
                                              ("dialogsum", "dialogsum.dev.jsonl", dialogue)])
def test_a_topic_is_text_or_absent(tmp_path, name, file, text, topic):
    """Would catch: scores by a topic 7 that is no word, a traceback for a list in a set."""
    assert "got the topic" in refusal(tmp_path, name, file, text(topic=topic))
    for absent in ({}, {"topic": None}, {"topic": ""}):
        path = write(tmp_path / file, text(**absent))
        found = load(name or str(path), "dev", tmp_path if name else None)
        assert [e.topic for e in found] == [""]


@pytest.mark.parametrize("name, file, text, words", [
    ("dart", DART, dart(triples=["abc"]), "got the triples ['abc']"),
    ("dart", DART, dart(triples=[]), "got the triples []"),
    ("dart", DART, dart(triples="abc"), "got the triples 'abc'"),
    ("dart", DART, dart(triples=None), "got the triples None"),
    ("dart", DART, dart(triples=[["a", "b", "c", "d"]]), "got the triples"),
    ("webnlg", "dev/a.xml", xml('<lex comment="good"/>'), "entry Id1: got the target None"),
    ("webnlg", "dev/a.xml", xml('<lex comment="good"><text> </text></lex>'), "got the target ' '"),
    ("webnlg", "dev.json", webnlg_json([("City", [], [("b", "good")])]), "got the triples []"),
    ("scitldr", "scitldr_a_dev.jsonl", jsonl({"source": None, "target": ["b"]}), "another layout"),
    ("dialogsum", "dialogsum.dev.jsonl", jsonl({"dialogue": "a"}), "line 1: got no target"),
    ("", "my.jsonl", own(target=[]), "line 2: got no target"),
])
def test_another_layout_is_refused_with_its_place(tmp_path, name, file, text, words):
    """Would catch: "a : b : c" made of the word "abc", an empty source."""
    assert words in refusal(tmp_path, name, file, text)


def test_the_enriched_webnlg_is_read(tmp_path):
    """Versions 1.6 and 2.0 have the text one level down. Would catch: 18,000 blank targets."""
    write(tmp_path / "dev/a.xml", xml(
        '<lex comment="good" lid="Id1">\n  <sortedtripleset><sentence ID="1"/></sortedtripleset>\n'
        "  <text>A is B.</text>\n  <template>AGENT-1 is B.</template>\n</lex>"))
    assert load("webnlg", "dev", tmp_path) == [Example(" | A : is : B", ("A is B.",), "City")]


@pytest.mark.parametrize("encoding", ["ISO-8859-1", "UTF-8", "utf-16", "windows-1252"])
def test_what_an_xml_file_says_of_its_encoding_does_not_count(tmp_path, encoding):
    """It is UTF-8, after `iconv` too. Would catch: "CafÃ©" as a target."""
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    path = write(tmp_path / "dev/a.xml", xml('<lex comment="good">Café.</lex>', head))
    assert load("webnlg", "dev", tmp_path)[0].targets == ("Café.",)
    text = path.read_text("utf-8")
    for other, byte in (("latin1", "0xe9"), ("utf-16", "0xff")):    # the advice has to help
        path.write_bytes(text.encode(other))
        with pytest.raises(ValueError, match=f"a.xml, line 1: got the byte {byte}, expected UTF-8; "
                                             f"convert the file, as with `iconv -f {other} -t"):
            load("webnlg", "dev", tmp_path)


def test_a_single_string_is_one_text(tmp_path):
    """SciTLDR has lists of sentences. Would catch: a string that is read letter by letter."""
    write(tmp_path / "scitldr_a_dev.jsonl", jsonl({"source": "We show X.", "target": "X works."}))
    assert load("scitldr", "dev", tmp_path) == [Example("We show X.", ("X works.",))]


def test_blank_texts_of_a_release_are_left_out_and_counted(tmp_path, capsys):
    """Would catch: articles that are missing from a score without a word."""
    write(tmp_path / DART, json.dumps([
        {"tripleset": [["A", "IS", "B"]], "annotations": [{"text": "A."}, {"text": " "}]},
        {"tripleset": [["C", "IS", "D"]], "annotations": [{"text": ""}]}]))
    assert load("dart", "dev", tmp_path) == [Example("A : is : B", ("A.",))]
    note = capsys.readouterr().err
    assert DART in note and "2 blank targets, 1 examples without source or target" in note
    write(tmp_path / "val.source", "One.\n\nThree.\n")
    write(tmp_path / "val.target", "A.\nB.\n \n")
    assert load("xsum", "dev", tmp_path) == [Example("One.", ("A.",))]
    assert "1 blank targets, 2 examples without" in capsys.readouterr().err
    write(tmp_path / "val.source", "One.\n")
    write(tmp_path / "val.target", "A.\n")
    load("xsum", "dev", tmp_path)
    assert capsys.readouterr().err == ""


def test_line_ends_of_another_system_change_nothing(tmp_path):
    """Would catch: a release of XSum that has "the sections of none", a "\\r" at every end."""
    article = ("[SN]URL[SN]\nhttp://www.bbc.co.uk/news/uk-1\n\n[SN]FIRST-SENTENCE[SN]\nA road.\n\n"
               "[SN]RESTBODY[SN]\nIt is closed.\nEmail\n")
    write(tmp_path / "xsum/bbc-summary-data/1.summary", article.replace("\n", "\r\n"))
    write(tmp_path / "xsum" / summaries.XSUM_SPLITS,
          '{"train": [],\r\n"validation": ["1"],\r\n"test": []}')
    assert load("xsum", "dev", tmp_path) == [Example("It is closed.", ("A road.",), "news/uk")]
    path = write(tmp_path / "my.txt", "a\r\nb\r\n")
    assert [source for source, _ in read_requests(path, [])] == ["a", "b"]
    path = write(tmp_path / "my.jsonl", own().replace("\n", "\r\n"))
    assert [source for source, _ in read_requests(path, [])] == ["a", "c"]


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n\r\n", " \n", ",\n"])
def test_a_blank_last_line_of_a_csv_file_is_no_row(tmp_path, end):
    """Would catch: a file that a spreadsheet has saved, refused for its last line."""
    write(tmp_path / "devset.csv", f"mr,ref\nname[A],One.\n{end}")
    assert load("e2e", "dev", tmp_path) == [Example("name : A", ("One.",))]


@pytest.mark.parametrize("command", ["unzip", "bunzip2", "unxz"])
def test_a_packed_file_is_named_with_its_command(tmp_path, command):
    """Would catch: "convert the file with iconv", which cannot help."""
    raw = own().encode()
    path = write(tmp_path / "my.jsonl", {"bunzip2": bz2.compress, "unxz": lzma.compress,
                                         "unzip": bytes}[command](raw))
    if command == "unzip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("my.jsonl", raw)
    with pytest.raises(ValueError, match=f"got a packed file, .*; unpack it with `{command}`"):
        formats.read_text(path)


READERS = [lambda path: load(str(path), "train"), lambda path: list(read_requests(path, [])),
           formats.read_text]


@pytest.mark.parametrize("read", READERS)
def test_what_never_ends_is_refused(tmp_path, monkeypatch, read):
    """Would catch: a hang on a pipe, all memory full of /dev/zero or of a small file that unpacks
    to a large one.
    """
    monkeypatch.setattr(formats, "LARGEST", 1 << 20)
    path = tmp_path / "my.jsonl"
    path.write_bytes(100 * gzip.compress(bytes(1 << 20)))
    with pytest.raises(ValueError, match="my.jsonl.*got more than 1 MB in one piece"):
        read(path)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        path.unlink()
        make(path)
        with pytest.raises(ValueError, match="my.jsonl, which (is no file|cannot be read)"):
            read(path)


def test_a_split_has_an_end(monkeypatch):
    """Would catch: all memory full of a small file that unpacks to many short lines."""
    monkeypatch.setattr(example, "MOST_CHARACTERS", 1000)
    endless = itertools.repeat(("my.jsonl, line 7", "a", ["b"], ""))
    with pytest.raises(ValueError, match="my.jsonl, line 7: got more than"):
        example.examples(endless)


@pytest.mark.parametrize("text", [
    "[" + '{"source": "c", "target": "x"}, ' * 10_000 + "{}]", json.dumps("x" * 100_000),
    json.dumps({"source": "a", "target": {"x": "y" * 100_000}}),
    json.dumps({"source": "a", "target": [list(range(50_000))]}),
    json.dumps({"x" * 100_000: 1}), json.dumps({f"key{n}": 1 for n in range(20_000)}),
])
@pytest.mark.parametrize("read", [lambda path: load(str(path), "train"),
                                  lambda path: list(read_requests(path, ["a", "b"]))])
def test_a_message_is_not_as_long_as_the_file(tmp_path, text, read):
    """A list on one line is often a .json file that was renamed. Would catch: 22 MB on a terminal.
    """
    path = write(tmp_path / "my.jsonl", text + "\n")
    with pytest.raises(ValueError, match="my.jsonl, line 1: got ") as caught:
        read(path)
    assert len(str(caught.value)) - len(str(path)) < 200


def test_a_million_blanks_are_one_sentence(model_directory, capfd):
    """Would catch: tiktoken's panic, which is no Exception and a page of traceback."""
    tokenizer = load_tokenizer(model_directory)
    for blank in (" ", "\n"):
        with pytest.raises(ValueError, match="got a text with 100,000 blanks in a row or more"):
            tokenizer.source_ids("a" + blank * 10 ** 6 + "a")
    with pytest.raises(ValueError, match="my.jsonl, line 3: got a source with 100,000 blanks"):
        examples([("my.jsonl, line 3", "a" + " " * 10 ** 6 + "a", ("t",), "")])
    most = "a" + " " * (LONGEST_BLANK - 1) + "a"
    assert tokenizer.decode(tokenizer.encode(most * 3)) == most * 3
    assert "panicked" not in capfd.readouterr().err
