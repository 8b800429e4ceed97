"""Flags, one-line errors, files that are whole or absent, downloads that are checked."""
import dataclasses
import hashlib
import http.server
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import sample
import train
from data.tokenizer import byte_level_bpe
from pretrained.hub import declared_sha256
from utils.cli import flag, parse, run_child, run_program, stop_after_this_step
from utils.files import (
    append_lines,
    atomic_write,
    download,
    fetch_bytes,
    fetch_file,
    read_json,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent


# ---- flags

@dataclasses.dataclass
class Settings:
    prompt: str = flag("", "what to continue")
    epochs: int = flag(5, "times through the data")
    lr: float = flag(5e-5, "learning rate, 100 % of it at the start", alias="learning-rate")
    method: str = flag("prefix", "what learns", choices=("prefix", "finetune"))
    mid_dim: int = flag(None, "width of the MLP; left out: the data set's", kind=int)
    max_new_tokens: int = flag(None, "tokens at most", kind=int, within=(1, 1000), alias="max-new")
    compile: bool = flag(False, "compile the model")
    run: list = flag([], "a run, may be repeated")
    warmup: int = flag(0, "steps in which the rate rises")


def parsed(*argv):
    return parse(Settings, list(argv), "a test", positional="prompt")


def test_what_is_left_out_keeps_its_default():
    """Would catch a default that argparse turns into something else, and None becoming a list."""
    assert parsed() == Settings("", 5, 5e-5, "prefix", None, None, False, [])


def test_what_is_given_has_its_type():
    """Would catch a number that stays text, and a repeated flag of which the last wins."""
    assert parsed("the text", "--epochs", "3", "--lr=1e-4", "--mid-dim", "800", "--compile",
                  "--method", "finetune", "--run", "a", "--run", "b") == Settings(
        "the text", 3, 1e-4, "finetune", 800, None, True, ["a", "b"])


@pytest.mark.parametrize("argv, words", [
    (["--ephocs", "3"], "did you mean --epochs?"),
    (["--ephocs=3"], "did you mean --epochs?"),
    (["--epoch", "3"], "did you mean --epochs?"),      # no silent abbreviation
    (["--zzz"], "unknown argument '--zzz'"),
    (["one", "--epochs", "3", "out/two"], "'out/two'; a flag has to stand before it; `python"),
    (["--learning-rat", "3"], "did you mean --learning-rate?"),
    (["--max-ne=3"], "did you mean --max-new?"),
    (["--method", "prefx"], "prefx"),
    (["--epochs", "many"], "many"),
    (["--epochs"], "--epochs"),
    (["one", "two"], "two"),
    (["--method=--"], "got --method=--; expected a value"),
    (["--epochs=--"], "got --epochs=--; expected a value"),
    (["--run=--"], "got --run=--; expected a value"),
    (["--max-new", str(2 ** 63)], "expected a number from 1 to 1,000"),
])
def test_a_wrong_flag_is_one_line_with_the_next_step(argv, words):
    """Would catch a flag that is ignored silently, and argparse's page of usage."""
    with pytest.raises(ValueError) as caught:
        parsed(*argv)
    message = str(caught.value)
    assert words in message and "\n" not in message
    assert "--help" in message or "expected" in message


def test_words_without_a_flag_may_be_many():
    """Would catch: one of several files left out, a flag that is taken for one of them."""
    @dataclasses.dataclass
    class Many:
        files: list = flag([], "which")
        out: str = flag("", "where")
    assert parse(Many, ["--out", "x", "a", "b"], "a test", "files") == Many(["a", "b"], "x")
    assert parse(Many, [], "a test", "files") == Many([], "")


@pytest.mark.parametrize("argv", [["--learning-rate", "1e-4", "--max-new=7"],
                                  ["--lr", "1e-4", "--max-new-tokens", "7"]])
def test_an_alias_is_the_same_flag(argv):
    """Would catch a second name that sets nothing, or that is not counted as given."""
    settings = parsed(*argv)
    assert (settings.lr, settings.max_new_tokens) == (1e-4, 7)
    assert settings.given == {"lr", "max_new_tokens"}
    with pytest.raises(ValueError, match="got --max-new-tokens 0; expected a number from 1 to"):
        parsed("--max-new", "0")


def test_the_programs_know_the_aliases():
    """Would catch a flag of the programs that was renamed without its old name."""
    found = parse(train.Settings, ["--learning-rate", "1", "--warmup-steps", "2",
                                   "--max-grad-norm", "3"], "")
    assert (found.lr, found.warmup, found.clip) == (1, 2, 3)
    found = parse(sample.Settings, ["--max-new", "4", "--min-new", "2", "--beam", "3",
                                    "--no-repeat", "5"], "")
    assert (found.max_new_tokens, found.min_new_tokens, found.num_beams,
            found.no_repeat_ngram_size) == (4, 2, 3, 5)


def test_help_names_every_flag_with_its_default(capsys):
    """Would catch a percent sign in a help text, at which argparse stumbles."""
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--lr LR, --learning-rate LR" in out or "--lr, --learning-rate LR" in out
    assert "--mid-dim" in out and "100 %" in out and "(default: 5)" in out
    assert "tokens at most (1 to 1,000)" in out
    assert "rises (default: 0)" in out and "(default: False)" not in out


@pytest.mark.parametrize("program", [train, sample])
def test_help_has_groups_and_each_an_example_that_is_understood(program, capsys):
    """Would catch: a page of forty flags in one heap, an example with a flag that has gone."""
    groups = [field for field in dataclasses.fields(program.Settings) if field.metadata["group"]]
    with pytest.raises(SystemExit):
        parse(program.Settings, ["--help"], "", "prompt")
    examples = re.findall("\n  example: (.*)", capsys.readouterr().out)
    assert len(examples) == len(groups) >= 4
    for example in examples:
        python, name, *argv = shlex.split(example)
        assert (python, name) == ("python", f"{program.__name__}.py")
        assert parse(program.Settings, argv, "", "prompt").given


# ---- errors

def test_a_users_mistake_is_one_line_and_status_2(capsys):
    """Would catch a traceback, an error of two lines, and status 0 after an error."""
    def main():
        raise ValueError("got this,\n  expected that")
    with pytest.raises(SystemExit) as caught:
        run_program(main)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err) == (2, "", "error: got this, expected that\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_standard_output_is_utf_8(encoding):
    """Would catch: hours of decoding of which nothing is written, for a letter that is not there.
    """
    program = (r"from utils.cli import run_program; run_program(lambda: print('Caf\xe9 \u6771 "
               r"\ud83d'))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode("utf-8").split() == ["Café", "\u6771", r"\ud83d"]


class Panic(BaseException):
    """As the panic of a package in Rust: no Exception."""


@pytest.mark.parametrize("mistake, words", [
    (KeyError("missing"), "got KeyError: 'missing', which this program did not expect"),
    (RecursionError("too deep"), "did not expect; run it again with PREFIX_TUNING_TRACEBACK=1"),
    (Panic("rust\npanicked"), "got Panic: rust,"),
])
def test_our_own_mistake_is_one_line_that_says_how_to_see_it(capsys, monkeypatch, mistake, words):
    """Would catch a page of traceback for a user, and a bug that hides as a tidy message."""
    def main():
        raise mistake
    monkeypatch.delenv("PREFIX_TUNING_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        run_program(main)
    err = capsys.readouterr().err
    assert caught.value.code == 70 and err.count("\n") == 1 and words in err
    monkeypatch.setenv("PREFIX_TUNING_TRACEBACK", "1")
    with pytest.raises(type(mistake)):
        run_program(main)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), MemoryError()])
