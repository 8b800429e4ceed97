"""The paper's three claims on the bundled model: `python -m scripts.claims`, by docs/protocol.md.

Every run is the command `python train.py ...` that anyone can give; its model or prefix then
decodes tables that no decision has seen, and its scores become one line of a results file. What is
in that file is not run again, so a stopped call goes on where it was. At the end draw_claims.py
draws the picture, and writes the table of docs/results.md. Not here: training (train.py), the
scores (data/toy_world/tables.py).
"""
import concurrent.futures
import contextlib
import dataclasses
import datetime
import io
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import sample
from data.toy_world import tables
from scripts import draw_claims
from scripts.draw_claims import SMALL, TINY, TUNED, UPPER
from scripts.results import append_rows, lock_rows, read_rows, write_rows
from scripts.scores import DEFAULT, sacrebleu_scores
from utils.cli import flag, parse, run_program
from utils.terminal import progress

HERE = Path(__file__).parent.parent
STEPS = {50: 200, 100: 200, 200: 200, 500: 400, 2000: 600}      # tables to learn from -> steps
# Method, its name in the figure, and the grid of learning rates, all of it run everywhere.
PREFIX_RATES, TUNING_RATES = (1e-3, 3e-3), (3e-5, 1e-4, 3e-4, 1e-3)
METHODS = {SMALL: ("prefix", ("--prefix-len", "9"), PREFIX_RATES),
           TINY: ("prefix", ("--prefix-len", "1"), PREFIX_RATES),
           TUNED: ("finetune", (), TUNING_RATES)}
METHODS |= {method: ("prefix", ("--prefix-len", "9", "--prefix-layers", f"{4 - n}-3"), PREFIX_RATES)
            for method, n in UPPER.items()}
# Style -> size -> methods. The near style answers all three claims; the hard one shows the limit.
PLAN = {"near": {size: (SMALL, TUNED) for size in STEPS} | {2000: (SMALL, TINY, TUNED, *UPPER)},
        "hard": {2000: (SMALL, TINY, TUNED, *UPPER)}}
SPLITS = ("dev-kinds", "test-seen", "test-unseen")


@dataclasses.dataclass
class Settings:
    model: str = flag("tiny-gpt2", "the frozen model: a name in weights/, or a directory")
    references: str = flag("varied", "of the training tables: three writers', or one writer's in "
                                     "the usual words", choices=["varied", "one"])
    styles: list = flag([], "near, hard; repeatable; none given: both")
    sizes: list = flag([], "numbers of training tables, repeatable; none given: all", kind=int,
                       within=(1, 10 ** 6))
    seeds: int = flag(3, "runs of each setting, with seeds from 1", within=(1, 1000))
    tables: int = flag(200, "decoded and scored in each split", within=(1, 10_000))
    test_seed: int = flag(1, "of the test tables: another one gives fresh tables",
                          within=(1, 10 ** 12))
    results: str = flag("docs/results/claims.jsonl", "a line for each run")
    jobs: int = flag(0, "runs at once, a thread each; 0: as many as cores", within=(0, 1000))
    no_picture: bool = flag(False, "leave the picture and the table of docs/results.md as they are")


def plan(settings):
    """Every run as a dictionary: what sets it apart from the others."""
    jobs = []
    for style in settings.styles or PLAN:
        for size, methods in PLAN[style].items():
            if settings.sizes and size not in settings.sizes:
                continue
            jobs += [dict(model=settings.model, references=settings.references,
                          test_seed=settings.test_seed, tables=settings.tables, style=style,
                          size=size, method=method, lr=lr, seed=seed)
                     for method in methods for lr in METHODS[method][2]
                     for seed in range(1, settings.seeds + 1)]
    return jobs


