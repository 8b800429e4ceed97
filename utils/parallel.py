"""A function over many pieces of work, by several processes at once; the results in order.

Knows nothing of the project. Processes and not threads: short calls into a library take longer
with threads, for each of them waits for Python's lock.
"""
import contextlib
import multiprocessing
import os
import signal
import sys


def processes():
    """How many processes help: one for each core that this one may use. 1 where a process cannot
    be forked safely, as on macOS and Windows: a new one would first have to import everything.
    """
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def parallel_map(function, pieces, count):
    """function(piece) for every piece of a list, in order, by `count` processes.

    The processes are forked, so `function` and `pieces` need no copy, only the results are sent.
    Process k takes the pieces k, k + count, ...; a pipe holds little, so none runs far ahead of
    whoever reads. What `function` raises is raised here, at its place in the order; RuntimeError
    when a process ended before its work did.
    """
    if count < 2 or len(pieces) < 2:
        yield from map(function, pieces)
        return
    fork, workers = multiprocessing.get_context("fork"), []
    try:
        for k in range(min(count, len(pieces))):
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_work, daemon=True,
                                   args=(function, pieces[k::count], sender, receiver))
            process.start()
            sender.close()              # each side holds its own end, so its death ends the pipe
            workers.append((process, receiver))
        for i in range(len(pieces)):
            process, receiver = workers[i % len(workers)]
            try:
                result, error = receiver.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"got a helper process that ended (status {process.exitcode}), "
                                   "expected its results; is there enough memory?") from None
            if error is not None:
                raise error
            yield result
    finally:                            # also when nobody reads on
        for process, receiver in workers:
            receiver.close()
            process.terminate()
            process.join()


def _work(function, pieces, sender, receiver):
    """What a process does: its pieces, until one fails or the reader is gone."""
    receiver.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent, which ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(BrokenPipeError):
        for piece in pieces:
            try:
                found = function(piece), None
            except Exception as error:
                found = None, error
            sender.send(found)
            if found[1] is not None:
                return