def test_out_of_memory_is_one_line_that_names_flags(capsys, error):
    """Would catch: a traceback of a hundred lines in the place of what to do."""
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        run_program(main, "a smaller --batch-size")
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: out of memory (")
    assert err.endswith("); try a smaller --batch-size\n") and err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:                   # another is no such thing
        run_program(lambda: torch.ones(2) @ torch.ones(3))
    assert caught.value.code == 70 and "out of memory" not in capsys.readouterr().err


GOES_ON = "; run the same command again to go on"


def test_a_program_ends_with_the_status_that_it_returns(capsys):
    """Would catch half a prefix that is scored: `train && evaluate` after a signal."""
    for returned, status in ((143, 143), (0, None), (None, None)):
        if status is None:
            run_program(lambda returned=returned: returned)
            continue
        with pytest.raises(SystemExit) as caught:
            run_program(lambda returned=returned: returned)
        assert caught.value.code == status

    def interrupted(*number):
        raise KeyboardInterrupt(*number)
    for number, status, goes_on in (((), 130, False), ((signal.SIGTERM,), 143, True)):
        with pytest.raises(SystemExit) as caught:
            run_program(lambda number=number: interrupted(*number), goes_on=goes_on)
        assert caught.value.code == status
        assert capsys.readouterr().err == f"interrupted{GOES_ON * goes_on}\n"


def test_an_error_without_a_file_is_of_the_standard_output(capsys):
    """Would catch "[Errno 28] No space left on device", and nobody knows where."""
    def main():
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit):
        run_program(main)
    assert capsys.readouterr().err.startswith("error: standard input or output: [Errno 28]")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_reader_who_has_enough_is_no_error():
    """Would catch: an error after `sample.py ... | head -1`."""
    program = "from utils.cli import run_program; run_program(lambda: print('x' * 10 ** 6))"
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    child.stdout.read(1)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 141
    child.stderr.close()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_terminal_that_closes_ends_the_step_unless_nohup_says_no(monkeypatch):
    """Would catch a run lost with its window; and one that stops although it was to stay."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)       # these tests may run under nohup
    try:
        with stop_after_this_step() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals == [signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_after_this_step() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals == []
    finally:
        signal.signal(signal.SIGHUP, before)


STOPPED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it
from utils.cli import run_child, run_program
from utils.files import atomic_write

def main():
    with atomic_write(sys.argv[1]):
        run_child([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); "
                   "time.sleep(60)"])
run_program(main)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_program_stops_its_child_and_puts_its_files_away(tmp_path, number):
    """Would catch: a training that goes on alone, an output.tmp that stays, status 2."""
    run = subprocess.Popen([sys.executable, "-c", STOPPED, tmp_path / "file"], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child = int(run.stdout.readline())
    assert len(list(tmp_path.iterdir())) == 1
    run.send_signal(number)
    assert run.wait(20) == 128 + number and not list(tmp_path.iterdir())
    run.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no os.wait4")
def test_a_child_that_was_stopped_is_no_failure():
    """Would catch: 143 that becomes an error, "mend that", where somebody has stopped it."""
    def child(end):
        return run_child([sys.executable, "-c", f"import os, sys; {end}"])
    assert child("sys.exit(0)").ru_maxrss > 0
    for end in ("sys.exit(143)", "os.kill(os.getpid(), 15)"):
        with pytest.raises(KeyboardInterrupt) as caught:
            child(end)
        assert caught.value.args == (signal.SIGTERM,)
    with pytest.raises(ValueError, match="ended with 3; its message stands above"):
        child("sys.exit(3)")


# ---- whole files

@pytest.mark.parametrize("mistake", [ValueError("no"), OSError(28, "No space left on device"),
                                     RuntimeError("torch: file write failed"),
                                     RuntimeError("[enforce fail at inline_container.cc:672] . "
                                                  "unexpected pos 3392 vs 3286"),
                                     KeyboardInterrupt()])
def test_an_exception_leaves_the_old_file_and_no_rest(tmp_path, mistake):
    """Would catch a half-written checkpoint under the good one's name."""
    path = tmp_path / "new" / "file"
    with atomic_write(path, "w") as file:
        file.write("old \u00a3")
    with pytest.raises((type(mistake), OSError)) as caught:
        with atomic_write(path, "w") as file:
            file.write("new")
            raise mistake
    assert path.read_text("utf-8") == "old \u00a3" and list(path.parent.iterdir()) == [path]
    if isinstance(mistake, (OSError, RuntimeError)):
        assert str(path) in str(caught.value) and "untouched" in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_the_mode_is_the_umasks_and_stays_and_a_link_stays_a_link(tmp_path):
    """Would catch results that others may read although the umask says no, or may not although it
    says yes; a link to another disk that becomes a file on this one.
    """
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file", "w") as file:
            file.write("1")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
        (tmp_path / "file").chmod(0o604)
        (tmp_path / "link").symlink_to("file")
        with atomic_write(tmp_path / "link", "w") as file:
            file.write("2")
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "2"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o604
    for place in (tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="which is no file; give the name of one"):
            with atomic_write(place):
                pass


