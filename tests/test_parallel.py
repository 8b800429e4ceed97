"""Work shared between processes: the same results, errors that arrive, nobody left behind."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from data import causal, pairs
from data.example import Example
from data.tokenizer import load_tokenizer
from utils.cli import run_program
from utils.parallel import parallel_map, processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are not forked here")


def square(i):
    if i == 13:
        raise ValueError("got 13")
    return i * i, os.getpid()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 12])
def test_the_results_come_in_order_from_several_processes(count, n):
    """Would catch: a piece left out, taken twice or out of order; one process that does it all."""
    found = list(parallel_map(square, range(n), count))
    assert [result for result, _ in found] == [i * i for i in range(n)]
    workers = {process for _, process in found}
    assert len(workers) == min(count, n) and (os.getpid() in workers) == (min(count, n) == 1)
    assert not multiprocessing.active_children()


def test_an_error_arrives_in_its_place_and_ends_all():
    """Would catch: an error lost in a process, or before the results that come first."""
    found = []
    with pytest.raises(ValueError, match="^got 13$"):
        for result, _ in parallel_map(square, range(100), 3):
            found.append(result)
    assert found == [i * i for i in range(13)]
    assert not multiprocessing.active_children()


def test_who_stops_reading_leaves_no_process():
    results = parallel_map(square, list(range(13)) * 1000, 3)
    assert next(results)[0] == 0
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("sending", [False, True], ids=["while it works", "while it sends"])
def test_a_worker_that_is_killed_is_named(capsys, sending):
    """As the kernel does when memory ends. Would catch: waiting for it without end, an error that
    tells the user to report a bug.
    """
    def killed(i):
        if i == 5 and not sending:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid(), b"much more than a pipe holds" * 100_000

    def main():
        results = parallel_map(killed, range(8), 2)
        first, _ = next(results)
        if sending:
            time.sleep(0.5)             # until its pipe is full
            os.kill(first, signal.SIGKILL)
        list(results)
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: got a worker process that ended early (status -9), expected its results; free")


class Odd(ValueError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Panic(BaseException):
    """As of a package in Rust."""


def test_every_kind_of_error_arrives(capfd):
    """Would catch: an error that is lost because it cannot be sent, a page of a worker's own."""
    class Local(ValueError):
        pass
    for error, kind, words in ((Odd(1, 2), RuntimeError, "Odd: 1 and 2"),
                               (Local("here"), RuntimeError, "Local: here"),
                               (Panic("at a line"), Panic, "at a line")):
        def failing(i, error=error):
            raise error
        with pytest.raises(kind, match=words):
            list(parallel_map(failing, range(4), 2))
    with pytest.raises(Exception, match="pickle"):
        list(parallel_map(lambda i: lambda: i, range(4), 2))
    assert capfd.readouterr().err == ""


def test_without_processes_this_one_does_the_work(monkeypatch):
    """Would catch: a run that a limit on processes stops, a worker that was started and stays."""
    fork, asked = os.fork, []

    def limited():
        asked.append(1)
        if len(asked) > 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()
    monkeypatch.setattr(os, "fork", limited)
    found = list(parallel_map(square, range(7), 3))
    assert len(asked) == 2 and found == [(i * i, os.getpid()) for i in range(7)]
    assert not multiprocessing.active_children()


ORPHANS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from utils.parallel import parallel_map
for pid in parallel_map(lambda i: f"{os.getpid():09}" * 100_000, range(1000), 3):
    print(pid[:9], flush=True)
"""


def runs(process):
    """Whether it does; one that has ended may wait for ever for somebody to ask how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


STOPPED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from utils.cli import run_program
from utils.parallel import parallel_map
def main():
    for pid in parallel_map(lambda i: f"{os.getpid():09}" * 100_000, range(10 ** 6), 3):
        print(pid[:9], flush=True)
run_program(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_is_one_word(number):
    """As a terminal sends it. Would catch: a traceback of each worker, a worker that stays."""
    parent = subprocess.Popen([sys.executable, "-c", STOPPED, ROOT], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, start_new_session=True,
                              preexec_fn=lambda: signal.signal(number, signal.default_int_handler
                                                               if number == signal.SIGINT
                                                               else signal.SIG_DFL))
    workers = {int(parent.stdout.readline()) for _ in range(6)}
    os.killpg(parent.pid, number)
    out, err = parent.communicate(timeout=20)
    assert (parent.returncode, err) == (128 + number, "interrupted\n")
    assert not any(map(runs, workers))


def test_a_parent_that_is_killed_leaves_nobody_behind():
    """Would catch: a process that waits for ever for somebody to read its results."""
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, ROOT], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    workers = {int(parent.stdout.readline()) for _ in range(6)}
    assert len(workers) == 3
    parent.kill()
    until = time.monotonic() + 20
    while any(map(runs, workers)):
        assert time.monotonic() < until, "they are still there"
        time.sleep(0.05)
    assert "Traceback" not in parent.communicate()[1]


def test_much_text_becomes_the_same_tokens(model_directory, monkeypatch):
    """Would catch: pairs that depend on how many cores there are."""
    tokenizer = load_tokenizer(model_directory)
    examples = [Example(f"name : {i}", tuple(f"It is {j}." for j in range(i % 3 + 1)))
                for i in range(50)]
    alone = causal.encode(pairs.tokenized(examples, tokenizer), 16)
    asked = []
    monkeypatch.setattr(pairs, "PIECE", 7)
    monkeypatch.setattr(pairs, "MUCH_TEXT", 100)
    monkeypatch.setattr(pairs, "processes", lambda: asked.append(1) or 3)
    shared = causal.encode(pairs.tokenized(examples, tokenizer), 16)
    assert asked and list(shared[0]) == list(alone[0]) and shared[1] == alone[1]
    assert "had the end of their source cut" in shared[1]
    with pytest.raises(ValueError, match="every one with a target too long"):
        causal.encode(pairs.tokenized(examples, tokenizer), 3)


def test_as_many_processes_as_cores_that_may_be_used():
    own = os.sched_getaffinity(0)
    assert processes() == min(4, len(own))
    os.sched_setaffinity(0, [min(own)])
    try:
        assert processes() == 1
    finally:
        os.sched_setaffinity(0, own)
