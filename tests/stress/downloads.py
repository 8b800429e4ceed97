"""Servers that cut, drip, never end, lie and say nothing: a download is whole and right, or absent.

    python tests/stress/downloads.py --count 5

Each misbehaviour, `count` times, with a known checksum and without one: the download ends soon, in
an error of one line that names the address, and the file that was there before is untouched. A file
that lies there cut or damaged is fetched again. What the program waits for is made shorter here.
"""
import contextlib
import hashlib
import http.server
import io
import signal
import threading
import time
from pathlib import Path

from common import empty_folder, end, parse

from utils import files

BODY = bytes(range(256)) * 4096                 # a megabyte
SUM = hashlib.sha256(BODY).hexdigest()
PATIENCE, SOON = 1, 10                          # seconds
BAD = ("cut", "cut-chunked", "drip", "drip-header", "drip-chunk", "drip-continue", "stall",
       "endless", "silent", "garbage", "loop", "404", "500", "negative", "huge-header", "wrong")


class Hangs(BaseException):
    """What nobody in between takes for an error of the connection."""


def hang(number, frame):
    raise Hangs


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with contextlib.suppress(OSError):      # the client has had enough
            getattr(self, self.path[1:].replace("-", "_"), self.other)()

    def head(self, length=None, **headers):
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def whole(self):
        self.head(len(BODY))
        self.wfile.write(BODY)

    def wrong(self):
        self.head(len(BODY))
        self.wfile.write(BODY[::-1])

    def cut(self):
        self.head(len(BODY))
        self.wfile.write(BODY[:1000])

    def cut_chunked(self):
        self.head(Transfer_Encoding="chunked")
        self.wfile.write(b"100000\r\n" + BODY[:1000])

    def slowly(self, pieces):
        for piece in pieces:
            self.wfile.write(piece)
            time.sleep(0.05)

    def drip(self):
        self.head(len(BODY))
        self.slowly(bytes([byte]) for byte in BODY)

    def drip_header(self):
        self.slowly([b"HTTP/1.1 200 OK\r\nX: "] + [b"x"] * 10_000)

    def drip_chunk(self):
        self.head(Transfer_Encoding="chunked")
        self.slowly([b"0"] * 10_000)

    def drip_continue(self):
        self.slowly([b"HTTP/1.1 100 Continue\r\n", b"\r\n"] * 10_000)

    def stall(self):
        self.head(len(BODY))
        self.wfile.write(BODY[:1000])
        time.sleep(3 * PATIENCE)

    def endless(self):
        self.head()
        while True:
            self.wfile.write(BODY)

    def silent(self):
        self.close_connection = True

    def garbage(self):
        self.wfile.write(b"\x00\xff garbage\r\n\r\n")

    def loop(self):
        self.send_response(302)
        self.send_header("Location", self.path)
        self.end_headers()

    def negative(self):
        self.head(-5)
        self.wfile.write(BODY[:10])

    def huge_header(self):
        self.head(len(BODY), X="x" * (1 << 20))

    def other(self):
        self.send_error(int(self.path[1:]))

    def log_message(self, *words):
        """The harness's own lines are enough."""


def one(url, path, sha256, kind):
    """What went wrong with one download, as a list."""
    path.write_bytes(b"old")
    began, error = time.monotonic(), None
    signal.alarm(2 * SOON)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            files.download(f"{url}/{kind}", path, sha256)
    except Hangs:
        return [f"{kind}: hangs"]
    except (ValueError, OSError) as caught:
        error = caught
    except Exception as caught:
        return [f"{kind}: {type(caught).__name__}: {caught}"]
    finally:
        signal.alarm(0)
    seconds, found = time.monotonic() - began, []
    if seconds > SOON:
        found.append(f"{kind}: {seconds:.0f} s")
    if error is None and not (kind == "whole" or sha256 is None and kind == "wrong"):
        found.append(f"{kind}: taken")
    if error and kind == "whole":
        found.append(f"whole: refused: {error}")
    if error and f"{url}/{kind}" not in str(error):
        found.append(f"{kind}: {error}")
    if error and path.read_bytes() != b"old" or [*path.parent.glob("*.tmp")]:
        found.append(f"{kind}: what was there is gone, or a temporary file is left")
    return found


def there_already(url, path):
    """A file that is there: whole, cut, damaged."""
    found = []
    for body in (BODY, BODY[:-1], b"", BODY[:99] + b"\0" + BODY[100:]):
        path.write_bytes(body)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            files.fetch_file(f"{url}/whole", path, SUM)
        if path.read_bytes() != BODY or ("damaged" in said.getvalue()) != (body != BODY):
            found.append(f"there already with {len(body)} bytes: {said.getvalue()}")
    return found


def main():
    args, failures = parse(__doc__, 5), []
    files.PATIENCE, files.UNCHECKED = PATIENCE, 10 << 20
    signal.signal(signal.SIGALRM, hang)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server, empty_folder():
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for _ in range(args.count):
            for kind in ("whole", *BAD):
                for sha256 in (SUM, None) if kind != "endless" else (None,):
                    failures += one(url, Path("file"), sha256, kind)
            failures += there_already(url, Path("file"))
        server.shutdown()
    end(f"{args.count} times {len(BAD)} kinds of bad servers", failures)


if __name__ == "__main__":
    main()