def test_what_is_written_is_on_the_disk_with_its_name(tmp_path, monkeypatch):
    """Would catch a rename or a new file that a power loss takes back: its directory not flushed;
    a line of a log that nobody flushed.
    """
    synced, fsync = [], os.fsync

    def record(number):
        synced.append(Path(f"/proc/self/fd/{number}").resolve().name)
        fsync(number)
    if not Path("/proc/self/fd").exists():
        pytest.skip("which file a number is cannot be told here")
    monkeypatch.setattr(os, "fsync", record)
    with atomic_write(tmp_path / "new" / "file"):
        pass
    assert synced[0] == tmp_path.name and synced[1].startswith("file.") and synced[2:] == ["new"]
    del synced[:]
    append_lines(tmp_path / "log", ["a\n"])
    append_lines(tmp_path / "log", ["b\n", "c\n"])
    assert synced == ["log", tmp_path.name, "log"]
    assert (tmp_path / "log").read_text() == "a\nb\nc\n"


def test_lines_are_added_whole_or_not_at_all(tmp_path, monkeypatch):
    """Would catch half a line on a full disk, and an error that names no file."""
    append_lines(tmp_path / "log", ["a\n"])

    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not write .*log: .*No space left"):
        append_lines(tmp_path / "log", ["b\n"])
    assert (tmp_path / "log").read_text() == "a\n"


