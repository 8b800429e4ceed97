"""Work shared between processes: the same results, errors that arrive, nobody left behind."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from data import causal, pairs
from data.example import Example
from data.tokenizer import load_tokenizer
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


def test_a_process_that_is_killed_is_named():
    """As the kernel does when memory ends. Would catch: waiting for it without end."""
    def killed(i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return i
    with pytest.raises(RuntimeError, match=r"a helper process that ended \(status -9\), expected"):
        list(parallel_map(killed, range(8), 2))


ORPHANS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from utils.parallel import parallel_map
for pid in parallel_map(lambda i: f"{os.getpid():09}" * 100_000, range(1000), 3):
    print(pid[:9], flush=True)
"""


def test_a_parent_that_is_killed_leaves_nobody_behind():
    """Would catch: a process that waits for ever for somebody to read its results."""
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, ROOT], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    workers = {int(parent.stdout.readline()) for _ in range(6)}
    assert len(workers) == 3
    parent.kill()
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
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
    assert processes() == len(own)
    os.sched_setaffinity(0, [min(own)])
    try:
        assert processes() == 1
    finally:
        os.sched_setaffinity(0, own)
