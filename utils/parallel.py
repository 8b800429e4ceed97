"""A function over many pieces of work, by several processes at once; the results in order.

Knows nothing of the project. Processes and not threads: short calls into a library take longer
with threads, for each of them waits for the GIL.
"""
import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import sys

MOST = 4        # processes: reading their results takes half of the time that one needs for them


def processes():
    """How many processes help. 1 where a process cannot be forked safely, as on macOS and Windows:
    a new one would first have to import everything.
    """
    return min(MOST, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1


def parallel_map(function, pieces, count):
    """function(piece) for every piece of a list, in order, by `count` worker processes.

    The workers are forked, so `function` and `pieces` need no copy, only the results are sent.
    Worker k takes the pieces k, k + count, ...; a pipe holds little, so none runs far ahead of
    whoever reads. What `function` raises is raised here, at its place in the order; ValueError
    when a worker was killed. Where the system gives no processes, this one does the work.
    """
    count = min(count, len(pieces))
    with _workers(function, pieces, count) as workers:
        if not workers:
            yield from map(function, pieces)
            return
        for i in range(len(pieces)):
            yield _result(*workers[i % count])


@contextlib.contextmanager
def _workers(function, pieces, count):
    """`count` pairs (process, the end of the pipe that its results come from), or none."""
    workers = []
    try:
        try:
            for k in range(count if count > 1 else 0):
                workers.append(_start(function, pieces[k::count]))
        except OSError:                 # a limit on processes or on memory
            _end(workers)
            workers = []
        yield workers
    finally:                            # also when nobody reads on
        _end(workers)


def _start(function, pieces):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(function, pieces, sender, receiver), daemon=True)
    # Signals wait until the worker has its own handlers, and this process knows the worker.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM,
                                                       signal.SIGHUP})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sender.close()                  # each side holds its own end, so its death ends the pipe
    return process, receiver


def _end(workers):
    for process, receiver in workers:
        receiver.close()
        process.terminate()
    for process, _ in workers:
        process.join()


def _result(process, receiver):
    try:
        result, error = pickle.loads(receiver.recv_bytes())
    except (EOFError, OSError):         # between two messages, or in the middle of one
        process.join()
        raise ValueError(f"got a worker process that ended early (status {process.exitcode}), "
                         "expected its results; free memory, or start with one core, as with "
                         "`taskset -c 0 python ...`") from None
    if error is not None:
        raise error
    return result


def _work(function, pieces, sender, receiver):
    """What a worker does: its pieces, until one fails or the reader is gone."""
    receiver.close()
    for number in (signal.SIGINT, signal.SIGHUP):       # for the parent, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    gc.disable()                        # it writes to all objects, and each page would be copied
    with contextlib.suppress(BrokenPipeError):
        for piece in pieces:
            try:
                message = pickle.dumps((function(piece), None))
            except BaseException as error:              # a panic of a package in Rust, too
                sender.send_bytes(pickle.dumps((None, _sendable(error))))
                return
            sender.send_bytes(message)


def _sendable(error):
    """The error, or its words where it does not survive being sent."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
