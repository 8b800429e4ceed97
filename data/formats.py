"""The files of the data sets, read and linearised: E2E, WebNLG 2017, DART; JSON lines.

Every reader takes a path and yields rows (where, source, targets, topic): the file and the line, or
the entry of a file that is one document; a table as one line of text, its references, its category
where it has one. The lines of text are those of the paper's official code. A reader looks at the
layout only: example.py looks at the texts. What is malformed is a ValueError.
Not here: where the files are and which split is which (tasks.py), your own (own.py).
"""
import contextlib
import csv
import gzip
import io
import json
import xml.etree.ElementTree as ElementTree
import zlib

from data.example import check_text, short
from utils.cli import nearest
from utils.files import LARGEST, plain_file

# What packed files begin with, and what unpacks them.
PACKED = {b"PK\x03\x04": "unzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}


def find(folder, names):
    """The first of `names`, plain or gzipped, in `folder`; a directory counts if it holds XML."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists() and (not path.is_dir() or any(path.rglob("*.xml"))):
                return path
    return None


def raw_lines(path):
    """The lines of a file as bytes, unpacked where it is gzip, whatever its name says; only
    one line at a time is in memory.
    """
    plain_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            file.seek(0)
            for first, command in PACKED.items():
                if start.startswith(first):
                    raise ValueError(f"{path}: got a packed file, expected a plain or a gzip one; "
                                     f"unpack it with `{command}`")
            packed = start[:2] == b"\x1f\x8b"              # the two bytes that open a gzip file
            with gzip.open(file) if packed else file as lines:
                while line := lines.readline(LARGEST + 1):
                    yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: got a damaged gzip file ({error}), expected a whole one; copy "
                         "or download it again") from error
    except OSError as error:
        raise ValueError(f"got {path}, which cannot be read ({error.strerror}); expected a file; "
                         "correct the name") from error


def text_lines(path):
    """The lines of a file as text, each with its newline. A byte order mark is removed, and the
    line ends of Windows become plain newlines.
    """
    for number, line in enumerate(raw_lines(path), 1):
        check_size(len(line), f"{path}, line {number}")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            utf16 = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
            raise ValueError(f"{path}, line {number}: got the byte {line[error.start]:#04x}, "
                             "expected UTF-8; convert the file, as with `iconv -f "
                             f"{'utf-16' if utf16 else 'latin1'} -t utf-8`") from error
        text = text.removeprefix("\ufeff") if number == 1 else text
        yield f"{text[:-2]}\n" if text.endswith("\r\n") else text


def check_size(size, where):
    """Raise ValueError for a line or a document that is too long to be one."""
    if size > LARGEST:
        raise ValueError(f"{where}: got more than {LARGEST >> 20} MB in one piece, expected less; "
                         "cut it into lines or into several files")


def read_text(path):
    """The text of a file that is one document."""
    lines, size = [], 0
    for line in text_lines(path):
        lines.append(line)
        size += len(line)
        check_size(size, path)
    return "".join(lines)


def parse_json(text, path, line=1):
    """`text` as JSON; `line` is the line of the file where it begins."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: got no JSON ({error.msg}, "
                         f"column {error.colno}), expected JSON; mend that line") from error
    except (ValueError, RecursionError) as error:       # a number or a nesting without end
        raise ValueError(f"{path}, line {line}: got JSON that cannot be read ({error}), expected "
                         "text in a few levels; mend that line") from error


def json_lines(path):
    """(where, what it holds) for every line that is not blank.

    Split at newlines only: str.splitlines would also cut at U+2028 and others inside a text.
    """
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            yield f"{path}, line {number}", parse_json(line.removesuffix("\n"), path, number)


@contextlib.contextmanager
def layout(where, expected):
    """What goes wrong inside, as a ValueError that says which layout was expected at `where`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: got another layout ({type(error).__name__} {error}), expected "
                         f"{expected}; take the official file") from error


# ---- E2E: a CSV file with a line for each pair of a table and a reference

E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def e2e_source(table, where):
    """`name[Alimentum], familyFriendly[no]` -> `name : Alimentum | family friendly : no`."""
    parts = []
    for slot in table.removesuffix("]").split("], "):
        name, bracket, value = slot.partition("[")
        if not (name.strip() and bracket and value.strip()) or set("[]") & set(value):
            raise ValueError(f"{where}: got the table {short(table)}, expected the form "
                             "'name[Alimentum], food[Thai]'; mend or delete that line")
        parts.append(f"{E2E_NAMES.get(name, name)} : {value}")
    return " | ".join(parts)


def csv_rows(path, delimiter=","):
    """(number of its first line, fields) of every row; a quoted field may span several lines.

    A line without anything is no row: some editors leave one at the end.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, delimiter=delimiter)
    line = 1
    try:
        for row in rows:
            if any(field.strip() for field in row):
                yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: got {error}, expected CSV whose quotes are closed; "
                         "mend that line") from error


def read_e2e(path):
    """A row for each line: `gather` makes one of each distinct table, with all its references.

    A run of white space in a reference becomes one blank, as in the authors' rendering.
    Differs from the paper: otherwise references and tables stay as typed ("£20-25"), where the
    authors' are tokenised ("£ 20 - 25", "a pub ."). Apart from white space both are equal.
    """
    rows = csv_rows(path)
    line, header = next(rows, (1, []))
    if header != ["mr", "ref"]:
        raise ValueError(f"{path}, line {line}: got the header {short(','.join(header))}, expected "
                         "'mr,ref'; take the official file, for test testset_w_refs.csv")
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) != 2:
            raise ValueError(f"{where}: got {short(row)}, expected a table and its reference; mend "
                             "or delete that line")
        yield where, e2e_source(row[0], where), [" ".join(row[1].split())], ""


