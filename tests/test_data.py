"""The tasks: tables become the authors' lines of text, splits do not leak, mistakes are one line.

The files are small and written here; the official ones are checked too where the environment
variable PREFIX_TUNING_DATA names a folder that has them in e2e/, webnlg/ and dart/.
"""
import collections
import gzip
import hashlib
import json
import tarfile

import pytest

from data import formats, summaries, tasks
from data.example import Example
from data.requests import read_requests
from data.tasks import load
from data.toy_world import tables

# ---- small files in the official forms

E2E_CSV = ('mr,ref\n'
           '"name[Alimentum], priceRange[£20-25], familyFriendly[no]",No children at Alimentum.\n'
           '"name[Zizzi], eatType[pub], customer rating[5 out of 5]","Zizzi,\r\n  a  pub."\n'
           '"name[Alimentum], priceRange[£20-25], familyFriendly[no]",Alimentum is for adults.\n')
ALIMENTUM = "name : Alimentum | price : £20-25 | family friendly : no"

WEBNLG_ENTRIES = [      # category, triples, (text, comment)
    ("Airport", [("Aarhus_Airport", "cityServed", '"Aarhus, Denmark"'), ("Aarhus", "mayor", "J_B")],
     [("Aarhus has an airport.", "good"), ("Aarhus airport.", "toFix")]),
    ("Artist", [("Al_Anderson", "genre", "Rock | Blues")], [("Al plays.", "toFix")]),
]
WEBNLG_SOURCES = [' | Aarhus_Airport : cityServed : "Aarhus, Denmark" | Aarhus : mayor : J_B',
                  " | Al_Anderson : genre : Rock | Blues"]

DART_ENTRIES = [
    {"tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "[TITLE]", "Hill"]],
     "annotations": [{"source": "a", "text": "It joined."}, {"source": "b", "text": " "}]},
    {"tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "[TITLE]", "Hill"]],
     "annotations": [{"source": "a", "text": "In 1973 it joined."}]},
]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def webnlg_json(entries):
    return json.dumps({"entries": [{str(number): {
        "category": category,
        "modifiedtripleset": [dict(zip(("subject", "property", "object"), t)) for t in triples],
        "lexicalisations": [{"lex": text, "comment": comment} for text, comment in texts]}}
        for number, (category, triples, texts) in enumerate(entries, 1)]})


def webnlg_xml(entries):
    body = ""
    for category, triples, texts in entries:
        body += f'<entry category="{category}" eid="Id1"><modifiedtripleset>'
        body += "".join(f"<mtriple>{s} | {p} | {o}</mtriple>" for s, p, o in triples)
        body += "</modifiedtripleset>"
        body += "".join(f'<lex comment="{comment}">{text}</lex>' for text, comment in texts)
        body += "</entry>"
    return f"<benchmark><entries>{body}</entries></benchmark>"


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def error_of(function, *arguments):
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message, "an error is one line"
    return message


# ---- E2E

@pytest.mark.parametrize("split, file", [("train", "trainset.csv"), ("dev", "devset.csv"),
                                         ("test", "testset_w_refs.csv")])
@pytest.mark.parametrize("place", ["e2e/{}", "{}", "e2e/{}.gz"])
def test_e2e_has_one_example_for_each_table_with_all_its_references(tmp_path, split, file, place):
    """Would catch a table that is decoded once for each reference, or scored against one only."""
    write(tmp_path / place.format(file), E2E_CSV)
    assert load("e2e", split, tmp_path) == [
        Example(ALIMENTUM, ("No children at Alimentum.", "Alimentum is for adults.")),
        Example("name : Zizzi | Type : pub | customer rating : 5 out of 5", ("Zizzi, a pub.",))]


@pytest.mark.parametrize("line, text, words", [
    (1, "MR\n", "testset_w_refs.csv"),
    (2, 'mr,ref\nname Alimentum,No\n', "'name Alimentum'"),
    (2, 'mr,ref\n"name[A], food[Th[ai]]",No\n', "expected the form"),
    (4, 'mr,ref\nname[A],"two\nlines"\nname[B]\n', "['name[B]']"),
    (2, 'mr,ref\nname[A],\n', "got the target ''"),
    (2, 'mr,ref\nname[A],"never closed\nname[B],x\n', "quotes"),
])
def test_a_bad_line_of_e2e_is_named(tmp_path, line, text, words):
    """Would catch a line number that forgets references which go over several lines."""
    path = write(tmp_path / "trainset.csv", text)
    message = error_of(load, "e2e", "train", tmp_path)
    assert message.startswith(f"{path}, line {line}:") and words in message


