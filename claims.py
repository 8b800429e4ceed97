"""The paper's three claims on the bundled model: `python claims.py`, by figures/PROTOCOL.md.

Every run is the command `python train.py ...` that anyone can give; its model or prefix then tells
tables that no decision has seen, and what it got right becomes one line of a results file. What is
in that file is not run again, so a stopped call goes on where it was. At the end
figures/draw_claims.py draws the picture and the table of README.
A side door: nobody imports it. Not here: training (train.py), the scores (data/world.py).
"""
import concurrent.futures
import contextlib
import dataclasses
import datetime
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
from math import inf
from pathlib import Path

import torch
from tqdm import tqdm

from beam import Rules
from data import sequence, world
from opening import open_run
from plumbing import flag, parse, run, whole_file
from sample import LINE_BREAKS, generate

HERE = Path(__file__).parent
STEPS = {50: 200, 100: 200, 200: 200, 500: 400, 2000: 600}      # tables to learn from -> steps
# Method, its name in the figure, and the grid of learning rates, all of it run everywhere.
PREFIX_RATES, TUNING_RATES = (1e-3, 3e-3), (3e-5, 1e-4, 3e-4, 1e-3)
SMALL, TINY, TUNED = "prefix 1 %", "prefix 0.1 %", "fine-tuning"
METHODS = {SMALL: ("prefix", ("--prefix-len", "9"), PREFIX_RATES),
           TINY: ("prefix", ("--prefix-len", "1"), PREFIX_RATES),
           TUNED: ("finetune", (), TUNING_RATES)}
# Style -> size -> methods. The near style answers all three claims; the hard one shows the limit.
PLAN = {"near": {size: (SMALL, TUNED) for size in STEPS} | {2000: (SMALL, TINY, TUNED)},
        "hard": {2000: (SMALL, TINY, TUNED)}}
SPLITS = ("dev-kinds", "test-seen", "test-unseen")


@dataclasses.dataclass
class Settings:
    model: str = flag("tiny-gpt2", "the frozen model: a name in weights/, or a directory")
    references: str = flag("varied", "of the training tables: three people's, or one person's in "
                                     "the usual words", choices=["varied", "one"])
    styles: list = flag([], "near, hard; repeatable; none given: both")
    sizes: list = flag([], "numbers of training tables, repeatable; none given: all", kind=int)
    seeds: int = flag(3, "runs of each setting, with seeds from 1", within=(1, 1000))
    tables: int = flag(200, "told and scored in each split", within=(1, 10_000))
    test_seed: int = flag(1, "of the test tables: another one gives fresh tables",
                          within=(1, 10 ** 12))
    results: str = flag("figures/results/claims.jsonl", "a line for each run")
    jobs: int = flag(0, "runs at once, a thread each; 0: as many as cores", within=(0, inf))
    no_picture: bool = flag(False, "leave the picture and README's table as they are")


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


def one_persons(style, folder):
    """The training and dev tables with the first writer's reference only, as files of one's own."""
    for split, name in (("train", f"{style}.jsonl"), ("dev", f"{style}.dev.jsonl")):
        with open(Path(folder) / name, "w", encoding="utf-8") as file:
            for e in world.task(style, split, writers=(0,)):
                row = {"source": e.source, "target": e.targets[0], "topic": e.topic}
                file.write(json.dumps(row) + "\n")
    return str(Path(folder) / f"{style}.jsonl")


def bleu(examples, texts):
    """Corpus BLEU of sacrebleu with all references, or None where the package is missing."""
    try:
        import sacrebleu
    except ImportError:
        return None
    most = max(len(e.targets) for e in examples)
    references = [[e.targets[min(n, len(e.targets) - 1)] for e in examples] for n in range(most)]
    return round(sacrebleu.corpus_bleu(texts, references).score, 2)


@torch.no_grad()
def scores(model, tokenizer, prefix, job, split):
    """What a run says of tables it has not seen, scored: two shares in percent and BLEU.

    Settings are chosen on the tables of seed 0, which everything else was developed on, too.
    """
    seed, count = 0 if split == "dev-kinds" else job["test_seed"], job["tables"]
    examples = world.task(job["style"], split, count, seed=seed)
    banned = {token for text in LINE_BREAKS for token in tokenizer.encode_ordinary(text)}
    rules, texts = Rules(tokenizer.eot_token, banned=tuple(banned)), []
    for i in range(0, count, 100):
        prompts = [sequence.prompt_ids(tokenizer, e.source) for e in examples[i:i + 100]]
        rows = generate(model, prompts, rules, prefix)
        texts += [" ".join(sequence.text_of(tokenizer, row).split()) for row in rows]
    return {"slots": round(100 * world.slot_accuracy(examples, texts), 2),
            "exact": round(100 * world.exact_match(examples, texts), 2),
            "bleu": bleu(examples, texts)}


def cpu_seconds():
    """Of this process and the ended ones it started: what else the machine does is not in it."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def carry_out(job):
    """Train, decode, score: the line of the results file."""
    torch.set_num_threads(1)
    before = cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        data = "world" if job["style"] == "near" else "world-hard"
        if job["references"] == "one":
            data = one_persons(job["style"], folder)
        words, out = command(job, data, f"{folder}/run"), Path(folder) / "run"
        ended = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
        if ended.returncode:
            raise ValueError(f"`python {' '.join(words)}` ended with: {ended.stderr[-500:]}")
        log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        seen = [line for line in log if "dev_loss" in line]
        best = min(seen, key=lambda line: line["dev_loss"])
        with contextlib.redirect_stderr(io.StringIO()):         # the device, said for every run
            model, tokenizer, prefix = open_run(out, "cpu", "fp32")
        told = {split: scores(model, tokenizer, prefix, job, split) for split in SPLITS}
    return job | {"dev_loss": best["dev_loss"], "best_step": best["step"],
                  "cpu_seconds": round(cpu_seconds() - before, 1)} | told


def read_results(path):
    """The lines of a results file; one that a kill left unfinished is dropped."""
    path = Path(path)
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("}")]
    except ValueError as error:
        raise ValueError(f"got {path}, a line of which is no JSON ({error}); expected what "
                         "claims.py wrote there; mend it, or give another --results") from error


def main(argv=None):
    settings = parse(Settings, argv, "Test the paper's three claims on the bundled model.")
    unknown = {*settings.styles} - {*PLAN} or {*settings.sizes} - {*STEPS}
    if unknown:
        raise ValueError(f"got {sorted(unknown)}; expected --styles of {', '.join(PLAN)} and "
                         f"--sizes of {', '.join(map(str, STEPS))}")
    results, jobs = Path(settings.results), plan(settings)
    done = read_results(results)
    jobs = [job for job in jobs if not any(job.items() <= line.items() for line in done)]
    with whole_file(results, "w") as file:                      # without a line cut by a kill
        file.writelines(json.dumps(line) + "\n" for line in done)
    workers = settings.jobs or os.cpu_count()
    about = {"date": f"{datetime.date.today()}", "torch": torch.__version__,
             "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    with concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn")) as pool, open(results, "a") as file:
        waiting = [pool.submit(carry_out, job) for job in jobs]
        for future in tqdm(concurrent.futures.as_completed(waiting), total=len(jobs), unit="run"):
            file.write(json.dumps(future.result() | about) + "\n")
            file.flush()
    if not settings.no_picture:
        drawn = subprocess.run([sys.executable, HERE / "figures" / "draw_claims.py", results])
        sys.exit(drawn.returncode)              # what was wrong it has said itself


if __name__ == "__main__":
    run(main)
