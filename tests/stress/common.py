"""What the harnesses share: flags, a small task in a folder, children of this process."""
import argparse
import contextlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"             # forked children: no thread may be there before
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import random_gpt2  # noqa: E402

from pretrained.checkpoint import save  # noqa: E402

STEPS, DEV_EVERY = 20, 4


def parse(text, count, more=()):
    """The harness's flags: how many cases, and the seed of which ones."""
    parser = argparse.ArgumentParser(description=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, help="cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of which cases (default: 0)")
    return parser.parse_args()


@contextlib.contextmanager
def empty_folder():
    """Work in an empty folder, on a disk, and leave nothing behind."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def write_vocabulary(directory):
    """A tokenizer of the 256 bytes."""
    import base64
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.tiktoken").write_text("".join(
        f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)))


def make_task(folder):
    """A model and data in `folder`. Returns the flags of a short run, without --out."""
    write_vocabulary(folder / "bytes")
    save(random_gpt2(n_embd=12, n_layer=2, n_head=2).float(), folder / "bytes")
    with open(folder / "my.jsonl", "w") as file:
        for i in range(40):
            file.write(json.dumps({"source": f"n : {i}", "target": f"it is {i}"}) + "\n")
    return ["--model", str(folder / "bytes"), "--data", str(folder / "my.jsonl"), "--device", "cpu",
            "--lr", "1e-2", "--steps", str(STEPS), "--batch-size", "4", "--dev-every",
            str(DEV_EVERY)]


def child(function, output="output.txt"):
    """Call `function` in a child, its prints in the file `output`. Returns its number."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    status = 70                                     # what an error of our own would give
    try:
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        function()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:                                    # whatever happens: never back into the parent's
            os._exit(status)


def status_of(number):
    """The exit status of a child when it has ended, negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def end(text, failures):
    """Print what was found; status 1 where anything was."""
    for failure in failures[:20]:
        print("FAILED", failure)
    print(f"{text}: {len(failures)} failed")
    sys.exit(bool(failures))
