"""The files of the data sets, read and written out as text: E2E, WebNLG 2017, DART, and your own.

Every reader takes a path and returns rows (source, targets, topic): a table as one line of text,
its references, and its category where it has one. The lines of text are those of the paper's
official code. A gzip file is read as it is. What is malformed is a ValueError that names the file
and the line, or the entry where a file is one single document.
Not here: where the files are and which split is which (tasks.py).
"""
import csv
import gzip
import io
import json
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path


def find(folder, names):
    """The first of `names`, plain or gzipped, in `folder`; a directory counts if it holds XML."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file() or path.is_dir() and any(path.rglob("*.xml")):
                return path
    return None


def read_text(path):
    """The text of a file, unpacked where it is gzip, whatever its name says."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"got {path}, which cannot be read ({error.strerror}); expected a file; "
                         "correct the name") from error
    if raw[:2] == b"\x1f\x8b":                              # the two bytes that open a gzip file
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: got a damaged gzip file ({error}), expected a whole one; "
                             "copy or download it again") from error
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")   # the byte order mark of some editors
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: got the byte {raw[error.start]:#04x}, expected "
                         "UTF-8; convert the file, as with `iconv -t utf-8`") from error


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
    """(line number, what it holds) for every line that is not blank.

    Split at newlines only: str.splitlines would also cut at U+2028 and others inside a text.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, path, number)


# ---- E2E: a CSV file with a line for each pair of a table and a reference

E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def e2e_source(table):
    """`name[Alimentum], familyFriendly[no]` -> `name : Alimentum | family friendly : no`."""
    parts = []
    for slot in table.removesuffix("]").split("], "):
        name, bracket, value = slot.partition("[")
        if not (name.strip() and bracket and value.strip()) or set("[]") & set(value):
            raise ValueError(f"got the table {table!r}, expected the form 'name[Alimentum], "
                             "food[Thai]'")
        parts.append(f"{E2E_NAMES.get(name, name)} : {value}")
    return " | ".join(parts)


def csv_rows(path):
    """(number of its first line, fields) of every row; a quoted field may span several lines."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        for row in rows:
            yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: got {error}, expected CSV whose quotes are closed; "
                         "mend that line") from error


def read_e2e(path):
    """One row for each distinct table, in order of first appearance, with all its references.

    A run of white space in a reference becomes one blank, as in the authors' rendering.
    Differs from the paper: otherwise references and tables stay as typed ("£20-25"), where the
    authors' are tokenised ("£ 20 - 25", "a pub ."). Without its white space, all is equal.
    """
    references = {}
    for line, row in csv_rows(path):
        if line == 1:
            if row != ["mr", "ref"]:
                raise ValueError(f"{path}, line 1: got the header {','.join(row)!r}, expected "
                                 "'mr,ref'; take the official file, for test testset_w_refs.csv")
            continue
        if len(row) != 2 or not row[1].strip():
            raise ValueError(f"{path}, line {line}: got {row!r}, expected a table and its "
                             "reference; mend or delete that line")
        try:
            source = e2e_source(row[0])
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}; mend or delete that line") from error
        references.setdefault(source, []).append(" ".join(row[1].split()))
    return [(source, tuple(texts), "") for source, texts in references.items()]


# ---- WebNLG 2017: one JSON file a split, or the release's tree of XML files

def webnlg_json(path):
    """(where, category, triples, [(text, comment)]) of every entry of the authors' JSON file."""
    data, where = parse_json(read_text(path), path), path
    try:
        for number, numbered in enumerate(data["entries"], 1):
            where = f"{path}, entry {number}"
            (entry,) = numbered.values()                                    # {"17": {...}}
            triples = [(t["subject"], t["property"], t["object"])
                       for t in entry["modifiedtripleset"]]
            texts = [(text["lex"], text["comment"]) for text in entry["lexicalisations"]]
            yield where, entry["category"], triples, texts
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: got another layout ({type(error).__name__} {error}), expected "
                         '{"entries": [{"1": {"category", "modifiedtripleset", "lexicalisations"}}]'
                         "}; take the official file") from error


