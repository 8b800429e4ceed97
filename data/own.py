"""Your own data: pairs of a source and a target in one file, or in a folder with a file a split.

JSON lines, a JSON list, or CSV and TSV whose first line names the columns; plain or gzipped, the
ending in any case. The names "source" and "target" can be others (--source-key, --target-key); a
target may be a list of references in JSON; "topic" is optional, and everything else is left alone.
Not here: what may be text in them (example.py), the files of known data sets (formats.py).
"""
import hashlib
from pathlib import Path

from data import formats
from data.example import examples, gather, short
from utils.terminal import command

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
FORMS = "a .jsonl, .json, .csv or .tsv file or a folder of such"
KEYS = ("source", "target")
# What a split's file is called in a folder; beside my.jsonl it is my.dev.jsonl.
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"),
               "test": ("test",)}
OTHER_TABLES = {".parquet": "parquet", ".feather": "feather", ".xlsx": "excel", ".xls": "excel"}


def suffix_of(path):
    """The ending of a file in small letters, without that of gzip: .jsonl of my.JSONL.gz."""
    return Path(str(path).lower().removesuffix(".gz")).suffix


def name_of(path):
    """The name of a file or folder without what tells its form: "my" of data/my.csv.gz."""
    name = Path(path).name
    name = name[:-len(".gz")] if name.lower().endswith(".gz") else name
    return name[:-len(suffix_of(path))] if suffix_of(path) in SUFFIXES else name


def keys_of(settings):
    """What the settings of a run, a dictionary, call source and target; older ones do not say."""
    return tuple(settings.get(f"{key}_key", key) for key in KEYS)


def is_own(name):
    return suffix_of(name) in SUFFIXES or bool(name) and Path(name).exists()


def delimiter_of(path, need):
    """The delimiter of a table's columns. In a .csv the first line decides, since some programs
    write semicolons or tabs: the one that gives the names in `need`, or else the most columns.
    """
    first = next((line for line in formats.text_lines(path) if line.strip()), "")

    def fits(delimiter):
        names = [name.strip(' "\r\n') for name in first.split(delimiter)]
        return set(need) <= set(names), len(names)
    return "\t" if suffix_of(path) == ".tsv" else max(",;\t", key=fits)


def objects(path, need, advice=formats.ADVICE):
    """(where, object) for every line or row of a file; each has the keys in `need`, else a
    ValueError gives the advice.
    """
    if suffix_of(path) in (".csv", ".tsv"):
        rows = formats.csv_rows(path, delimiter_of(path, need))
        line, names = next(rows, (1, []))
        if not set(need) <= set(names):
            raise ValueError(f"{path}, line {line}: got the columns {short(names)}, expected "
                             f"{' and '.join(need)} among them; "
                             + formats.mistyped(need, names, advice))
        for line, row in rows:
            if len(row) != len(names):
                raise ValueError(f"{path}, line {line}: got {len(row)} fields, {short(row)}, "
                                 f"expected {len(names)} as in the first line; mend that line")
            yield f"{path}, line {line}", dict(zip(names, row))
        return
    first = next((line for line in formats.text_lines(path) if line.strip()), "")
    if suffix_of(path) == ".jsonl" or not first.lstrip().startswith("["):
        yield from formats.json_objects(path, need, advice)     # many a .json file has JSON lines
        return
    for number, row in enumerate(formats.parse_json(formats.read_text(path), path), 1):
        where = f"{path}, entry {number}"
        formats.check_keys(row, need, where, advice)
        yield where, row


def rows_of(path, keys):
    """A row for each pair, as the readers of formats.py yield them."""
    if suffix_of(path) not in SUFFIXES:
        reader = OTHER_TABLES.get(suffix_of(path), "table")
        program = (f"import pandas; pandas.read_{reader}({str(path)!r})"
                   f".to_csv({f'{path.stem}.csv'!r}, index=False)")
        raise ValueError(f"got {path}, expected {FORMS}; convert it, as with "
                         f"`{command('-c', program)}`")
    source, target = keys
    advice = "rename, or name yours by --source-key and --target-key"
    for where, row in objects(path, keys, advice):
        yield where, row[source], formats.as_list(row[target]), row.get("topic")


def file_of(path, split):
    """The file of a split: in the folder `path`, or beside the file `path`; None: there is none."""
    if split == "train" and not path.is_dir():
        return path
    folder, stem = (path, "") if path.is_dir() else (path.parent, f"{name_of(path)}.")
    files = [file for file in sorted(folder.iterdir()) if suffix_of(file) in SUFFIXES]
    found = (file for name in SPLIT_NAMES[split] for file in files
             if name_of(file).lower() == f"{stem}{name}".lower())
    return next(found, None)


def held_out(found, path, seed, beside):
    """The sources to hold out as dev where there is no dev file: a tenth, at least 1, at most 500.

    Chosen by a hash of the source: the order of the lines does not matter, and lines with the same
    source are never on both sides.
    """
    sources = sorted({example.source for example in found},
                     key=lambda source: hashlib.sha256(f"{seed} {source}".encode()).digest())
    if len(sources) < 2:
        raise ValueError(f"{path}: got {len(sources)} distinct sources, expected two or more, so "
                         "that one can be held out for dev; add lines, or put "
                         f"{beside.format('dev')}")
    return set(sources[:min(500, max(1, len(sources) // 10))])


def load(name, splits, seed, keys=KEYS):
    """The Examples of each of `splits` of your own file, say my.jsonl, or folder; each file is read
    once.

    test is my.test.jsonl beside it, or with another of SUFFIXES; in a folder it is test.jsonl. dev
    is my.dev.jsonl likewise; where there is none, `held_out` takes it out of train.
    """
    path = Path(name)
    if not path.exists() or path.is_dir() and suffix_of(path) in SUFFIXES:
        raise ValueError(f"got {name}, which is no file, expected {FORMS}; check the path")
    beside = "{}.jsonl in it" if path.is_dir() else name_of(path) + ".{}.jsonl beside it"
    train, own_dev = file_of(path, "train"), file_of(path, "dev")
    files = {split: file_of(path, split) or (train if split == "dev" else None)
             for split in splits}
    for split, file in files.items():
        if file is None:
            choice = ", or choose --split dev" if split == "test" else ""
            raise ValueError(f"got no {split} split for {path}, expected {beside.format(split)}; "
                             f"put it there{choice}")
    found = {file: gather(examples(rows_of(file, keys))) for file in dict.fromkeys(files.values())}
    for file in (file for file, rows in found.items() if not rows):
        raise ValueError(f"{file}: got no example, expected at least one; add one")
    dev = held_out(found[train], path, seed, beside) if not own_dev and train in found else set()
    return [[e for e in found[file] if file != train or (e.source in dev) == (split == "dev")]
            for split, file in files.items()]
