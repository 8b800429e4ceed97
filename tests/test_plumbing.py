"""Flags, one-line errors, files that are whole or absent, downloads that are checked."""
import dataclasses
import hashlib
import http.server
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from plumbing import download, flag, parse, run, whole_file

ROOT = Path(__file__).resolve().parent.parent


# ---- flags

@dataclasses.dataclass
class Settings:
    prompt: str = flag("", "what to continue")
    epochs: int = flag(5, "times through the data")
    lr: float = flag(5e-5, "learning rate, 100 % of it at the start")
    method: str = flag("prefix", "what learns", choices=("prefix", "finetune"))
    mid_dim: int = flag(None, "width of the MLP; left out: the data set's", kind=int)
    compile: bool = flag(False, "compile the model")
    run: list = flag([], "a run, may be repeated")
    warmup: int = flag(0, "steps in which the rate rises")


def parsed(*argv):
    return parse(Settings, list(argv), "a test", positional="prompt")


def test_what_is_left_out_keeps_its_default():
    """Would catch a default that argparse turns into something else, and None becoming a list."""
    assert parsed() == Settings("", 5, 5e-5, "prefix", None, False, [])


def test_what_is_given_has_its_type():
    """Would catch a number that stays text, and a repeated flag of which the last wins."""
    assert parsed("the text", "--epochs", "3", "--lr=1e-4", "--mid-dim", "800", "--compile",
                  "--method", "finetune", "--run", "a", "--run", "b") == Settings(
        "the text", 3, 1e-4, "finetune", 800, True, ["a", "b"])


@pytest.mark.parametrize("argv, told", [
    (["--ephocs", "3"], "did you mean --epochs?"),
    (["--ephocs=3"], "did you mean --epochs?"),
    (["--epoch", "3"], "did you mean --epochs?"),      # no silent abbreviation
    (["--zzz"], "unknown argument '--zzz'"),
    (["--method", "prefx"], "prefx"),
    (["--epochs", "many"], "many"),
    (["--epochs"], "--epochs"),
    (["one", "two"], "two"),
])
def test_a_wrong_flag_is_one_line_with_the_next_step(argv, told):
    """Would catch a flag that is ignored silently, and argparse's page of usage."""
    with pytest.raises(ValueError) as caught:
        parsed(*argv)
    message = str(caught.value)
    assert told in message and "--help" in message and "\n" not in message


def test_help_names_every_flag_with_its_default(capsys):
    """Would catch a percent sign in a help text, at which argparse stumbles."""
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    told = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--mid-dim" in told and "100 %" in told and "(default: 5)" in told
    assert "rises (default: 0)" in told and "(default: False)" not in told


# ---- errors

def test_a_users_mistake_is_one_line_and_status_2(capsys):
    """Would catch a traceback, an error of two lines, and status 0 after an error."""
    def main():
        raise ValueError("got this,\n  expected that")
    with pytest.raises(SystemExit) as caught:
        run(main)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err) == (2, "", "error: got this, expected that\n")


def test_our_own_mistake_keeps_its_traceback():
    """Would catch a bug that hides as a tidy message."""
    with pytest.raises(KeyError):
        run(lambda: {}["missing"])


# ---- whole files

@pytest.mark.parametrize("mistake", [ValueError("no"), OSError(28, "No space left on device"),
                                     RuntimeError("torch: file write failed"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_file_and_no_rest(tmp_path, mistake):
    """Would catch a half-written checkpoint under the good one's name."""
    path = tmp_path / "new" / "file"
    with whole_file(path, "w") as file:
        file.write("old \u00a3")
    with pytest.raises((type(mistake), OSError)) as caught:
        with whole_file(path, "w") as file:
            file.write("new")
            raise mistake
    assert path.read_text("utf-8") == "old \u00a3" and list(path.parent.iterdir()) == [path]
    if isinstance(mistake, (OSError, RuntimeError)):
        assert str(path) in str(caught.value) and "untouched" in str(caught.value)
    assert path.stat().st_mode & 0o077 == 0o044, "others may read what a colleague computed"


def test_a_killed_process_leaves_the_old_file(tmp_path):
    """Would catch writing in place: kill -9 runs no handler that could tidy up."""
    path = tmp_path / "file"
    path.write_text("old")
    program = ("import sys, time\nfrom plumbing import whole_file\n"
               f"with whole_file({str(path)!r}) as file:\n"
               "    file.write(b'x' * 100_000); file.flush(); print('writing', flush=True)\n"
               "    time.sleep(60)\n")
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert path.read_text() == "old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """Would catch an error that names a temporary file nobody has heard of."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write .*file/below.pt"):
        with whole_file(tmp_path / "file" / "below.pt"):
            pass


# ---- downloads, from a server on this machine

BODY = bytes(range(256)) * (12 << 10)    # 3 MiB, so more than one piece
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.send_header("X-Linked-ETag", f'"{"0" * 64}"')
            self.end_headers()
        elif self.path == "/silent":
            self.close_connection = True                    # no answer at all
        else:
            self.send_response(200)
            if self.path == "/chunked":                     # cut without a length to notice it by
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"100000\r\n" + BODY[:1000])
                return
            if self.path != "/unsized":
                self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:1000] if self.path == "/cut" else BODY)

    def log_message(self, *arguments):
        """Say nothing: the tests' output is not the place."""


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("page", ["/whole", "/moved", "/unsized"])
def test_a_download_is_the_file_and_nothing_else(server, tmp_path, page):
    """Would catch pieces that are lost, and the digest of a redirect taken for the file's."""
    path = tmp_path / "new" / "file"
    download(server + page, path, DIGEST)
    assert path.read_bytes() == BODY and list(path.parent.iterdir()) == [path]


def test_a_digest_that_nobody_knows_is_printed(server, tmp_path, capsys):
    """Would catch an unchecked file that looks like a checked one."""
    download(server + "/whole", tmp_path / "file")
    out, err = capsys.readouterr()
    assert DIGEST in err and out == ""
    download(server + "/whole", tmp_path / "file", DIGEST)
    assert DIGEST not in capsys.readouterr().err


@pytest.mark.parametrize("page, sha256, told", [
    ("/whole", "0" * 64, f"got SHA-256 {DIGEST}, expected {'0' * 64}"),
    ("/cut", DIGEST, f"got 1000 bytes, expected {len(BODY)}"),
    ("/cut", None, f"got 1000 bytes, expected {len(BODY)}"),
    ("/chunked", None, "the connection broke"),
    ("/missing", DIGEST, "404"),
    ("/silent", DIGEST, "could not download"),
])
def test_a_bad_download_leaves_what_was_there(server, tmp_path, page, sha256, told):
    """Would catch a cut file that is kept and believed for ever, or a full disk that is blamed."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises((ValueError, OSError)) as caught:
        download(server + page, path, sha256)
    message = str(caught.value)
    assert told in message and server + page in message and "free some space" not in message
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_host_that_is_not_there_is_said_with_a_way_out(tmp_path):
    """Would catch a traceback on a machine without a network."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))                       # bound, but nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        with pytest.raises(OSError, match="fetch it on another machine and put it at"):
            download(url, tmp_path / "file")
    with pytest.raises(ValueError):
        download("no address", tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_line_ends_can_be_left_out_of_the_digest(server, tmp_path):
    """Would catch a right file that is refused because its lines end in another way."""
    digest = hashlib.sha256(BODY.replace(b"\r", b"")).hexdigest()
    download(server + "/whole", tmp_path / "file", digest, any_line_end=True)
    assert (tmp_path / "file").read_bytes() == BODY, "the file itself stays as it is"