def command(job, data, out):
    """The words after `python` that make this run."""
    method, flags, _ = METHODS[job["method"]]
    # As in the paper's low-data runs, the dev set that picks the best step is 30 % of the training
    # set (each table has about three pairs), up to the usual 500 pairs.
    dev_pairs = min(500, round(0.3 * 3 * job["size"]))
    steps = STEPS[job["size"]]
    return ["train.py", "--model", job["model"], "--data", data, "--method", method, *flags,
            "--examples", str(job["size"]), "--steps", str(steps), "--batch-size", "10",
            "--lr", str(job["lr"]), "--seed", str(job["seed"]), "--dev-pairs", str(dev_pairs),
            "--dev-every", str(steps // 5), "--device", "cpu", "--out", out]


def one_writers_tables(style, folder):
    """The training and dev tables with the first writer's reference only, as files of one's own."""
    for split, name in (("train", f"{style}.jsonl"), ("dev", f"{style}.dev.jsonl")):
        write_rows(Path(folder) / name, (
            {"source": e.source, "target": e.targets[0], "topic": e.topic}
            for e in tables.task(style, split, writers=(0,))))
    return str(Path(folder) / f"{style}.jsonl")


def bleu(examples, outputs):
    """Corpus BLEU with all references, or None where the package sacrebleu is missing."""
    references = [e.targets for e in examples]
    try:
        return round(sacrebleu_scores(outputs, references, DEFAULT, ["BLEU"])["BLEU"], 2)
    except ImportError:
        return None


def scores(generator, job, split):
    """What a run generates for tables it has not seen, scored: two shares in percent and BLEU.

    Settings are chosen on the tables of seed 0, which everything else was developed on, too.
    """
    seed, count = 0 if split == "dev-kinds" else job["test_seed"], job["tables"]
    examples, outputs = tables.task(job["style"], split, count, seed=seed), []
    for i in range(0, count, 100):
        texts = generator.generate([e.source for e in examples[i:i + 100]])
        outputs += [" ".join(text.split()) for text in texts]
    return {"slots": round(100 * tables.slot_accuracy(examples, outputs), 2),
            "exact": round(100 * tables.exact_match(examples, outputs), 2),
            "bleu": bleu(examples, outputs)}


def cpu_seconds():
    """Of this process and the ended ones it started: what else the machine does is not in it."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def carry_out(job, place=None):
    """Train, decode, score: the line of the results file. place: a directory for what is between.
    """
    torch.set_num_threads(1)
    before = cpu_seconds()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        data = "world" if job["style"] == "near" else "world-hard"
        if job["references"] == "one":
            data = one_writers_tables(job["style"], folder)
        words, out = command(job, data, f"{folder}/run"), Path(folder) / "run"
        ended = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
        if ended.returncode:
            raise ValueError(f"`python {' '.join(words)}` ended with: "
                             f"{ended.stderr[-500:].strip()}; mend that, and give the same "
                             "command again to go on")
        losses = [row for row in read_rows(out / "log.jsonl") if "dev_loss" in row]
        best = min(losses, key=lambda row: row["dev_loss"])
        with contextlib.redirect_stderr(io.StringIO()):         # the device, named for every run
            generator = sample.Generator(sample.Settings(run=[str(out)], device="cpu",
                                                         dtype="fp32"))
        found = {split: scores(generator, job, split) for split in SPLITS}
    return job | {"dev_loss": best["dev_loss"], "best_step": best["step"],
                  "cpu_seconds": round(cpu_seconds() - before, 1)} | found


def stop(pool):
    """End the processes of the pool and what they have started."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):       # not yet a group
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def main(argv=None):
    settings = parse(Settings, argv, "Test the paper's three claims on the bundled model.")
    unknown = {*settings.styles} - {*PLAN} or {*settings.sizes} - {*STEPS}
    if unknown:
        raise ValueError(f"got {sorted(unknown)}; expected --styles of {', '.join(PLAN)} and "
                         f"--sizes of {', '.join(map(str, STEPS))}")
    results, jobs = Path(settings.results), plan(settings)
    lock_rows(results)
    done = read_rows(results)
    jobs = [job for job in jobs if not any(job.items() <= row.items() for row in done)]
    write_rows(results, done)                                   # without a line cut by a kill
    about = {"date": f"{datetime.date.today()}", "torch": torch.__version__,
             "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    # Each with its training in a process group of its own, which is stopped as a whole.
    with tempfile.TemporaryDirectory() as place, concurrent.futures.ProcessPoolExecutor(
            settings.jobs or os.cpu_count(), multiprocessing.get_context("spawn"),
            getattr(os, "setpgrp", None)) as pool:              # Windows has none
        try:
            waiting = [pool.submit(carry_out, job, place) for job in jobs]
            finished = concurrent.futures.as_completed(waiting)
            for future in progress(finished, total=len(jobs), unit="run"):
                append_rows(results, [future.result() | about])
        except BaseException:
            stop(pool)
            raise
    if not settings.no_picture:
        draw_claims.main(["--results", str(results)])


if __name__ == "__main__":
    run_program(main, goes_on=True)
