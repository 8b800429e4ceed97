"""Two processes at once: two starts, two that resume, readers beside a writer.

    python tests/stress/two_processes.py --count 20

Two starts without --out get two directories, each a whole run. Of two that resume one run, one goes
on and the other is refused. Whoever reads a run while it is written always finds a whole one.
"""
import os
import shutil
import time
from pathlib import Path

from common import (
    METHODS,
    child,
    differences,
    empty_folder,
    end,
    finished,
    make_task,
    parse,
    start,
    status_of,
    train,
    wait_for,
)

from pretrained.run_directory import load_run


def two(flags, seconds=0):
    """train.py twice at the same moment, with so many seconds more in each step; returns both
    statuses and both outputs.
    """
    reading, writing = os.pipe()

    def wait():
        os.close(writing)
        os.read(reading, 1)                     # until the last one has closed the other end
        step = train.Trainer.train_step
        train.Trainer.train_step = lambda *given: (time.sleep(seconds), step(*given))[1]
    numbers = [start(flags, wait, f"output{n}.txt") for n in range(2)]
    os.close(writing)
    statuses = [status_of(number) for number in numbers]
    os.close(reading)
    return statuses, [Path(f"output{n}.txt").read_text() for n in range(2)]


def two_starts(flags, whole):
    statuses, outputs = two(flags)
    runs = sorted(Path("out").iterdir()) if Path("out").exists() else []
    found = [f"two starts: statuses {statuses}, {len(runs)} directories: {outputs}"] if (
        statuses != [0, 0] or len(runs) != 2) else []
    for run in runs:
        found += [f"two starts: {text}" for text in differences(run, whole)]
    shutil.rmtree("out", ignore_errors=True)
    return found


def two_resumed(whole):
    shutil.copytree("stopped", "run")
    # Else one might be done before the other begins, with nothing left to do.
    statuses, outputs = two(["--resume", "run", "--device", "cpu"], 0.2)
    found = []
    refused = [output for output in outputs if "another process is writing" in output]
    if sorted(statuses) != [0, 2] or not refused:
        found.append(f"two resumed: statuses {statuses}: {outputs}")
    found += [f"two resumed: {text}" for text in differences("run", whole)]
    shutil.rmtree("run")
    return found, len(refused)


def read_again_and_again(run, stop):
    """Load the run until the file `stop` is there; one letter in reads.txt for each time."""
    def read():
        with open("reads.txt", "w") as reads:
            while not Path(stop).exists():
                try:
                    load_run(run, "cpu", "fp32")
                    reads.write(".")
                except (ValueError, OSError) as error:
                    reads.write(f"\n{error}\n")
    return child(read, "reader.txt")


def readers(flags, method):
    """A reader beside a run that is written at every step, from its first saving on."""
    writer = start([*flags, "--dev-every", "1", "--out", "run"])
    wait_for("run/resume.pt", writer)
    reader = read_again_and_again("run", "stop")
    status = status_of(writer)
    Path("stop").touch()
    status = status or status_of(reader)
    text = Path("reads.txt").read_text()
    failed = [line for line in text.splitlines() if line.strip(".")]
    os.unlink("stop")
    shutil.rmtree("run")
    return [f"{method}, a reader: {line}" for line in failed] + (
        [f"reader or writer ended with {status}"] if status else []), text.count(".")


def main():
    args, failures, refused, reads = parse(__doc__, 20), [], 0, 0
    with empty_folder() as folder:
        task = make_task(folder)
        flags = [*task, *METHODS["prefix"]]
        finished([*flags, "--out", "whole"])
        finished([*flags, "--out", "stopped", "--stop-at", "8"])
        for _ in range(args.count):
            failures += two_starts(flags, "whole")
            found, number = two_resumed("whole")
            failures, refused = failures + found, refused + number
            for method, more in METHODS.items():
                found, number = readers([*task, *more], method)
                failures, reads = failures + found, reads + number
    end(f"{args.count} times two starts and two resumed ({refused} refused), {reads} reads beside "
        "a writer", failures, read=reads)


if __name__ == "__main__":
    main()