def webnlg_xml(path):
    """The same of one XML file, or of every .xml file below a directory in the order of names."""
    for file in sorted(path.rglob("*.xml")) if path.is_dir() else [path]:
        try:
            entries = ElementTree.fromstring(read_text(file).encode()).iter("entry")
        except ElementTree.ParseError as error:
            raise ValueError(f"{file}, line {error.position[0]}: got no XML ({error}), expected "
                             "WebNLG's XML; take the official file") from error
        for entry in entries:
            triples = [tuple((triple.text or "").split(" | "))
                       for triple in entry.iterfind("modifiedtripleset/mtriple")]
            texts = [(lex.text or "", lex.get("comment")) for lex in entry.iterfind("lex")]
            yield f"{file}, entry {entry.get('eid')}", entry.get("category"), triples, texts


def read_webnlg(path, good_only):
    """One row for each entry of a JSON file, an XML file or a directory of XML; topic = category.

    good_only: leave out texts that the makers marked "toFix", and an entry that has no other. The
    authors train on the good ones only; as references all count.
    """
    rows = []
    xml = path.is_dir() or path.name.removesuffix(".gz").endswith(".xml")
    for where, category, triples, texts in webnlg_xml(path) if xml else webnlg_json(path):
        if not category or not triples or any(len(triple) != 3 for triple in triples):
            raise ValueError(f"{where}: got the category {category!r} and the triples {triples!r}, "
                             "expected subject, property, object of each; take the official file")
        # The first triple has a bar too; underscores and quotation marks stay: both as the authors.
        source = "".join(f" | {subject} : {relation} : {obj}" for subject, relation, obj in triples)
        good = tuple(text for text, comment in texts if comment == "good" or not good_only)
        if good:
            rows.append((source, good, category))
    return rows


# ---- DART: one JSON list a split, or its entries one a line

def read_dart(path):
    """One row for each entry. A blank text is left out (the official test set has one)."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        entries = [(f"{path}, line {number}", entry) for number, entry in json_lines(path)]
    else:
        data = parse_json(read_text(path), path)
        if not isinstance(data, list):
            raise ValueError(f"{path}: got a {type(data).__name__}, expected a list of entries; "
                             "take the official file")
        entries = [(f"{path}, entry {number}", entry) for number, entry in enumerate(data, 1)]
    rows = []
    for where, entry in entries:
        try:
            source = " | ".join(f"{subject} : {relation.lower()} : {obj}"
                                for subject, relation, obj in entry["tripleset"])
            texts = tuple(a["text"] for a in entry["annotations"] if a["text"].strip())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: got another layout ({type(error).__name__} {error}), "
                             'expected {"tripleset": [[s, r, o]], "annotations": [{"text": ...}]}; '
                             "take the official file") from error
        if texts:
            rows.append((source, texts, ""))
    return rows


# ---- Your own: one {"source": ..., "target": ..., "topic": ...} a line

def check_text(text, key, where):
    """Raise ValueError for what is no text that a model could read or generate."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: got the {key} {text!r}, expected text that is not blank; mend "
                         "or delete that line")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:                     # "\ud83d" alone is legal JSON
        raise ValueError(f"{where}: got a {key} with half a character ({error.reason}), expected "
                         "text; mend or delete that line") from error


def read_jsonl(path, need=("source", "target")):
    """The objects of a JSONL file, each with the keys in `need`; "target" becomes a list of texts.

    Other keys are left alone, except that a "topic" has to be text.
    """
    rows = []
    for number, row in json_lines(path):
        where, expected = f"{path}, line {number}", " and ".join(f'"{key}"' for key in need)
        if not isinstance(row, dict) or not set(need) <= row.keys():
            got = f"the keys {', '.join(row) or 'of none'}" if isinstance(row, dict) else f"{row!r}"
            raise ValueError(f"{where}: got {got}, expected an object with {expected}; rename or "
                             "add what is missing")
        if "target" in need and not isinstance(row["target"], list):
            row["target"] = [row["target"]]
        if row.get("target") == []:
            raise ValueError(f"{where}: got an empty list as target, expected at least one text; "
                             "mend or delete that line")
        for key in need:
            for text in row[key] if key == "target" else [row[key]]:
                check_text(text, key, where)
        if row.get("topic"):
            check_text(row["topic"], "topic", where)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: got an empty file, expected one JSON object a line")
    return rows