def test_json_with_a_checksum_is_refused_when_a_letter_changes(tmp_path):
    """Would catch a setting that is another than the one that was written."""
    about = {"lr": 1e-5, "name": "Caf\u00e9", "list": [1, None, True], "deep": {"b": 2, "a": "1"}}
    write_json(tmp_path / "x.json", about)
    assert read_json(tmp_path / "x.json") == about
    whole = (tmp_path / "x.json").read_bytes()
    for place in range(whole.index(b'"lr"') + 1, len(whole) - 8):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "x.json").write_bytes(damaged)
        try:
            found = read_json(tmp_path / "x.json")
        except ValueError:
            continue
        assert {key: found.get(key) for key in about} == about, damaged     # a blank, or "sha256"
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"loss": float("nan")})


def test_a_killed_process_leaves_the_old_file(tmp_path):
    """Would catch writing in place: kill -9 runs no handler that could tidy up."""
    path = tmp_path / "file"
    path.write_text("old")
    program = ("import sys, time\nfrom utils.files import atomic_write\n"
               f"with atomic_write({str(path)!r}) as file:\n"
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
        with atomic_write(tmp_path / "file" / "below.pt"):
            pass


# ---- downloads, from a server on this machine

BODY = bytes(range(256)) * (12 << 10)    # 3 MiB, so more than one piece
DIGEST = hashlib.sha256(BODY).hexdigest()


# What never becomes a body: headers, a chunk's length, provisional answers, a byte each 0.02 s.
DRIPPING = {
    "/header": ["HTTP/1.1 200 OK\r\nX: ", *500 * "x"],
    "/chunk-size": ["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *500 * "0"],
    "/continue": 500 * ["HTTP/1.1 100 Continue\r\n", "\r\n"]}


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.send_header("X-Linked-ETag", f'"{"0" * 64}"')
            self.end_headers()
        elif self.path in DRIPPING:
            try:
                for line in DRIPPING[self.path]:
                    self.wfile.write(line.encode())
                    time.sleep(0.02)
            except OSError:                                 # the client has gone
                return
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
            while self.path == "/drip":
                try:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
                except OSError:                             # the client has gone
                    return
            self.wfile.write(BODY[:1000] if self.path == "/cut" else BODY)

    do_HEAD = do_GET

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


@pytest.mark.parametrize("page, sha256, words", [
    ("/whole", "0" * 64, f"got SHA-256 {DIGEST}, expected {'0' * 64}"),
    ("/cut", DIGEST, f"got 1000 bytes, expected {len(BODY)}"),
    ("/cut", None, f"got 1000 bytes, expected {len(BODY)}"),
    ("/chunked", None, "the connection broke"),
    ("/missing", DIGEST, "404"),
    ("/silent", DIGEST, "could not download"),
])
def test_a_bad_download_leaves_what_was_there(server, tmp_path, page, sha256, words):
    """Would catch a cut file that is kept and believed for ever, or a full disk that is blamed."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises((ValueError, OSError)) as caught:
        download(server + page, path, sha256)
    message = str(caught.value)
    assert words in message and server + page in message and "free some space" not in message
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_download_ends(server, tmp_path, monkeypatch):
    """Would catch a server that sends a byte now and then, or never stops, as our own end."""
    monkeypatch.setattr("utils.files.PATIENCE", 0.2)
    for page in ("/drip", "/whole"):
        monkeypatch.setattr("utils.files.UNCHECKED", len(BODY) // 2)
        with pytest.raises(ValueError, match=f"{page}: got .* expected at most .* a second"):
            download(server + page, tmp_path / "file")
    for page in DRIPPING:
        with pytest.raises((ValueError, OSError), match=f"{page}: .*got .* expected at most"):
            download(server + page, tmp_path / "file")
    for fetch in (declared_sha256, fetch_bytes):
        with pytest.raises(OSError, match="got .* bytes in .* expected at most"):
            fetch(server + "/header")
    monkeypatch.setattr("utils.files.CHECKED", len(BODY) - 1)
    with pytest.raises(ValueError, match="/whole: got .* expected at most 3145727"):
        download(server + "/whole", tmp_path / "file", DIGEST)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    download(server + "/whole", tmp_path / "file", DIGEST)


def test_gpt2s_vocabulary_is_fetched_with_the_same_care(monkeypatch, tmp_path):
    """Would catch: tiktoken's own download, which waits for ever, without a limit."""
    asked = []

    def no_connection(url):
        asked.append(url)
        raise OSError("no connection")
    monkeypatch.setattr("data.tokenizer.fetch_bytes", no_connection)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(OSError, match="could not get GPT-2's vocabulary"):
        byte_level_bpe(tmp_path)
    assert len(asked) == 1 and asked[0].startswith("https://")


def test_what_is_there_is_fetched_again_if_it_is_damaged(server, tmp_path, capsys):
    """Would catch a cut file that is believed for ever, and a whole one that is fetched twice."""
    path = tmp_path / "file"
    for body, words in ((None, ""), (BODY, "is there already"), (BODY[:-1], "is damaged"),
                        (b"", "is damaged")):
        if body is not None:
            path.write_bytes(body)
        fetch_file(server + "/whole", path, DIGEST)
        assert path.read_bytes() == BODY and words in capsys.readouterr().err
    fetch_file("http://127.0.0.1:1/file", path)         # no checksum, no connection: it is taken
    assert f"SHA-256 {DIGEST} (none is known" in capsys.readouterr().err


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