# ---- WebNLG

@pytest.mark.parametrize("form", ["json", "json.gz", "xml"])
def test_webnlg_reads_the_same_from_json_and_from_the_xml_tree(tmp_path, form):
    """Would catch a bar that is missing in front, and an object cut at a bar of its own."""
    entries = [WEBNLG_ENTRIES[0], ("Artist", [("Al_Anderson", "genre", "Rock")],
                                   [("Al plays.", "good")])]
    if form == "xml":
        write(tmp_path / "webnlg_challenge_2017/train/1triples/b.xml", webnlg_xml(entries[1:]))
        write(tmp_path / "webnlg_challenge_2017/train/1triples/a.xml", webnlg_xml(entries[:1]))
        write(tmp_path / "webnlg_challenge_2017/test/testdata_with_lex.xml", webnlg_xml(entries))
        write(tmp_path / "webnlg_challenge_2017/test/testdata_no_lex.xml", "not to be read")
    else:
        for split in ("train", "test"):
            write(tmp_path / f"webnlg/webnlg_challenge_2017_{split}.{form}", webnlg_json(entries))
    artist = Example(" | Al_Anderson : genre : Rock", ("Al plays.",), "Artist")
    assert load("webnlg", "train", tmp_path) == [
        Example(WEBNLG_SOURCES[0], ("Aarhus has an airport.",), "Airport"), artist]
    assert load("webnlg", "test", tmp_path) == [
        Example(WEBNLG_SOURCES[0], ("Aarhus has an airport.", "Aarhus airport."), "Airport"),
        artist]


def test_webnlg_trains_on_good_texts_and_is_scored_against_all(tmp_path):
    """Would catch training on texts marked toFix, or an example without any target."""
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", webnlg_json(WEBNLG_ENTRIES))
    assert [e.targets for e in load("webnlg", "train", tmp_path)] == [("Aarhus has an airport.",)]
    assert [len(e.targets) for e in load("webnlg", "dev", tmp_path)] == [2, 1]
    assert load("webnlg", "dev", tmp_path)[1].source == WEBNLG_SOURCES[1]


@pytest.mark.parametrize("name, text, words", [
    ("dev.json", '{"entries": [\n{"1": }]}', "line 2: got no JSON"),
    ("dev.json", '[]', "another layout"),
    ("dev.json", '{"entries": [{"1": {"category": "City"}}]}', "entry 1: got another layout"),
    ("dev.json", webnlg_json([("City", [("a", "b")], [])]), "entry 1"),
    ("dev/a.xml", "<benchmark>\n<entries>\n", "line 3: got no XML"),
    ("dev/a.xml", webnlg_xml([("City", [("a", "b | c", "d")], [])]), "entry Id1"),
    ("dev/a.xml", "<benchmark></benchmark>", "got no example"),
])
def test_a_webnlg_file_of_another_form_is_named_with_the_place(tmp_path, name, text, words):
    """Would catch a traceback (KeyError: 'category') instead of a sentence."""
    write(tmp_path / name, text)
    message = error_of(load, "webnlg", "dev", tmp_path)
    assert message.startswith(str(tmp_path / "dev")) and words in message


# ---- DART

@pytest.mark.parametrize("file, text", [
    ("dart-v1.1.1-full-dev.json", json.dumps(DART_ENTRIES)),
    ("dart-v1.1.1-full-dev.json", json.dumps(DART_ENTRIES, indent=2).replace("\n", "\r\n")),
    ("dart-v1.1.1-full-dev.jsonl.gz", jsonl(*DART_ENTRIES))])
def test_dart_lowers_the_relation_only_and_keeps_equal_entries_apart(tmp_path, file, text):
    """Would catch a bar in front (WebNLG's form), and blank texts that are learnt as targets."""
    write(tmp_path / "dart" / file, text)
    source = "Mars Hill : joined : 1973 | Mars Hill : [title] : Hill"
    assert load("dart", "dev", tmp_path) == [Example(source, ("It joined.",)),
                                             Example(source, ("In 1973 it joined.",))]


