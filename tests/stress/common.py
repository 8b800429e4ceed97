"""What the harnesses share: a small task in a folder, programs in children of this process, and
what makes two runs the same.

A child is a fork, so that PyTorch is imported once: a run of ten steps takes half a second.
"""
import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"             # forked children: no thread may be there before
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402
from conftest import random_gpt2  # noqa: E402

import train  # noqa: E402
from pretrained.checkpoint import save  # noqa: E402
from pretrained.run_directory import COPIED  # noqa: E402
from utils.cli import run_program  # noqa: E402

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
    flags = ["--model", str(folder / "bytes"), "--data", str(folder / "my.jsonl"), "--device",
             "cpu", "--lr", "1e-2", "--steps", str(STEPS), "--batch-size", "4", "--dev-every",
             str(DEV_EVERY)]
    # Here once: what PyTorch imports at its first step it would import in every child, for 2 s.
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*flags, "--mid-dim", "8", "--steps", "1", "--out", str(folder / "first")])
    shutil.rmtree(folder / "first")
    return flags


METHODS = {"prefix": ["--mid-dim", "8"], "finetune": ["--method", "finetune"]}


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


def start(flags, before=lambda: None, output="output.txt"):
    """train.py with `flags` in a child, after a call of `before` there."""
    def program():
        torch.set_num_threads(1)
        train.show = lambda *_: None                # it costs more time than the ten steps
        before()
        run_program(lambda: train.main(flags))
    return child(program, output)


def finished(flags, output="output.txt"):
    """The same, to its end; an error here is one of the harness's."""
    status = status_of(start(flags, output=output))
    if status:
        raise RuntimeError(f"train.py {' '.join(flags)}: status {status}\n"
                           + Path(output).read_text())


def tensors_in(saved, name=""):
    """{name: tensor or plain value} of whatever torch.save has written, but for copies of files and
    the settings, which name the directory.
    """
    if isinstance(saved, dict):
        return {k: v for key, value in saved.items() if key not in ("files", "settings")
                for k, v in tensors_in(value, f"{name}.{key}").items()}
    if isinstance(saved, (list, tuple)):
        return tensors_in(dict(enumerate(saved)), name)
    return {name: saved}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def log_of(run):
    """Step and dev loss of each line of a log; of the others the step alone, for the mean training
    loss is that of the steps since the line before or since the run went on.
    """
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("dev_loss")) for line in lines]


def differences(run, reference):
    """What of two finished runs is not the same: tensors, to the bit, and lines of the log."""
    found = []
    for name in ("resume.pt", *(copy for copy in COPIED if copy.endswith(".pt"))):
        paths = Path(run) / name, Path(reference) / name
        if paths[0].exists() != paths[1].exists():
            found.append(f"{name} is there once")
        elif paths[0].exists():
            a, b = (tensors_in(torch.load(path, weights_only=True)) for path in paths)
            found += [f"{name} {key}" for key in a.keys() | b.keys()
                      if key not in a or key not in b or not equal(a[key], b[key])]
    if log_of(run) != log_of(reference):
        found.append(f"log.jsonl: {len(log_of(run))} lines, expected {len(log_of(reference))}")
    return found + [f"{path.name} is left" for path in Path(run).rglob("*.tmp")]


def wait_for(path, number):
    """Until the file is there, which the child `number` makes."""
    deadline = time.monotonic() + 100
    while not Path(path).exists():
        if time.monotonic() > deadline or os.waitpid(number, os.WNOHANG)[0]:
            sys.exit(f"FAILED: {path} never came: {Path('output.txt').read_text()[-300:]}")
        time.sleep(0.001)


def end(text, failures, **counts):
    """Print what was found; status 1 where anything was, or where one of `counts` is 0: then the
    harness has not seen what it is there for.
    """
    failures = failures + [f"nothing was {name.replace('_', ' ')}" for name, count in counts.items()
                           if not count]
    for failure in failures[:20]:
        print("FAILED", failure)
    print(f"{text}: {len(failures)} failed")
    sys.exit(bool(failures))


def chosen(most, count, seed):
    """`count` of the numbers from 1 to `most`, each as often as any other, in random order."""
    rng, numbers = random.Random(seed), []
    while len(numbers) < count:
        every = list(range(1, most + 1))
        rng.shuffle(every)
        numbers += every
    return numbers[:count]
