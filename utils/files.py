"""Files that are whole or absent and on the disk when that is said, and downloads that are checked.

A file is written under another name, flushed to the disk and renamed, and the directory with it, so
that a crash or a power loss leaves the old file or the new one. Knows nothing of the project.
"""
import contextlib
import errno
import hashlib
import http.client
import io
import json
import os
import secrets
import shutil
import sys
import time
import urllib.request
from pathlib import Path

from utils.terminal import progress

# ---- writing

def sync_folder(folder):
    """Flush the names in a directory to the disk; Windows knows no such call."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def make_folder(folder):
    """Create a directory and what is missing above it, on the disk when this returns."""
    for new in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that appears under its name only when it is complete and on the disk.

    A crash, kill -9, a power loss or a full disk leaves the file that was there before. The mode of
    a file that is replaced stays, a new one has what the umask leaves; a symbolic link stays one.
    """
    name, path, temporary = path, Path(os.path.realpath(path)), None
    new_folder = not path.parent.exists()
    if path.exists() and not path.is_file():
        raise ValueError(f"got {name} to write, which is no file; give the name of one")
    try:
        make_folder(path.parent)
        temporary = path.with_name(temporary_name(path.name))
        text = {} if "b" in mode else {"encoding": "utf-8"}
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):          # not there, or not empty
            if temporary:
                temporary.unlink(missing_ok=True)
            if new_folder:
                path.parent.rmdir()
        # torch.save on a full disk; other RuntimeErrors have nothing to do with writing.
        torch_save = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("write", "inline_container"))
        if isinstance(error, OSError) or torch_save:
            raise OSError(f"could not write {name}: {error}; free some space or choose another "
                          "directory, which you may write to; what was there before is "
                          "untouched") from error
        raise


def temporary_name(name, part=None):
    """Under what name a file is written at first. part: its random part, or a pattern for it."""
    return f"{name}.{part or secrets.token_hex(8)}.tmp"


def remove_temporaries(path):
    """Remove what kills in the middle of writing `path` have left; nobody else's files."""
    for left_behind in path.parent.glob(temporary_name(path.name, "[0-9a-f]" * 16)):
        left_behind.unlink()


def append_lines(path, lines):
    """Add whole lines to a file: they are on the disk when this returns, or it is as it was."""
    path, data = Path(path), "".join(lines).encode()
    try:
        new = not path.exists()
        with open(path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while data:
                    data = data[file.write(data):]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"could not write {path}: {error}; free some space; what was there before "
                      "is untouched") from error


def lock(path):
    """Take the lock file `path` for as long as this process lives; readers need none.

    Raises ValueError where another process has it. Where there is no such lock (Windows,
    some network file systems), that is only printed. Returns the file descriptor: to close it, or
    any other of this file in this process, frees the lock.
    """
    number = None
    try:
        import fcntl
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        # Of `open` EACCES says another thing: that the file is somebody else's.
        if number is not None and error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"got {Path(path).parent}, in which another process is writing; wait "
                             "for its end, or choose another directory") from error
        print(f"{path}: no lock can be held here ({error}); start no second process on it",
              file=sys.stderr)
    return number


@contextlib.contextmanager
def locked(path):
    """Hold the lock file `path` for a while: see `lock`."""
    number = lock(path)
    try:
        yield
    finally:
        if number is not None:
            os.close(number)


# ---- reading

LARGEST = 256 << 20     # bytes, unpacked, of what is read as a whole: settings, a document, a line


def plain_file(path):
    """`path`. Raises ValueError for what may never end, as a pipe or a device, and for a directory;
    a file that is not there is for whoever opens it.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"got {path}, which cannot be read (no plain file); expected a file; "
                         "write what it gives to one first")
    return path


def read_whole(path):
    """The bytes of a file, which may have LARGEST; else a ValueError."""
    with open(plain_file(path), "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"got {path} of more than {LARGEST >> 20} MB; expected a smaller file; "
                         "take the right one")
    return data


def read_json_object(path):
    """The dictionary in a JSON file. Raises OSError and ValueError."""
    try:
        about = json.loads(read_whole(path).decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for JSON") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds no JSON object")
    return about


def memory():
    """The bytes of this computer's memory; where that cannot be asked, as on Windows, no limit."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return 1 << 63


# ---- JSON with a checksum of its own