# ---- WebNLG 2017: one JSON file a split, or the release's tree of XML files

def checked_triples(triples, where):
    """`triples`, each of three texts: subject, relation, object."""
    if not isinstance(triples, list) or not triples or not all(
            isinstance(t, (list, tuple)) and len(t) == 3 for t in triples):
        raise ValueError(f"{where}: got the triples {short(triples)}, expected subject, relation, "
                         "object of each; take the official file")
    for part in (part for triple in triples for part in triple):
        check_text(part, "part of a triple", where)
    return triples


def webnlg_json(path):
    """(where, category, triples, [(text, comment)]) of every entry of the authors' JSON file."""
    expected = ('{"entries": [{"1": {"category", "modifiedtripleset", "lexicalisations": [{"lex", '
                '"comment"}]}}]}')
    data = parse_json(read_text(path), path)
    with layout(path, expected):
        entries = list(data["entries"])
    for number, numbered in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        with layout(where, expected):
            (entry,) = numbered.values()                                    # {"17": {...}}
            triples = [(t["subject"], t["property"], t["object"])
                       for t in entry["modifiedtripleset"]]
            texts = [(text["lex"], text["comment"]) for text in entry["lexicalisations"]]
            category = entry["category"]
        yield where, category, triples, texts


def webnlg_xml(path):
    """The same of one XML file, or of every .xml file below a directory in the order of names.

    The enriched releases (1.6, 2.0) have a <text> inside of <lex>, beside its analysis.
    """
    for file in sorted(path.rglob("*.xml")) if path.is_dir() else [path]:
        try:        # of text, not of bytes: an encoding that the file declares is not asked then
            entries = ElementTree.fromstring(read_text(file)).iter("entry")
        except ElementTree.ParseError as error:
            raise ValueError(f"{file}, line {error.position[0]}: got no XML ({error}), expected "
                             "WebNLG's XML; take the official file") from error
        for entry in entries:
            triples = [(triple.text or "").split(" | ")
                       for triple in entry.iterfind("modifiedtripleset/mtriple")]
            texts = [(lex.findtext("text", lex.text), lex.get("comment"))
                     for lex in entry.iterfind("lex")]
            yield f"{file}, entry {entry.get('eid')}", entry.get("category"), triples, texts


def read_webnlg(path, good_only):
    """A row for each entry of a JSON file, an XML file or a directory of XML; topic = category.

    good_only: keep only texts that the makers marked "good" (others: "toFix"), and only entries
    that have one. The authors train on the good ones only; as references all count.
    """
    xml = path.is_dir() or path.name.removesuffix(".gz").endswith(".xml")
    for where, category, triples, texts in webnlg_xml(path) if xml else webnlg_json(path):
        check_text(category, "category", where)
        # The first triple has a bar too; underscores and quotation marks stay: both as the authors.
        source = "".join(f" | {subject} : {relation} : {obj}"
                         for subject, relation, obj in checked_triples(triples, where))
        good = [text for text, comment in texts if comment == "good" or not good_only]
        if good:
            yield where, source, good, category


# ---- DART: one JSON list a split, or its entries one a line

def read_dart(path):
    """A row for each entry. The official test set has one blank text."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        entries = json_lines(path)
    else:
        data = parse_json(read_text(path), path)
        if not isinstance(data, list):
            raise ValueError(f"{path}: got a {type(data).__name__}, expected a list of entries; "
                             "take the official file")
        entries = [(f"{path}, entry {number}", entry) for number, entry in enumerate(data, 1)]
    for where, entry in entries:
        with layout(where, '{"tripleset": [[s, r, o]], "annotations": [{"text": ...}]}'):
            triples, texts = entry["tripleset"], [a["text"] for a in entry["annotations"]]
        yield where, " | ".join(f"{subject} : {relation.lower()} : {obj}" for subject, relation, obj
                                in checked_triples(triples, where)), texts, ""


# ---- JSON lines: one object a line

ADVICE = "rename or add what is missing"


def mistyped(need, names, advice):
    """`advice`, and before it which of `names` was probably meant by one of `need` not in them."""
    others = [name for name in names if name not in need][:1000]
    near = (nearest(name, others) for name in need if name not in names)
    return " ".join(filter(None, (*near, advice)))


def check_keys(row, need, where, advice):
    """Raise ValueError where `row` is no object with the keys in `need`."""
    if not isinstance(row, dict) or not set(need) <= row.keys():
        got = (f"the keys {short(list(row))}" if isinstance(row, dict) else
               f"a {type(row).__name__}, {short(row)}")
        raise ValueError(f"{where}: got {got}, expected an object with "
                         + " and ".join(f'"{key}"' for key in need)
                         + f"; {mistyped(need, row if isinstance(row, dict) else (), advice)}")


def json_objects(path, need, advice=ADVICE):
    """(where, object) for every line of a JSONL file; each has the keys in `need`."""
    row = None
    for where, row in json_lines(path):
        check_keys(row, need, where, advice)
        yield where, row
    if row is None:
        raise ValueError(f"{path}: got an empty file, expected one JSON object a line; "
                         "write them there, or name another file")


def as_list(value):
    """One text, or a list of them, as a list."""
    return value if isinstance(value, list) else [value]
