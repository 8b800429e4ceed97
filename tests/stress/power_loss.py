"""Power loss on an ext4 file system, then --resume: nothing is lost that was said to be written.

    python tests/stress/power_loss.py --count 20        as root, on Linux

An image is mounted, a run writes on it, and at a random moment ext4's own shutdown ioctl cuts it
off, as xfstests does: what is not on the disk by then is gone. After mounting it again, which plays
the journal back, every line of the log and every state that the run had written by its own word has
to be there, and --resume has to end as a run that was never cut. Where this process may not mount,
that is said and nothing is done.
"""
import contextlib
import fcntl
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import (
    METHODS,
    differences,
    empty_folder,
    end,
    finished,
    make_task,
    parse,
    start,
    status_of,
    wait_for,
)

from pretrained import run_directory
from pretrained.run_directory import load_run

SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2      # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH


def mount():
    return subprocess.run(["mount", "-o", "loop", "image", "disk"], capture_output=True, text=True)


def tell(writing):
    """Let this process tell the parent what it has written, when the function has returned."""
    append_log, save_state = run_directory.append_log, run_directory.save_state

    def append_and_tell(directory, **values):
        append_log(directory, **values)
        os.write(writing, f"line {values['step']}\n".encode())

    def save_and_tell(settings, state):
        save_state(settings, state)
        os.write(writing, f"state {state['step']}\n".encode())
    run_directory.append_log, run_directory.save_state = append_and_tell, save_and_tell


def cut_off(flags, wait):
    """Start a run on the disk and cut it off `wait` seconds after its directory is there. Returns
    what the run had told before.
    """
    (reading, writing), told = os.pipe(), []
    os.set_blocking(reading, False)
    disk = os.open("disk", os.O_RDONLY)
    number = start(flags, lambda: tell(writing))
    os.close(writing)
    wait_for("disk/run", number)
    time.sleep(wait)
    # Before the cut: during it an fsync may return that the kernel has not finished.
    with contextlib.suppress(BlockingIOError):
        told = os.read(reading, 1 << 16).decode().split("\n")[:-1]
    fcntl.ioctl(disk, SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, sys.byteorder))
    status_of(number)                           # of a run that can no longer write
    for number in (disk, reading):
        os.close(number)
    return told


def lost(told):
    """What of what was told is not on the disk."""
    lines = sum(line.startswith("line") for line in told)
    states = [int(line.split()[1]) for line in told if line.startswith("state")]
    log = Path("disk/run/log.jsonl")
    there = log.read_text().count("\n") if log.exists() else 0
    found = [f"{there} lines of {lines} are there"] if there < lines else []
    if states:
        try:
            step = torch.load("disk/run/resume.pt", weights_only=True)["step"]
            load_run("disk/run", "cpu", "fp32")
            found += [f"the state of step {step} is there, not of {states[-1]}"] * (
                step < states[-1])
        except (OSError, ValueError) as error:
            found.append(f"state or prefix: {error}")
    return found


def main():
    args, failures, lines, states = parse(__doc__, 20), [], 0, 0
    with empty_folder() as folder:
        subprocess.run(["truncate", "-s", "64M", "image"], check=True)
        os.mkdir("disk")
        made = shutil.which("mkfs.ext4") and subprocess.run(["mkfs.ext4", "-q", "-F", "image"])
        if not made or mount().returncode:
            print("skipped: no ext4 image can be mounted here (it needs Linux, root and mkfs.ext4)")
            return
        task, rng = make_task(folder), random.Random(args.seed)
        try:
            for case in range(args.count):
                method = ("prefix", "finetune")[case % 2]
                flags = [*task, *METHODS[method]]
                if not Path(f"{method}-whole").exists():
                    began = time.monotonic()
                    finished([*flags, "--out", f"{method}-whole"])
                    seconds = time.monotonic() - began
                told = cut_off([*flags, "--out", "disk/run"], rng.random() * seconds * 0.8)
                subprocess.run(["umount", "disk"], check=True)
                assert mount().returncode == 0
                found = lost(told)
                lines += sum(line.startswith("line") for line in told)
                states += sum(line.startswith("state") for line in told)
                if Path("disk/run/resume.pt").exists():
                    status = status_of(start(["--resume", "disk/run", "--device", "cpu"]))
                    found += ([f"resumed with {status}: " + Path("output.txt").read_text()[-300:]]
                              if status else differences("disk/run", f"{method}-whole"))
                failures += [f"{method} {case}: {text}" for text in found]
                shutil.rmtree("disk/run", ignore_errors=True)
                os.sync()
        finally:
            subprocess.run(["umount", "disk"])
    end(f"{args.count} power losses ({lines} lines and {states} states were told before)", failures,
        told_as_a_line=lines, told_as_a_state=states)


if __name__ == "__main__":
    main()
