"""kill -9 at each file operation of a run, then --resume: the same bits, the same lines of the log.

    python tests/stress/kills.py --count 200

A third of the kills each hits a run that learns a prefix, one that fine-tunes, and one that is just
being resumed after a first kill. Half of those at an fsync also cut the file short before, as a
kill in the middle of a write does. Between kill and resuming the run is read as sample.py does.
"""
import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from common import (
    METHODS,
    chosen,
    differences,
    empty_folder,
    end,
    finished,
    make_task,
    parse,
    start,
    status_of,
)

from pretrained.run_directory import load_run

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate",
              "fcntl.lockf", "os.chmod"}


def die_at(number, folder, counted=None):
    """Let this process die before its operation `number` on a file in `folder`. counted: write how
    many there have been to this file, in place of dying.
    """
    left, fsync = itertools.count(1), os.fsync

    def operation(file=None):
        now = next(left)
        if counted:
            os.write(counted, b".")
        elif now == number:
            if file is not None and number % 2:
                size = os.fstat(file).st_size
                os.truncate(file, size - min(size, 7)) if size else None
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, given):
        if event in OPERATIONS and (event == "fcntl.lockf" or any(
                folder in Path(str(path)).parts for path in given[:2])):
            operation()

    def fsync_or_die(file):
        is_folder = os.path.isdir(f"/proc/self/fd/{file}")
        operation(None if is_folder else file)
        fsync(file)
    sys.addaudithook(hook)
    os.fsync = fsync_or_die


def operations(flags, folder):
    """How many operations a whole run has."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    assert status_of(start(flags, lambda: die_at(0, folder, writing))) == 0
    os.close(writing)
    return len(os.read(reading, 1 << 16))


def read_beside(run, failures, what):
    """What sample.py would load: whole, or not there yet."""
    if (Path(run) / "resume.pt").exists():
        try:
            load_run(run, "cpu", "fp32")
        except ValueError as error:
            failures.append(f"{what}: cannot be read: {error}")


def main():
    args, failures, begun, resumed = parse(__doc__, 200), [], 0, 0
    with empty_folder() as folder:
        task = make_task(folder)
        for method, again in (("prefix", False), ("finetune", False), ("prefix", True)):
            flags = [*task, *METHODS[method]]
            if not again:
                finished([*flags, "--out", f"{method}-whole"])
            count = args.count // 3 + (method == "prefix" and not again) * (args.count % 3)
            first = [*flags, "--out", "run"]
            if again:
                finished([*first, "--stop-at", "10"])
                shutil.copytree("run", "stopped")
                first = ["--resume", "run", "--device", "cpu"]
            most = operations(first, "run")
            for number in chosen(most, count, args.seed):
                what = f"{method}, {'resumed, ' if again else ''}operation {number} of {most}"
                shutil.rmtree("run", ignore_errors=True)
                if again:
                    shutil.copytree("stopped", "run")
                status = status_of(start(first, lambda n=number: die_at(n, "run")))
                if status != -signal.SIGKILL:
                    failures.append(f"{what}: it ended with {status} before")
                    continue
                read_beside("run", failures, what)
                if not Path("run/resume.pt").exists():      # nothing was saved yet: begin again
                    begun += 1
                    continue
                resumed += 1
                status = status_of(start(["--resume", "run", "--device", "cpu"]))
                if status:
                    failures.append(f"{what}: resumed with {status}: "
                                    + Path("output.txt").read_text()[-300:])
                else:
                    failures += [f"{what}: {found}" for found
                                 in differences("run", f"{method}-whole")]
            shutil.rmtree("run", ignore_errors=True)
    end(f"{args.count} kills ({begun} of them before anything was saved)", failures,
        resumed=resumed)


if __name__ == "__main__":
    main()
