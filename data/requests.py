"""What sample.py has to decode: the sources of a file, and which run answers each."""
from pathlib import Path

from data import formats


def find_run(name, runs, where):
    """The one of `runs` that a request calls `name`: as on the command line, or its last part.

    where: the file and its line, for the ValueError if none is called so, or several are.
    """
    if name is None and len(runs) <= 1:
        return runs[0] if runs else None
    fits = [run for run in runs if name in (run, Path(run).name)]
    if len(fits) != 1:
        raise ValueError(f"{where}: got the run {name!r}; expected one of {', '.join(runs)}; write "
                         'it as in --run, {"source": ..., "run": ...}')
    return fits[0]


def read_requests(path, runs):
    """The sources of a file, and which run answers each: its lines, or the "source" (and "run") of
    each line where it is JSON lines. Raises ValueError for a line that is no source.
    """
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        rows = formats.read_jsonl(path, need=("source",))
        return ([row["source"] for row in rows],
                [find_run(row.get("run"), runs, f"{path}, source {row['source'][:40]!r}")
                 for row in rows])
    if len(runs) > 1:
        raise ValueError(f"got --input {path} and several --run; expected a .jsonl file whose "
                         'lines name their run, {"source": ..., "run": ...}')
    lines = [line.removesuffix("\r") for line in formats.read_text(path).rstrip().split("\n")]
    if lines == [""]:
        raise ValueError(f"got {path}, which is empty; expected one source a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():            # dropped, it would shift every text after it by one line
            raise ValueError(f"{path}, line {number}: got a blank line, expected a source; "
                             "delete it")
    return lines, runs * len(lines)
