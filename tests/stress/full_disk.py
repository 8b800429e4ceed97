"""Full disks, then --resume when there is room: nothing lost, the file named, status 2.

    python tests/stress/full_disk.py --count 40

As root on Linux each disk is a tmpfs of another size, from nothing to what a run needs; elsewhere
no file may grow beyond a limit. Each run ends with an error that names the file, the run can be
read if it was saved, and with room it goes on to the same bits and lines. Also: the standard output
on a full device is an error with a name.
"""
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from common import (
    METHODS,
    ROOT,
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

PAGE = 4096


def mounted(options):
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "disk"],
                              capture_output=True).returncode


def limit(size):
    def set_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # then a write beyond it is an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return set_limit


def one_disk(flags, size, real, whole):
    """What went wrong with a disk of `size` bytes; None where the run fitted."""
    if real and not mounted(f"size={size}"):
        return ["tmpfs cannot be mounted"]
    status = status_of(start([*flags, "--out", "disk/run"], (lambda: None) if real else
                             limit(size)))
    output = Path("output.txt").read_text()
    if status == 0:
        return None
    last = output.strip().splitlines()[-1]
    found = []
    if status != 2 or "disk/run" not in last or "Traceback" in output:
        found.append(f"status {status}: {last}")
    if list(Path("disk").rglob("*.tmp")):
        found.append("a temporary file is left")
    if real:
        mounted("remount,size=64m")
    if Path("disk/run/resume.pt").exists():
        try:
            load_run("disk/run", "cpu", "fp32")
        except ValueError as error:
            found.append(str(error))
        status = status_of(start(["--resume", "disk/run", "--device", "cpu"]))
        found += ([f"resumed with {status}: " + Path("output.txt").read_text()[-300:]] if status
                  else differences("disk/run", whole))
    return found


def standard_output(folder):
    """sample.py onto a full device."""
    if not Path("/dev/full").exists():
        return []
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "sample.py", "--model", folder / "bytes",
                               "--device", "cpu", "--max-new-tokens", "3", "x"], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    last = done.stderr.strip().splitlines()[-1]
    if done.returncode != 2 or "standard" not in last or "Traceback" in done.stderr:
        return [f"standard output: status {done.returncode}: {last}"]
    return []


def main():
    args, failures, full, saved = parse(__doc__, 40), [], 0, 0
    with empty_folder() as folder:
        os.mkdir("disk")
        real = mounted(f"size={PAGE}")
        if real:
            subprocess.run(["umount", "disk"], check=True)
        else:
            print("no tmpfs can be mounted here: no file may grow beyond a limit instead")
        task = make_task(folder)
        for method in METHODS:
            flags = [*task, *METHODS[method]]
            finished([*flags, "--out", f"{method}-whole"])
            sizes = [path.stat().st_size for path in Path(f"{method}-whole").rglob("*.*")]
            most = sum(sizes) + max(sizes) if real else max(sizes)
            count = args.count // len(METHODS)
            for case in range(count):
                size = max(PAGE, most * case // count // PAGE * PAGE) if real else (
                    most * (case + 1) // (count + 1))
                try:
                    found = one_disk(flags, size, real, f"{method}-whole")
                    full += found is not None
                    saved += found is not None and Path("disk/run/resume.pt").exists()
                    failures += [f"{method}, {size} bytes: {text}" for text in found or ()]
                finally:
                    if real:
                        subprocess.run(["umount", "disk"], capture_output=True)
                    shutil.rmtree("disk/run", ignore_errors=True)
        failures += standard_output(folder)
    end(f"{args.count} disks, {full} of them too small, {saved} of these after a first saving",
        failures, refused=full, saved_first=saved)


if __name__ == "__main__":
    main()