@pytest.mark.parametrize("file, text, words", [
    ("dart-v1.1.1-full-dev.json", '[{"tripleset": [["a", "b"]], "annotations": []}]', "entry 1:"),
    ("dart-v1.1.1-full-dev.json", '{"tripleset": []}', "got a dict"),
    ("dart-v1.1.1-full-dev.json", "null", "got a NoneType"),
    ("dart-v1.1.1-full-dev.json", "[" * 100_000, "line 1: got JSON that cannot be read"),
    ("dart-v1.1.1-full-dev.jsonl", jsonl(DART_ENTRIES[0], {"triples": []}), "line 2:"),
    ("dart-v1.1.1-full-dev.jsonl", "", "got no example"),
    ("dart-v1.1.1-full-dev.json", "", "line 1: got no JSON"),
])
def test_a_dart_file_of_another_form_is_named_with_the_place(tmp_path, file, text, words):
    """Would catch a traceback, or an entry that is silently skipped."""
    write(tmp_path / file, text)
    message = error_of(load, "dart", "dev", tmp_path)
    assert message.startswith(str(tmp_path / file)) and words in message


# ---- your own JSONL

def own(path, n=40):
    return write(path, jsonl(*({"source": f"s{i}", "target": f"t{i}"} for i in range(n))))


def test_own_lines_take_one_target_or_several_and_equal_sources_are_gathered(tmp_path):
    """Would catch a list learnt as one text, a lost topic, and a line cut at U+2028."""
    write(tmp_path / "my.jsonl", "\ufeff" + jsonl(
        {"source": "a", "target": "1", "topic": "x"}, {"source": "b", "target": ["2", "3\u2028"]})
        + "\n \n" + jsonl({"topic": "x", "target": "4", "source": "a", "id": 7}))
    write(tmp_path / "my.dev.jsonl.gz", jsonl({"source": "c", "target": "5"}))
    assert load(str(tmp_path / "my.jsonl"), "train") == [Example("a", ("1", "4"), "x"),
                                                         Example("b", ("2", "3\u2028"))]
    assert load(str(tmp_path / "my.jsonl"), "dev") == [Example("c", ("5",))]


@pytest.mark.parametrize("size, held_out", [(2, 1), (19, 1), (20, 2), (40, 4), (6000, 500)])
def test_a_tenth_is_held_out_and_never_trained_on(tmp_path, size, held_out):
    """Would catch a dev set that overlaps with train, or is empty for a small file."""
    name = str(own(tmp_path / "my.jsonl", size))
    train, dev = ({e.source for e in load(name, split)} for split in ("train", "dev"))
    assert not train & dev and len(train | dev) == size and len(dev) == held_out


def test_the_held_out_part_depends_on_the_sources_and_not_on_their_order(tmp_path):
    """Would catch a split by line number: sorting the file would then leak dev into train."""
    lines = own(tmp_path / "my.jsonl").read_text().splitlines(keepends=True)
    write(tmp_path / "sorted.jsonl", "".join(reversed(lines)))
    write(tmp_path / "packed.jsonl.gz", "".join(lines))
    dev = {e.source for e in load(str(tmp_path / "my.jsonl"), "dev")}
    assert dev == {e.source for e in load(str(tmp_path / "sorted.jsonl"), "dev")}
    assert dev == {e.source for e in load(str(tmp_path / "packed.jsonl.gz"), "dev")}
    assert dev != {e.source for e in load(str(tmp_path / "my.jsonl"), "dev", seed=1)}


def test_lines_with_the_same_source_are_never_on_both_sides(tmp_path):
    """Would catch a hold-out by line: the model would have seen the source's other reference."""
    rows = [{"source": f"s{i % 10}", "target": f"t{i}", "topic": f"k{i % 3}"} for i in range(60)]
    name = str(write(tmp_path / "my.jsonl", jsonl(*rows)))
    train, dev = load(name, "train"), load(name, "dev")
    assert not {e.source for e in train} & {e.source for e in dev}
    assert sum(len(e.targets) for e in train + dev) == 60 and len({e.source for e in dev}) == 1


def test_the_test_split_is_the_file_beside_it(tmp_path):
    """Would catch a test split that is silently the dev split."""
    name = str(own(tmp_path / "my.jsonl"))
    assert "my.test.jsonl" in error_of(load, name, "test")
    write(tmp_path / "my.test.jsonl", jsonl({"source": "z", "target": "9"}))
    assert load(name, "test") == [Example("z", ("9",))]


@pytest.mark.parametrize("line, words", [
    ('{"source": "a"', "got no JSON"),
    ('{"source": "a", "tgt": "b"}', "got the keys ['source', 'tgt'], expected"),
    ('{}', "got the keys [], expected"),
    ('["a", "b"]', "got a list, ['a', 'b']"),
    ('{"source": "a", "target": []}', "got no target"),
    ('{"source": "a", "target": ["b", 3]}', "got the target 3"),
    ('{"source": " ", "target": "b"}', "got the source ' '"),
    ('{"source": "a", "target": null}', "got the target None"),
    ('{"source": "a", "target": "b", "topic": 3}', "got the topic 3"),
    ('{"source": "a", "target": "\\ud83d"}', "half a character"),
    (b'{"source": "a", "target": "caf\xe9"}', "got the byte 0xe9, expected UTF-8"),
])
def test_a_bad_line_of_your_own_file_is_named(tmp_path, line, words):
    """Would catch a traceback, or a bad pair that is silently left out."""
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "my.jsonl", jsonl({"source": "a", "target": "b"}).encode() * 2 + line
                 + b"\n")
    message = error_of(load, str(path), "train")
    assert message.startswith(f"{path}, line 3:") and words in message


