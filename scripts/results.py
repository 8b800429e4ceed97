"""Files of results: one JSON object a line, added one by one, so that a stopped call can go on."""
import json
from pathlib import Path

from utils.files import append_lines, atomic_write, lock, make_folder


def to_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path, keys=()):
    """The objects in `path`, without a last one that a kill has cut off; [] where no file is.

    Raises ValueError where any other line is no JSON object, or lacks one of `keys`.
    """
    path, rows = Path(path), []
    lines = path.read_bytes().split(b"\n") if path.exists() else []     # cut anywhere: in a letter
    lines = [line for line in lines if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {*keys} <= row.keys():
                raise TypeError("a value that is no object, or of another program")
            rows.append(row)
        except (ValueError, TypeError, RecursionError) as error:
            cut = isinstance(error, ValueError) and line.startswith(b"{")
            if number == len(lines) and cut:
                break
            needed = f" with {', '.join(keys)}" if keys else ""
            raise ValueError(f"got {path}, a line of which is no JSON object{needed} "
                             f"({line[:40]!r}); expected what this program wrote there; mend it, "
                             "or name another file") from error
    return rows


def write_rows(path, rows):
    """Write the whole file, or leave what was there."""
    with atomic_write(path, "w") as file:
        file.writelines(map(to_line, rows))


def lock_rows(path):
    """Be the only process that writes the file, until this one ends; else a ValueError."""
    make_folder(path.parent)
    lock(path.with_name(f".{path.stem}.lock"))


def append_rows(path, rows):
    append_lines(path, map(to_line, rows))