def _sum_of(about):
    return hashlib.sha256(json.dumps(about, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_json(path, about):
    """Write a dictionary as a JSON object, and "sha256", the checksum of the rest."""
    about = about | {"sha256": _sum_of(about)}
    with atomic_write(path, "w") as file:
        json.dump(about, file, indent=1)


def read_json(path):
    """The JSON object in `path` without its "sha256". Raises ValueError where that is not its own;
    an object that has none, as one written by hand, is taken as it is.
    """
    about = read_json_object(path)
    digest = about.pop("sha256", None)
    if digest is not None and digest != _sum_of(about):
        raise ValueError(f"{Path(path).name} is damaged or was edited, its sha256 is another: take "
                         "that line out if you edited it")
    return about


# ---- downloads

UNCHECKED = 100 << 20       # bytes at most of a file without a checksum: settings, a vocabulary
CHECKED = 64 << 30          # and of one with a checksum: GPT-2 xl has 6 GB
# Bytes a second, on average, that a download must have after PATIENCE seconds; else it is given up.
SLOWEST, PATIENCE = 1 << 10, 60


def sha256_of(path, any_line_end=False):
    """SHA-256 of a file, in hex. any_line_end: as if every line ended in "\\n"."""
    digest = hashlib.sha256()
    with open(plain_file(path), "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk.replace(b"\r", b"") if any_line_end else chunk)
    return digest.hexdigest()


class Endless(OSError):
    """An exchange with a server that would take for ever, or all of the disk."""

    @classmethod
    def check(cls, got, began, most):
        seconds = time.monotonic() - began
        if got > most or seconds > PATIENCE and got / seconds < SLOWEST:
            raise cls(f"got {got} bytes in {seconds:.0f} s, expected at most {most} and {SLOWEST} "
                      "a second")


class _Watched(io.RawIOBase):
    """What a server sends, headers and the lengths of chunks included: all of it has to come in
    time, and be less than twice the longest file.
    """

    def __init__(self, raw):
        self.raw, self.got, self.began = raw, 0, time.monotonic()

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.raw.readinto(buffer)
        self.got += count or 0
        Endless.check(self.got, self.began, 2 * CHECKED)
        return count

    def close(self):
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.fp = io.BufferedReader(_Watched(self.fp.detach()))


def _watched(kind):
    def connection(*given, **options):
        made = kind(*given, **options)
        made.response_class = _Response
        return made
    return connection


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, request):
        return self.do_open(_watched(http.client.HTTPConnection), request)

    def https_open(self, request):
        return self.do_open(_watched(http.client.HTTPSConnection), request)


def open_url(request, *handlers):
    """The reply to a request, or to a URL, as urllib gives it. handlers: more of urllib's.

    Raises OSError where there is none, or where the exchange would not end.
    """
    opener = urllib.request.build_opener(_Handler, *handlers)
    try:
        return opener.open(request, timeout=PATIENCE)       # seconds without a single byte
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error


def _chunks(reply, url, most):
    """The body of a reply piece by piece, `most` bytes at most; a broken or endless one is a
    ValueError.
    """
    length, got, began = reply.headers.get("Content-Length") or "0", 0, time.monotonic()
    if not length.isdecimal():
        raise ValueError(f"{url}: got a Content-Length of {length!r:.40}, expected a number; fetch "
                         "the file by hand")
    length = int(length)
    with progress(total=length or None, unit="B", name=url.rsplit("/")[-1], unit_scale=True) as bar:
        while True:
            try:
                chunk = reply.read1(1 << 20)            # what has come: it waits for no full MB
                got += len(chunk)
                Endless.check(got, began, most)
            except Endless as error:
                raise ValueError(f"{url}: {error}; nothing was kept, run the command again, or "
                                 "fetch the file by hand") from error
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(f"{url}: the connection broke after {got} bytes ({error}); "
                                 "nothing was kept, run the command again") from error
            if not chunk:
                break
            yield chunk
            bar.update(len(chunk))
    if length and got != length:
        raise ValueError(f"{url}: got {got} bytes, expected {length}; nothing was kept, run the "
                         "command again")


def fetch_bytes(url):
    """What is at `url`, 100 MB at most, for whoever knows its checksum. Raises as `download`."""
    with open_url(url) as reply:
        return b"".join(_chunks(reply, url, UNCHECKED))


def download(url, path, sha256=None, any_line_end=False):
    """Fetch `url` to `path` with a progress bar; the file appears only when whole and checked.

    sha256: expected hex digest; None where none is known: then the file may have 100 MB, not 64 GB,
    and the digest is printed, so that it can be compared later. any_line_end: see `sha256_of`.
    Raises ValueError for a wrong digest or a cut transfer, OSError when there is nothing to fetch.
    """
    digest = hashlib.sha256()
    try:
        reply = open_url(url)
    except OSError as error:                # urllib's own errors, too
        raise OSError(f"could not download {url}: {error}; check the connection, or fetch it on "
                      f"another machine and put it at {path}") from error
    with reply, atomic_write(path) as file:
        for chunk in _chunks(reply, url, CHECKED if sha256 else UNCHECKED):
            file.write(chunk)
            digest.update(chunk.replace(b"\r", b"") if any_line_end else chunk)
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"{url}: got SHA-256 {digest.hexdigest()}, expected {sha256}; nothing "
                             "was kept, run the command again, or fetch the file by hand")
    if not sha256:
        print(f"{path}: SHA-256 {digest.hexdigest()} (none is known to compare it with)",
              file=sys.stderr)


def fetch_file(url, path, sha256=None, any_line_end=False):
    """`download`, unless the file is there already and is the right one.

    One with another digest is fetched again. Where none is known it is printed instead.
    """
    if not path.exists():
        download(url, path, sha256, any_line_end)
        return
    found = sha256_of(path, any_line_end)
    if sha256 in (None, found):
        print(f"{path} is there already, SHA-256 {found}"
              + ("" if sha256 else " (none is known to compare it with)"), file=sys.stderr)
        return
    print(f"{path} is damaged: SHA-256 {found}, expected {sha256}; it is fetched again",
          file=sys.stderr)
    download(url, path, sha256, any_line_end)
