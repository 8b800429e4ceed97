"""What sample.py has to decode: the sources of a file, and which run answers each."""
from pathlib import Path

from data import formats
from data.example import check_text, short


def find_run(name, runs, where):
    """The one of `runs` that a request calls `name`: as on the command line, or its last part.

    where: the file and its line, for the ValueError if none is called so, or several are.
    """
    if name is None and len(runs) <= 1:
        return runs[0] if runs else None
    fits = [run for run in runs if name in (run, Path(run).name)]
    if len(fits) != 1:
        raise ValueError(f"{where}: got the run {short(name)}; expected one of {', '.join(runs)}; "
                         'write it as in --run, {"source": ..., "run": ...}')
    return fits[0]


def read_requests(path, runs):
    """The sources of a file, and which run answers each: its lines, or the "source" (and "run") of
    each line where it is JSON lines. Raises ValueError for a line that is no source.
    """
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        rows = list(formats.json_objects(path, ("source",)))
        sources = [(where, row["source"]) for where, row in rows]
        named = [find_run(row.get("run"), runs, where) for where, row in rows]
    elif len(runs) > 1:
        raise ValueError(f"got --input {path} and several --run; expected a .jsonl file whose "
                         'lines name their run, {"source": ..., "run": ...}')
    else:
        lines = formats.read_text(path).rstrip().split("\n")
        sources = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]
        named = runs * len(lines)
    for where, source in sources:       # dropped, a blank one would shift all texts after it
        check_text(source, "source", where)
    return [source for _, source in sources], named
