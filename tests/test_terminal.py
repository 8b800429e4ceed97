"""What a person at a terminal meets, and what a file gets in that place."""
import io
import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import sample
from utils import before_torch, cli, terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ---- before torch

def test_an_old_python_and_a_missing_package_are_one_sentence():
    """Would catch: a traceback of the first import that fails."""
    assert before_torch.what_is_missing((3, 10)) == ""
    assert before_torch.what_is_missing((3, 9, 18)).startswith("got Python 3.9, expected 3.10 or ")
    sentence = before_torch.what_is_missing((3, 12), lambda name: None if "t" in name else name)
    assert sentence.startswith("got no package torch, tiktoken, tqdm, expected it; `pip install ")


@pytest.mark.parametrize("start", [["train.py"], ["sample.py"], ["-m", "scripts.evaluate"],
                                   ["-m", "pretrained.convert"]])
def test_without_torch_every_program_says_so(start, tmp_path):
    """Would catch: a program whose first import is torch's, so that nothing can be said before, and
    no wait policy can be set.
    """
    if start[-1] == "scripts.evaluate":
        pytest.importorskip("scripts", reason="there is no scripts/ here")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n")
    done = subprocess.run([sys.executable, *start], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: got no package torch, ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT")
@pytest.mark.parametrize("start, status", [
    (["train.py"], 130), (["sample.py"], 130), (["-m", "scripts.tune"], 130),
    (["-m", "pretrained.convert"], 130), (["-c", "import train"], -signal.SIGINT)])
def test_ctrl_c_during_the_imports_is_one_word(start, status, tmp_path):
    """Would catch: a traceback of torch's own start, or the abort of C++ that it becomes there;
    somebody's own script, or a notebook, that ends as if it were one of our programs.
    """
    if start[-1] == "scripts.tune":
        pytest.importorskip("scripts", reason="there is no scripts/ here")
    (tmp_path / "torch.py").write_text("import time\nprint('torch', flush=True)\ntime.sleep(60)\n")
    child = subprocess.Popen(
        [sys.executable, *start], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # not so under nohup
    assert child.stdout.readline() == "torch\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    err = child.communicate()[1]
    assert child.returncode == status
    assert (err == "interrupted\n") == (status == 130) and ("Traceback" in err) == (status < 0)


def test_the_wait_policy_is_set_before_torch_reads_it():
    """Also from a notebook that begins with a room. Would catch: threads that spin."""
    program = ("import os, sys, data; assert 'torch' not in sys.modules; "
               "print(os.environ['OMP_WAIT_POLICY'])")
    for given, expected in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, text=True,
                              capture_output=True)
        assert done.stdout.strip() == expected, done.stderr


def test_a_missing_optional_package_is_one_sentence(capsys):
    """Would catch: a traceback; and one of our own modules taken for a package."""
    def main(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    with pytest.raises(SystemExit) as caught:
        cli.run_program(lambda: main("matplotlib"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == ("error: got no package matplotlib, expected it; `pip "
                                       "install matplotlib`\n")
    with pytest.raises(SystemExit) as caught:
        cli.run_program(lambda: main("fast.nothing"))
    assert caught.value.code == 70


# ---- progress

def test_in_a_file_progress_is_a_line_now_and_then(monkeypatch):
    """Would catch: nothing at all under nohup, or a megabyte of carriage returns."""
    now, file = [1000.0], io.StringIO()
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", file)
    with terminal.progress(total=100, name="the work") as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        for _ in range(60):                             # a minute, and a step each second
            now[0] += 1
            bar.update()
            bar.set_postfix(loss="1.25", refresh=False)
    lines = file.getvalue().split("\n")
    assert "\r" not in file.getvalue() and lines.pop() == ""
    assert 5 <= len(lines) <= 7
    assert lines[1].startswith("the work: 20 of 100 (step), 00:20 so far, 01:20 to go, loss=1.25")


def test_short_work_is_not_talked_about(monkeypatch):
    """Would catch: noise in the log of a test, or around one text."""
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    assert list(terminal.progress(range(3), unit="batch")) == [0, 1, 2] and file.getvalue() == ""


def test_on_a_terminal_a_message_stands_above_the_bar(monkeypatch):
    """Would catch: a note that is written into the middle of a bar."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal.progress(total=3):
        terminal.note("cut 3 tokens")
    assert "\rcut 3 tokens\n" in screen.getvalue().replace(" " * 10, "")


# ---- text

def test_wide_texts_wrap_on_a_terminal_only(monkeypatch):
    """Would catch: a file whose lines depend on a window; words cut in two on a terminal."""
    text = "name : Rudibis | " * 9
    assert terminal.labelled("source", text) == f"source     {text}"
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "50")
    first, *rest = terminal.labelled("source", text).split("\n")
    assert first.startswith("source     name") and len(rest) > 2
    assert all(line.startswith(" " * 11 + "") and len(line) <= 50 for line in rest)


def test_a_printed_command_can_be_pasted():
    """Would catch: a folder with a blank, a quote, a source that looks like a flag."""
    words = "sample.py", "--run", "out/my run2"
    assert terminal.command(*words) == "python sample.py --run 'out/my run2'"
    for text in ("it's $HOME", "-5", "--"):
        argv = shlex.split(terminal.command(*words, text=text))[2:]
        found = cli.parse(sample.Settings, argv, "", "prompt")
        assert (found.prompt, found.run) == (text, ["out/my run2"])


# ---- questions

def test_piped_lines_are_taken_as_they_are(monkeypatch, capsys):
    """Would catch: a source called quit that ends the work, a prompt among the texts."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nquit\ntwo"))
    assert list(terminal.typed_lines("source> ", "source")) == ["one", "quit", "two"]
    assert capsys.readouterr() == ("", "")


def test_who_types_into_a_file_is_asked_beside_it(monkeypatch, capsys):
    """Would catch: a prompt in the file, or none on the terminal."""
    monkeypatch.setattr(sys, "stdin", Terminal("one\n"))
    assert list(terminal.typed_lines("source> ", "source")) == ["one"]
    assert capsys.readouterr() == ("", "source> source> \n")


@pytest.mark.parametrize("end", [b"quit\n", b"\x04"])
def test_on_a_terminal_there_are_arrows_and_two_ways_out(end):
    """The arrow up brings back the last line. Would catch: ^[[A in the source, no way out."""
    pytest.importorskip("readline", reason="this Python has no readline")
    program = ("from utils.terminal import typed_lines\n"
               "for line in typed_lines('source> ', 'source'): print('got', line, flush=True)")
    main, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=child, stdout=child,
                               stderr=child, env={**os.environ, "TERM": "dumb"})
    os.close(child)
    seen = b""
    try:
        for answers, typed in enumerate((b"hello\n", b"\x1b[A\n", end)):
            # Ctrl-D means nothing before the next prompt stands there: until then the terminal's
            # own lines are on.
            while (seen.count(b"got hello") < answers
                   or b"source> " not in seen.rpartition(b"got hello")[2]):
                seen += os.read(main, 1000)
            os.write(main, typed)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(main)
    assert b"type a source and press Enter" in seen and b"`quit` or Ctrl-D ends" in seen
