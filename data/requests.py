"""What sample.py has to decode, and its answers: the sources of a file, which run answers each."""
import json
from pathlib import Path

from data import formats, own
from data.example import check_text, short


def find_run(name, runs, where):
    """The run in `runs` that a request means by `name`: a path as in --run, or its last part.

    where: the file and its line, for the ValueError where no run fits, or more than one.
    """
    if name is None and len(runs) <= 1:
        return runs[0] if runs else None
    fits = [run for run in runs if isinstance(name, str)
            and Path(name) in (Path(run), Path(Path(run).name))]        # out/A/ is out/A
    if len(fits) != 1:
        raise ValueError(f"{where}: got the run {short(name)}; expected one of {', '.join(runs)}; "
                         'write it as in --run, {"source": ..., "run": ...}')
    return fits[0]


def plain_lines(path):
    """(where, line) of a text file, without the blank lines and the white space at its end."""
    held = skipped = None           # the newest line that counts, the first blank one after it
    for number, line in enumerate(formats.text_lines(path), 1):
        here = f"{path}, line {number}", line.removesuffix("\n")
        if held and not line.strip():
            skipped = skipped or here
            continue
        yield from filter(None, (held, skipped))
        held, skipped = here, None
    where, line = held or (f"{path}, line 1", "")
    yield where, line.rstrip()


def read_requests(path, runs, key="source"):
    """Yield (source, the run that answers it) for each line of a file or, where own.py reads the
    file, from `key` and "run" of each object. Raises ValueError for a line that is no source, a
    blank one too: if it were skipped, every text after it would stand on the wrong line.
    """
    if own.suffix_of(path) in own.SUFFIXES:
        rows = ((where, row[key], find_run(row.get("run"), runs, where))
                for where, row in own.objects(path, (key,), f"rename it; the run calls it {key}"))
    elif len(runs) > 1:
        raise ValueError(f"got --input {path} and several --run; expected a .jsonl file whose "
                         'lines name their run, {"source": ..., "run": ...}; or give one --run')
    else:
        rows = ((where, line, "".join(runs)) for where, line in plain_lines(path))
    for where, source, run in rows:
        check_text(source, "source", where)
        yield source, run


def check_output(output, source):
    """Raise ValueError where the answers to the file `source` cannot be written to the file
    `output`. "" means that the flag was left out.
    """
    if output and not source:
        raise ValueError("got --output without --input; expected both, or > FILE for one text")
    path = Path(output)
    if own.suffix_of(path) in (".json", ".csv", ".tsv"):
        raise ValueError(f"got --output {output}; expected a .jsonl file, or another for texts "
                         "alone; give another name")
    if output and path.exists() and not path.is_file():
        raise ValueError(f"got --output {output}, which is no file; expected a file; give another "
                         "name")
    if output and path.exists() and path.resolve() == Path(source).resolve():
        raise ValueError(f"got --output {output}, which is --input; expected another file, for "
                         "this would replace the sources; give another name")


def answer_line(source, text, run=None, as_json=False):
    """The line of a file for a text: the text, or an object with its source, and its run if given.
    """
    if not as_json:
        return " ".join(text.splitlines()) + "\n"
    row = {"source": source, "text": text} | ({"run": run} if run else {})
    return json.dumps(row, ensure_ascii=False) + "\n"
