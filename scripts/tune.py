"""Which learning rate, which prefix length? A small grid of short runs, halved twice.

    python -m scripts.tune --data my.jsonl --model gpt2
    python -m scripts.tune --model smollm2 --data e2e --fast --rates 5e-4 --rates 2e-3 --steps 80

All of the grid learns for a quarter of --steps; the half with the lower dev loss goes on to half of
--steps, and half of these to the end (successive halving: Jamieson and Talwalkar 2016). Each is a
run of train.py in a folder of its own, so a stopped call goes on with what is there. Other flags
are train.py's. Not here: training itself.
"""
import contextlib
import copy
import dataclasses
import io
import itertools
import math
import random
from pathlib import Path

import train
from data import own
from data.pairs import load_examples
from pretrained import run_directory
from scripts.results import read_rows, write_rows
from utils.cli import flag, parse, run_program
from utils.files import lock, make_folder
from utils.terminal import command

FEW = 500               # sources: the largest of the paper's low-data sizes
# Flags of train.py that are decided here; the last four cannot be given.
OWN = ("lr", "prefix_len", "steps", "out", "rates", "lengths", "epochs", "dev_every", "stop_at",
       "resume")


@dataclasses.dataclass
class Settings(train.Settings):
    rates: list = flag([], "learning rates to try, repeatable; left out: 3e-4, 1e-3, 3e-3, or --lr",
                       kind=float, within=(1e-12, 1e30),
                       group="grid: --data my.jsonl --rates 5e-4 --rates 2e-3 --lengths 10")
    lengths: list = flag([], "prefix lengths to try, repeatable; left out: 5, 10, 20, or "
                             "--prefix-len", kind=int, within=(1, 10_000))
    steps: int = flag(100, "steps of the longest runs, a multiple of 4", within=(4, 10 ** 9))
    out: str = flag("", "directory of the runs; left out: out/tune-MODEL-DATA",
                    group="runs: --data my.jsonl --out out/search")


def words(settings, names):
    """Settings as words of train.py's command line, but for those that are decided here."""
    for name in sorted(set(names) - set(OWN)):
        value, dashed = getattr(settings, name), "--" + name.replace("_", "-")
        yield from [dashed] if value is True else [dashed, str(value)]


def grid(s):
    """Every choice of rate and length, as words; no length where something else decides it."""
    free = s.method == "prefix" and s.init != "words" and not s.start_from
    rates = s.rates or ([s.lr] if s.lr else [3e-4, 1e-3, 3e-3])
    lengths = s.lengths or ([s.prefix_len] if s.prefix_len else [5, 10, 20] if free else [])
    return [["--lr", str(lr), *length] for lr, length in itertools.product(
        sorted(set(rates)), [["--prefix-len", str(n)] for n in sorted(set(lengths))] or [[]])]


def split_few(learn, dev, seed):
    """(train, dev), dev being 30 % of train as in the paper's low-data runs: a random part of dev;
    where that is too small, sources of train move into it.
    """
    learn, dev = (random.Random(seed).sample(part, len(part)) for part in (learn, dev))
    n = min(len(learn), round((len(learn) + len(dev)) / 1.3))
    return learn[:n], (dev + learn[n:])[:math.ceil(0.3 * n)]


def common_words(args, folder):
    """What all runs have in common, as words; few examples are split anew, into files."""
    s = copy.copy(args)
    s.out = ""
    s = train.resolve(s)
    examples = load_examples(s)
    if len(examples[0]) <= FEW:
        for part, name in zip(split_few(*examples, s.seed), ("few.jsonl", "few.dev.jsonl")):
            write_rows(folder / name, ({"source": e.source, "target": e.targets, "topic": e.topic}
                                       for e in part))
            print(f"few examples: {len(part)} in {folder / name}")
        s.data, s.data_dir, s.examples = str(folder / "few.jsonl"), "", 0
        s.source_key, s.target_key = own.KEYS
    return [*words(s, (field.name for field in dataclasses.fields(train.Settings)
                       if getattr(s, field.name) != field.default)),
            "--steps", str(args.steps), "--dev-every", str(args.steps // 4)]


def advance(run, flags, steps):
    """Train the run in the folder `run` up to the step `steps`, from where it stands.

    Returns its best dev loss, infinite if it diverged. Raises KeyboardInterrupt with the signal
    that stopped it on the way.
    """
    def losses():
        return {row["step"]: row["dev_loss"] for row in read_rows(run / "log.jsonl")
                if "dev_loss" in row and row["step"] <= steps}
    run_directory.remove_unsaved(run)
    run_directory.mend(run)
    if steps not in losses():
        flags = ["--resume", str(run)] if run.exists() else [*flags, "--out", str(run)]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                status = train.main([*flags, "--stop-at", str(steps)])
        except ValueError as error:
            if not str(error).startswith("got a loss of"):
                raise
            return math.inf
        if status:
            raise KeyboardInterrupt(status - 128)
    return min(losses().values())


def halve(folder, common, choices, steps):
    """Rows (dev loss, steps, choice): those with most steps first, of these the best first."""
    done = []
    for rung in (steps // 4, steps // 2, steps):
        rows = []
        for choice in choices:
            run = folder / "-".join(word.strip("-") for word in choice)
            loss = advance(run, [*common, *choice], rung)
            rows.append((loss, rung, choice))
            print(f"{' '.join(choice)}: dev loss {loss:.3f} after {rung} steps", flush=True)
        rows.sort()
        choices = [choice for *_, choice in rows[:math.ceil(len(rows) / 2)]]
        done = rows + [row for row in done if row[2] not in [own for *_, own in rows]]
    return done


def main(argv=None):
    args = parse(Settings, argv, "Find a learning rate and a prefix length by short runs.",
                 hidden=OWN[-4:])
    refused = sorted(args.given & set(OWN[-4:])) or args.steps % 4 and ["steps"]
    if refused:
        raise ValueError(f"got --{refused[0].replace('_', '-')}; expected --steps alone to say how "
                         "long the runs are, a multiple of 4; change it, or leave it out")
    name = "-".join(own.name_of(x) for x in (args.model, args.data) if x)
    folder = Path(args.out or f"out/tune-{name}")
    make_folder(folder)
    lock(folder / ".lock")
    common, choices = common_words(args, folder), grid(args)
    about = {"common": common, "grid": choices}
    if (read_rows(folder / "tune.jsonl") or [about])[0] != about:
        raise ValueError(f"got {folder}, which has runs with other flags; expected the same; give "
                         "another --out, or remove it")
    write_rows(folder / "tune.jsonl", [about])
    try:
        rows = halve(folder, common, choices, args.steps)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        raise
    print("\n    rate  length   steps  dev loss")
    for loss, steps, (_, lr, *length) in rows:
        print(f"{float(lr):8g}{(length or '-')[-1]:>8}{steps:8}{loss:10.3f}")
    loss, _, best = rows[0]
    rates = [choice[1] for choice in choices]       # in their order
    if not math.isfinite(loss):
        raise ValueError(f"got no finite loss with the rates {rates}; give lower --rates")
    if rates[0] != rates[-1] and best[1] in (rates[0], rates[-1]):
        print("the best rate is at an end of the grid: try others with --rates")
    print("go on with:", command("train.py", *words(args, args.given), *best))


if __name__ == "__main__":
    run_program(main)
