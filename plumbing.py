"""Everything that is not about prefix-tuning: flags, one-line errors, files that are whole or
absent.

Every program here keeps its settings in one dataclass whose fields carry their own help text, so
that the dataclass is the documentation of the flags. A mistake a user can make is a ValueError or
an OSError that says what was got, what was expected and what to do next; `run` turns it into one
line and exit status 2. Called by every other file; imports none of them.
"""
import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import http.client
import math
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

from tqdm import tqdm


def flag(default, text, choices=None, kind=None, within=None):
    """A field of a settings dataclass: its default, its help text, and the values it may take, as
    `choices` or as `within`, the lowest and the highest number.
    """
    metadata = {"help": text, "choices": choices, "kind": kind or type(default), "within": within}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; `{self.prog} --help` lists every flag")


def parse(settings, argv, description, positional=None, notes=""):
    """Read `argv` into an instance of the dataclass `settings`; `positional` names the field
    without dashes.

    A field whose default is a list is a flag that may be repeated; one whose default is None stays
    None when it is left out. The attribute `given` of what is returned has the names of the fields
    that argv tells. notes: shown at the end of --help. An unknown flag raises ValueError and names
    the flag that was probably meant.
    """
    parser = _OneLineParser(description=description, epilog=notes, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            argument_default=argparse.SUPPRESS)
    flags = {}
    for field in dataclasses.fields(settings):
        kind, choices = field.metadata["kind"], field.metadata["choices"]
        repeated = field.default is dataclasses.MISSING
        plain = repeated or field.default in (None, "") or field.default is False
        told = "" if plain else f" (default: {field.default})"
        about = {"help": (field.metadata["help"] + told).replace("%", "%%")}
        if field.name == positional:
            parser.add_argument(field.name, nargs="?", **about)
            continue
        flags["--" + field.name.replace("_", "-")] = about | {"dest": field.name} | (
            {"action": "store_true"} if kind is bool else
            {"action": "append", "type": str if kind is list else kind} if repeated else
            {"type": kind, "choices": choices})
    for name, about in flags.items():
        parser.add_argument(name, **about)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        raise ValueError(f"unknown argument {unknown[0]!r}; "
                         + (f"did you mean {near[0]}? " if near else "")
                         + f"`{parser.prog} --help` lists every flag")
    for field in dataclasses.fields(settings):
        low, high = field.metadata["within"] or (None, None)
        if low is not None and field.name in given and not low <= given[field.name] <= high:
            wanted = f"at least {low}" if high == math.inf else f"a number from {low} to {high}"
            raise ValueError(f"got --{field.name.replace('_', '-')} {given[field.name]}; expected "
                             f"{wanted}")
    found = settings(**given)       # what was left out takes the dataclass's own default
    found.given = set(given)
    return found


def run(main):
    """Call `main()` as a program: a user's mistake is one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def whole_file(path, mode="wb"):
    """Open a file that appears under its name only when it is complete.

    It is written under a temporary name in the same directory, flushed to the disk and renamed; a
    crash, kill -9 or a full disk leaves the file that was there before.
    """
    path = Path(path)
    temporary, new_folder = None, not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)             # mkstemp's 0600 would hide a result from a colleague
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if new_folder:
            with contextlib.suppress(OSError):      # not there, or not empty
                path.parent.rmdir()
        if isinstance(error, (OSError, RuntimeError)):  # RuntimeError: torch.save on a full disk
            raise OSError(f"could not write {path}: {error}; free some space or choose another "
                          "directory; what was there before is untouched") from error
        raise


def _chunks(reply, url):
    """The body of a reply piece by piece; a broken connection is a ValueError that says so."""
    length, got = int(reply.headers.get("Content-Length") or 0), 0
    with tqdm(total=length or None, unit="B", unit_scale=True, desc=url.rsplit("/")[-1]) as bar:
        while True:
            try:
                chunk = reply.read(1 << 20)
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(f"{url}: the connection broke after {got} bytes ({error}); "
                                 "nothing was kept, run the command again") from error
            if not chunk:
                break
            yield chunk
            got += len(chunk)
            bar.update(len(chunk))
    if length and got != length:
        raise ValueError(f"{url}: got {got} bytes, expected {length}; nothing was kept, run the "
                         "command again")


def download(url, path, sha256=None, any_line_end=False):
    """Fetch `url` to `path` with a progress bar; the file appears only when whole and checked.

    sha256: expected hex digest; None where none is known: then the digest is printed, so that it
    can be compared later. any_line_end: take the digest as if every line ended in "\\n".
    Raises ValueError for a wrong digest or a cut transfer, OSError when there is nothing to fetch.
    """
    digest = hashlib.sha256()
    try:
        reply = urllib.request.urlopen(url, timeout=60)     # seconds without a single byte
    except (OSError, http.client.HTTPException) as error:   # urllib's own errors are OSErrors
        raise OSError(f"could not download {url}: {error}; check the connection, or fetch it on "
                      f"another machine and put it at {path}") from error
    with reply, whole_file(path) as file:
        for chunk in _chunks(reply, url):
            file.write(chunk)
            digest.update(chunk.replace(b"\r", b"") if any_line_end else chunk)
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"{url}: got SHA-256 {digest.hexdigest()}, expected {sha256}; nothing "
                             "was kept, run the command again, or fetch the file by hand")
    if not sha256:
        print(f"{path}: SHA-256 {digest.hexdigest()} (none is known to compare it with)",
              file=sys.stderr)
