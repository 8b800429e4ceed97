"""NaN and infinity never enter or leave, and the same threads give the same bits.

    python tests/stress/numerics.py --count 10

Refused: a model, a prefix or PEFT's file with such a number, at the place where it is written and
at the place where it is read; a pre-training that runs away leaves alone what a fair one wrote. Two
runs with the same number of threads agree to the bit, `count` times; how far runs with one and
with two threads are apart is printed, for no promise is made there.
"""
import itertools
import json
import shutil
from pathlib import Path

import torch
from common import (
    METHODS,
    ROOT,
    child,
    differences,
    empty_folder,
    end,
    finished,
    make_task,
    parse,
    run_program,
    status_of,
    tensors_in,
    train,
)

from pretrained.checkpoint import fingerprint, load, save
from pretrained.load import load_model
from pretrained.peft_adapter import write_peft
from pretrained.run_directory import load_prefix, load_run, save_prefix


def refused(what, function):
    """[] where `function` ends with a ValueError, else the sentence that says so."""
    try:
        function()
    except ValueError as error:
        return [] if "NaN" in str(error) else [f"{what}: refused for another reason: {error}"]
    return [f"{what}: taken"]


def bad_numbers(folder):
    """Every place with every such number."""
    found = []
    bytes_model = str(folder / "bytes")
    for bad in (torch.nan, torch.inf, -torch.inf):
        model, _ = load_model(bytes_model, "cpu", "fp32")
        prefix = load_prefix("whole/prefix.pt", model)
        prefix[0, 1, 0, 1, 2, 3] = bad
        found += refused(f"save_prefix {bad}", lambda m=model, p=prefix: save_prefix("p.pt", p, m))
        shutil.rmtree("bad", ignore_errors=True)
        shutil.copytree("whole", "bad")
        saved = torch.load("bad/prefix.pt", weights_only=True)
        torch.save(saved | {"prefix": prefix}, "bad/prefix.pt")
        found += refused(f"load_run {bad}", lambda: load_run("bad", "cpu", "fp32"))
        found += refused(f"write_peft {bad}", lambda: write_peft("bad", "peft"))
        model.wte.weight.data[5, 3] = bad
        found += refused(f"save {bad}", lambda m=model: save(m, "model"))
        shutil.rmtree("model", ignore_errors=True)
        shutil.copytree(bytes_model, "model")
        torch.save(model.state_dict(), "model/model.pt")
        about = json.loads(Path("model/config.json").read_text())
        del about["sha256"]
        Path("model/config.json").write_text(json.dumps(
            about | {"fingerprint": fingerprint(model)}))
        found += refused(f"load {bad}", lambda: load("model"))
    return found


def files_in(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def runaway(folder):
    """Pre-training with rates that cannot work, over the model of a fair one."""
    if not (ROOT / "scripts").exists():
        print("there is no scripts/ here: no pre-training is tried")
        return []
    from scripts import pretrain
    small = ["--tokens", "3000", "--context", "128", "--width", "8", "--layers", "1", "--heads",
             "1", "--rows", "2", "--warmup", "0", "--device", "cpu", "--weights", "weights"]

    def status_with(name, *rates):
        Path(name).mkdir()          # with a vocabulary: no package is needed to make one
        shutil.copy(ROOT / "weights/tiny-gpt2/tokenizer.tiktoken", name)
        flags = [*small, *rates, "--out", name]
        return status_of(child(lambda: run_program(lambda: pretrain.main(flags))))
    status = status_with("fair")
    if status:
        return [f"a fair pre-training: status {status}: " + Path("output.txt").read_text()[-200:]]
    found, before = [], files_in("weights")
    for rate, words in (("inf", "got --lr inf"), ("nan", "got --lr nan"), ("0", "got --lr 0"),
                        ("1e6", "got a loss of"), ("1e5", "got a loss of")):
        status = status_with(rate, "--lr", rate, "--matrix-lr", rate)
        said = Path("output.txt").read_text()
        if status != 2 or words not in said or files_in("weights") != before:
            found.append(f"pretrain --lr {rate}: status {status}: {said[-200:]}")
    return found


def with_threads(threads, flags):
    def program():
        torch.set_num_threads(threads)
        train.show = lambda *_: None
        run_program(lambda: train.main(flags))
    return status_of(child(program))


def same_threads(flags, count):
    """Runs with one thread and with two, `count` of each."""
    found = []
    for threads, n in itertools.product((1, 2), range(count)):
        if with_threads(threads, [*flags, "--out", f"threads{threads}-{n}"]):
            found.append(f"{threads} threads: " + Path("output.txt").read_text()[-300:])
        else:
            found += [f"{threads} threads, run {n}: {text}" for text in
                      differences(f"threads{threads}-{n}", f"threads{threads}-0")]
    one, two = (tensors_in(torch.load(f"threads{threads}-0/prefix.pt", weights_only=True))
                for threads in (1, 2))
    far = max((one[key] - two[key]).abs().max().item() for key in one
              if isinstance(one[key], torch.Tensor))
    print(f"prefixes learned with one and with two threads differ by {far:.1e} at most")
    return found


def main():
    args = parse(__doc__, 10)
    with empty_folder() as folder:
        task = make_task(folder)
        finished([*task, *METHODS["prefix"], "--out", "whole"])
        failures = runaway(folder) + bad_numbers(folder)
        failures += same_threads([*task, *METHODS["prefix"]], args.count)
    end(f"numbers that are none, a runaway pre-training, {2 * args.count} runs for the same bits",
        failures)


if __name__ == "__main__":
    main()