def test_sources_alone_can_be_read(tmp_path):
    """Would catch decoding that asks for the targets it is there to write."""
    path = write(tmp_path / "in.jsonl", jsonl({"source": "a"}, {"source": "b", "target": 3}))
    assert list(read_requests(path, [])) == [("a", None), ("b", None)]
    assert 'expected an object with "source"; rename' in error_of(
        lambda: list(read_requests(write(path, jsonl({"target": "a"})), [])))


# ---- names and files

@pytest.mark.parametrize("name, split, words", [
    ("webnl", "train", "did you mean webnlg?"), ("data.cvs", "train", "folder of such, or one of"),
    ("e2e", "valid", "expected one of train, dev, test"), ("e2e", "tests", "did you mean test?"),
    ("no/such.jsonl", "train", "which is no file"), ("world", "tset", "did you mean test?"),
])
def test_an_unknown_name_is_answered_with_the_known_ones(name, split, words):
    """Would catch a KeyError, or a download that starts for a misspelt name."""
    assert words in error_of(load, name, split, ".")


def test_an_empty_or_damaged_file_is_named(tmp_path):
    """Would catch a run on no data, whose loss is NaN, and zlib's or the system's own words."""
    with pytest.raises(ValueError, match="got .*none.txt, which cannot be read .*; correct the"):
        formats.read_text(tmp_path / "none.txt")
    path = write(tmp_path / "my.jsonl", "\n")
    assert f"{path}: got an empty file" in error_of(load, str(path), "train")
    write(path, jsonl({"source": "a", "target": "b"}) * 3)
    assert "got 1 distinct sources, expected two" in error_of(load, str(path), "train")
    packed = own(tmp_path / "packed.jsonl.gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    assert "damaged gzip file" in error_of(load, str(packed), "train")
    packed.write_bytes(b"\x1f\x8b and something else")
    assert "damaged gzip file" in error_of(load, str(packed), "train")
    write(tmp_path / "trainset.csv", "mr,ref\n")
    assert "got no example" in error_of(load, "e2e", "train", tmp_path)


def test_what_is_missing_in_the_data_dir_is_said_with_its_address(tmp_path):
    """Would catch a download behind the back of someone who has named the folder."""
    message = error_of(load, "dart", "train", tmp_path)
    assert "dart-v1.1.1-full-train.json" in message and tasks.DART in message
    assert str(tmp_path / "dart") in message


def test_a_file_that_is_absent_is_fetched_once_and_checked(tmp_path, monkeypatch):
    """Would catch a file that is kept although its digest is wrong, or fetched at every start."""
    source = write(tmp_path / "server/devset.csv", E2E_CSV)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(tasks, "DOWNLOADS", tmp_path / "downloads")
    kept = tmp_path / "downloads/e2e/devset.csv"
    monkeypatch.setitem(tasks.FILES, ("e2e", "dev"), (source.as_uri(), "0" * 64, ("devset.csv",)))
    assert digest in error_of(load, "e2e", "dev") and not kept.exists()
    monkeypatch.setitem(tasks.FILES, ("e2e", "dev"), (source.as_uri(), digest, ("devset.csv",)))
    assert len(load("e2e", "dev")) == 2 and kept.read_bytes() == source.read_bytes()
    source.unlink()
    assert len(load("e2e", "dev")) == 2


def test_the_digest_of_dart_does_not_depend_on_line_ends(tmp_path, monkeypatch):
    """Would catch a right file that is refused: its repository has held it with both line ends."""
    text = json.dumps(DART_ENTRIES, indent=2)
    source = write(tmp_path / "server/dev.json", text.replace("\n", "\r\n"))
    monkeypatch.setattr(tasks, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setitem(tasks.FILES, ("dart", "dev"), (
        source.as_uri(), hashlib.sha256(text.encode()).hexdigest(), ("dev.json",)))
    assert len(load("dart", "dev")) == 2


def test_every_task_has_three_splits_with_address_and_digest():
    """Would catch a table entry that was forgotten or shortened."""
    names = [name for name in tasks.NAMES
             if not name.startswith("world") and name not in summaries.NAMES]
    assert set(tasks.FILES) == {(name, split) for name in names
                                for split in ("train", "dev", "test")}
    for url, sha256, files in tasks.FILES.values():
        assert url.startswith("https://") and len(bytes.fromhex(sha256)) == 32 and files


def test_each_world_is_its_own_style():
    """Would catch: world-hard that is the near one, and its claims with it."""
    for name, style in (("world", "near"), ("world-hard", "hard")):
        assert load(name, "dev") == tables.task(style, "dev")


@pytest.mark.parametrize("name", ["world", "world-hard"])
def test_the_micro_world_has_kinds_in_test_that_training_never_sees(name):
    """Would catch an "unseen" score on seen kinds."""
    train, test = load(name, "train"), load(name, "test")
    kinds = {e.topic for e in train}
    assert 0 < sum(e.topic in kinds for e in test) < len(test)
    assert train == load(name, "train") and not {e.source for e in train} & {e.source for e in test}


# ---- the official files

COUNTS = {      # task and split: examples, pairs
    ("e2e", "train"): (4862, 42061), ("e2e", "dev"): (547, 4672), ("e2e", "test"): (630, 4693),
    # 6,940 entries and 18,102 texts less 77 marked toFix; 5 entries have no other.
    ("webnlg", "train"): (6935, 18025), ("webnlg", "dev"): (872, 2268),
    ("webnlg", "test"): (1862, 4928),
    # 12,552 texts of which one is blank. The test set is the official XML's, one entry a line.
    ("dart", "dev"): (2768, 6980), ("dart", "test"): (5097, 12551)}


@pytest.mark.parametrize("name, split", COUNTS)
def test_the_official_files_have_the_published_counts(real_data, name, split):
    """Would catch rows that are lost to quotes, line breaks or a merge."""
    examples = load(name, split, real_data)
    assert (len(examples), sum(len(e.targets) for e in examples)) == COUNTS[name, split]


@pytest.mark.parametrize("name, split", COUNTS)
def test_the_official_files_have_the_digests_of_the_table(real_data, name, split):
    """Would catch a wrong digest in the table, which would make every download fail."""
    _, sha256, names = tasks.FILES[name, split]
    path = formats.find(real_data / name, names[:1])
    if path is None:
        pytest.skip(f"{real_data / name} has {name} {split} in another form than the official one")
    raw = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
    assert hashlib.sha256(raw.replace(b"\r", b"") if name == "dart" else raw).hexdigest() == sha256


@pytest.mark.parametrize("split, file", [("train", "src1_train.txt.gz"),
                                         ("dev", "src1_valid.txt.gz"),
                                         ("test", "src1_test.txt.gz")])
def test_e2e_is_the_authors_rendering_up_to_white_space(real_data, split, file):
    """Would catch a wrong name or order of attributes: all 51,426 pairs of the three splits."""
    def squeezed(text):
        return "".join(text.split())
    lines = formats.read_text(real_data / "e2e" / file).strip("\n").split("\n")
    theirs = [tuple(map(squeezed, line.split("||"))) for line in lines]
    examples = load("e2e", split, real_data)
    ours = [(squeezed(e.source), squeezed(target)) for e in examples for target in e.targets]
    assert collections.Counter(ours) == collections.Counter(theirs)
    assert [squeezed(e.source) for e in examples] == list(dict.fromkeys(s for s, _ in theirs))


def test_webnlg_has_ten_seen_and_five_unseen_categories(real_data):
    """Would catch seen and unseen scores over the wrong entries."""
    assert {e.topic for e in load("webnlg", "train", real_data)} == tasks.WEBNLG_SEEN
    test = load("webnlg", "test", real_data)
    unseen = [e.topic for e in test if e.topic not in tasks.WEBNLG_SEEN]
    assert (len(test) - len(unseen), len(unseen)) == (971, 891)
    assert set(unseen) == {"Artist", "Athlete", "CelestialBody", "MeanOfTransportation",
                           "Politician"}


def test_webnlgs_official_xml_tree_equals_the_json(real_data, tmp_path):
    """Would catch triples cut wrongly in one of the two forms."""
    packed = real_data / "webnlg" / "webnlg_challenge_2017_xml.tar.xz"
    if not packed.exists():
        pytest.skip(f"no {packed}")
    with tarfile.open(packed) as tree:
        tree.extractall(tmp_path, filter="data")
    for split in ("train", "dev", "test"):
        assert load("webnlg", split, tmp_path) == load("webnlg", split, real_data)
