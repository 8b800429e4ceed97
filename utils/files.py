"""Files that are whole or absent: written under another name and renamed, downloads checked.

Knows nothing of the project.
"""
import contextlib
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

from utils.terminal import progress


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
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
        # RuntimeError: torch.save on a full disk; others have nothing to do with writing.
        if isinstance(error, OSError) or isinstance(error, RuntimeError) and "write" in str(error):
            raise OSError(f"could not write {path}: {error}; free some space or choose another "
                          "directory, which you may write to; what was there before is "
                          "untouched") from error
        raise


def _chunks(reply, url):
    """The body of a reply piece by piece; a broken connection is a ValueError."""
    length, got = int(reply.headers.get("Content-Length") or 0), 0
    with progress(total=length or None, unit="B", name=url.rsplit("/")[-1], unit_scale=True) as bar:
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
    with reply, atomic_write(path) as file:
        for chunk in _chunks(reply, url):
            file.write(chunk)
            digest.update(chunk.replace(b"\r", b"") if any_line_end else chunk)
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"{url}: got SHA-256 {digest.hexdigest()}, expected {sha256}; nothing "
                             "was kept, run the command again, or fetch the file by hand")
    if not sha256:
        print(f"{path}: SHA-256 {digest.hexdigest()} (none is known to compare it with)",
              file=sys.stderr)
