"""The paper's claims on real data: `python -m scripts.real_data`, by docs/real_data.md.

Every run is the commands `python train.py ...` and `python -m scripts.evaluate ...` that anyone can
give, in a directory of its own under --out, and becomes one line of the results file. What is in
that file is not run again, and a run that was stopped goes on where it was: so long work can be
done in parts. `--full` takes the paper's own settings, at full epochs, for a GPU.
Not here: training (train.py), scores (scripts/evaluate.py), what needs no learning
(baselines/untrained.py).
"""
import dataclasses
import datetime
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch

import sample
from baselines import untrained
from data import tasks
from pretrained.run_directory import mend, remove_unsaved
from scripts.evaluate import parts_of, scores_of
from scripts.real_data_plan import DECIDES, GROUPS, full_plan, incomplete_grids, plan, repeats
from scripts.results import append_rows, lock_rows, read_rows, write_rows
from utils.cli import flag, parse, run_child, run_program
from utils.files import lock, make_folder, read_json, read_json_object

HERE = Path(__file__).parent.parent
KEYS = ("name", "group")                        # of every line of the results


@dataclasses.dataclass
class Settings:
    model: str = flag("smollm2", "the frozen model; another one needs --full, as the plan is "
                            "for 30 layers")
    data_dir: str = flag("", "where the data sets are; left out: they are downloaded")
    out: str = flag("out/real-data", "directory of the runs")
    results: str = flag("docs/results/real-data.jsonl", "a line for each run")
    only: list = flag([], f"{', '.join(GROUPS)}; repeatable; none given: all; not with --full")
    again: list = flag([], "a run, e2e-prefix say, to repeat with two more seeds; repeatable")
    full: bool = flag(False, "the paper's settings and epochs on E2E, WebNLG and DART, for a GPU")
    limit: int = flag(0, "decode the first so many tables of a test set only; 0: all",
                      within=(0, 10 ** 6))


# ---- one run

def low_data(name, settings):
    """The path of a file with a few pairs of E2E, "low-SIZE-PART", made where it is not there.

    As in the paper the dev set has 30 % as many pairs, so little data stay little.
    """
    _, size, part = name.split("-")
    path = Path(settings.out) / f"{name}.jsonl"
    for split, count in (("train", int(size)), ("dev", round(0.3 * int(size)))):
        pairs = [{"source": e.source, "target": text}
                 for e in tasks.load("e2e", split, settings.data_dir or None) for text in e.targets]
        suffix = "" if split == "train" else ".dev"
        write_rows(path.with_name(f"{name}{suffix}.jsonl"),
                   random.Random(int(part)).sample(pairs, count))
    return str(path)


def call(words, folder=HERE):
    """Run a program of this project to its end: (seconds, peak memory in MB)."""
    print("$ python", *words, flush=True)
    began = time.perf_counter()
    used = run_child([sys.executable, *words], cwd=folder)
    return round(time.perf_counter() - began, 1), round(used.ru_maxrss / 1024)


def train(run, settings, out):
    """Train one run, or go on with it: what the results file tells of the training."""
    data = low_data(run.data, settings) if run.data.startswith("low-") else run.data
    remove_unsaved(out)
    if not out.exists():
        words = ["train.py", "--model", settings.model, "--data", data, *run.flags, "--fast",
                 "--out", str(out)]
        if settings.data_dir and data == run.data:
            words += ["--data-dir", settings.data_dir]
    else:
        mend(out)
        refuse_another(run, settings, out)
        words = ["train.py", "--resume", str(out)]
    calls = out.with_name(f"{out.name}.parts.jsonl")    # the rate in a name has a point of its own
    parts = read_rows(calls)                            # of a run that was stopped
    if not parts or parts[-1]["step"] < parts[-1]["steps"]:
        seconds, memory = call(words)
        steps = read_json(out / "config.json")["settings"]["steps"]
        parts.append({"seconds": seconds, "peak_MB": memory, "steps": steps,
                      "step": read_rows(out / "log.jsonl")[-1]["step"]})
        write_rows(calls, parts)
    about = read_json(out / "config.json")
    log = read_rows(out / "log.jsonl")
    losses = [(row["step"], round(row["dev_loss"], 4)) for row in log if "dev_loss" in row]
    asked = about["settings"]
    method = asked["method"] + ("" if asked["init"] == "random" else f" {asked['init']}")
    return {"method": method, "lr": asked["lr"], "seed": asked["seed"], "steps": asked["steps"],
            "parameters": about["parameters"], "dev_losses": losses,
            "best_dev_loss": min(loss for _, loss in losses), "commit": about["commit"],
            "tokens_per_second": statistics.median(
                row["tokens_per_second"] for row in log if "tokens_per_second" in row),
            "train_seconds": round(sum(part["seconds"] for part in parts), 1),
            "peak_MB": max(part["peak_MB"] for part in parts)}


def refuse_another(run, settings, out):
    """Raises ValueError where `out` has a run with another model or other flags than `run`."""
    wanted = {"model": settings.model} | {
        name[2:].replace("-", "_"): value for name, value in zip(run.flags[::2], run.flags[1::2])}
    found = read_json(out / "config.json")["settings"]
    other = {name: found.get(name) for name, value in wanted.items()
             if str(found.get(name)) != value}
    if other:
        raise ValueError(f"got {out}, a run with {other}; expected "
                         f"{ {name: wanted[name] for name in other} }; move it away, or name "
                         "another --out")


def folder_of_texts(out, settings, beams):
    """Where the texts and scores of one way to decode lie."""
    return out / (("beams" if beams else "greedy") + (f"-{settings.limit}" * bool(settings.limit)))


def decode(run, settings, out, beams):
    """Score the test set by scripts.evaluate: {part: scores}, and for E2E what is said. Raises
    ValueError where the score that decides could not be computed: the texts are kept.
    """
    data = "e2e" if run.data.startswith("low-") else run.data
    words = ["-m", "scripts.evaluate", "--run", str(out), "--data", data]
    words += [] if beams else ["--num-beams", "1", "--min-new-tokens", "0"]
    words += ["--data-dir", settings.data_dir] if settings.data_dir else []
    words += ["--examples", str(settings.limit)] if settings.limit else []
    texts, scores = "test.jsonl", "test.scores.json"
    own = folder_of_texts(out, settings, beams)
    if not (own / scores).exists():                     # else they are there since an earlier call
        call([*words, "--batch-size", "16" if beams else "32"])
        check_score(run, read_json_object(out / scores)["scores"])
        own.mkdir(exist_ok=True)
        for name in (texts, scores):
            (out / name).replace(own / name)
    found = read_json_object(own / scores)["scores"]
    return rounded(found) | (said(read_rows(own / texts)[1:]) if data == "e2e" else {})


def check_score(run, scores):
    """Raises ValueError where the score that decides is not among {part: scores}."""
    score = DECIDES.get(run.data, "BLEU")
    if score not in scores["all"]:
        raise ValueError(f"got no {score} of {run.name}, which decides; expected the packages that "
                         "are named above; install them and run the same command again")


def rounded(scores):
    return {part: {name: round(x, 2) for name, x in numbers.items() if isinstance(x, (int, float))}
            for part, numbers in scores.items()}


def said(rows):
    """{"said": {field: percentage of texts that have its value}}, for the fields name and near."""
    shares = {}
    for field in ("name", "near"):
        pairs = [(value, row["text"]) for row in rows for key, _, value in
                 (part.partition(" : ") for part in row["source"].split(" | ")) if key == field]
        hits = sum(value.lower() in text.lower() for value, text in pairs)
        shares[field] = round(100 * hits / max(1, len(pairs)), 1)
    return {"said": shares}


def first_texts(path, data, count=10):
    """[source, text] of the first texts of a test set, so that nobody picks; of WebNLG's those of
    unseen categories.
    """
    rows = [row for row in read_rows(path) if "source" in row]      # without a line of settings
    if data == "webnlg":
        rows = [row for row in rows if row["topic"] not in tasks.WEBNLG_SEEN]
    return [[row["source"], row["text"]] for row in rows[:count]]


def untrained_texts(run, settings, examples):
    """What the template, or the frozen model asked by its chat prompt, says of each source."""
    what, _, _ = run.name.partition("-")
    if what == "template":
        return [untrained.TEMPLATES[run.data](e.source) for e in examples]
    generator = sample.Generator(sample.Settings(model=settings.model, num_beams=1))
    tokenizer, texts = generator.tokenizer, []
    for i in range(0, len(examples), 32):
        prompts = [untrained.chat_prompt(tokenizer, untrained.INSTRUCTIONS[run.data], e.source)
                   for e in examples[i:i + 32]]
        rows = sample.generate(generator.model, prompts, generator.constraints)
        texts += [" ".join(tokenizer.text_of(row).split()) for row in rows]
    return texts


def score_untrained(run, settings):
    examples = tasks.load(run.data, "test", settings.data_dir or None)[:settings.limit or None]
    texts = untrained_texts(run, settings, examples)
    rows = [{"source": e.source, "topic": e.topic, "text": text}
            for e, text in zip(examples, texts)]
    write_rows(Path(settings.out) / f"{run.name}.jsonl", rows)
    found = {}
    for part, chosen in parts_of(run.data, examples, False).items():
        found[part], missing = scores_of(run.data, [examples[i] for i in chosen],
                                         [texts[i] for i in chosen])
        for names, reason in missing.items():
            print(f"no {names}: {reason}", file=sys.stderr)
    check_score(run, found)
    return rounded(found) | (said(rows) if run.data == "e2e" else {})


def machine():
    """The CPU, or the GPU, that this runs on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()}"


def conditions(settings):
    """What else two rows have to have in common, to be of the same experiment."""
    return {"model": settings.model, "limit": settings.limit}


def carry_out(run, settings):
    """Train, decode, score: the line of the results file."""
    out, row = Path(settings.out) / run.name, run._asdict() | conditions(settings)
    if not run.flags:
        row["greedy"] = score_untrained(run, settings)
        row["texts"] = first_texts(Path(settings.out) / f"{run.name}.jsonl", run.data)
    else:
        row |= train(run, settings, out)
        if "grid" not in run.group:
            row["greedy"] = decode(run, settings, out, beams=False)
            row["texts"] = first_texts(
                folder_of_texts(out, settings, beams=False) / "test.jsonl", run.data)
        if run.beams:
            row["beams"] = decode(run, settings, out, beams=True)
    return row | {"date": f"{datetime.date.today()}", "machine": machine(),
                  "python": platform.python_version(), "torch": torch.__version__}


def main(argv=None):
    settings = parse(Settings, argv, "Test the paper's claims on real data.")
    bad = {*settings.only} - {*(() if settings.full else GROUPS)}
    if bad:
        raise ValueError(f"got --only {sorted(bad)}; expected {', '.join(GROUPS)}, without --full")
    results, out = Path(settings.results), Path(settings.out)
    make_folder(out)
    lock(out / ".lock")
    lock_rows(results)
    write_rows(results, read_rows(results, KEYS))               # without a line cut by a kill
    while True:
        own = [row for row in read_rows(results) if conditions(settings).items() <= row.items()]
        done = {row["name"] for row in own if row["group"] in (*GROUPS, "full")}
        runs = full_plan() if settings.full else plan(own)
        waiting = [run for run in runs + repeats(runs, settings.again)
                   if run.name not in done and (not settings.only or run.group in settings.only)]
        if not waiting:
            for group in [] if settings.full else incomplete_grids(own):
                print(f"runs whose learning rate comes from {group} are not planned yet: run "
                      f"--only {group} first", file=sys.stderr)
            return
        append_rows(results, [carry_out(waiting[0], settings)])


if __name__ == "__main__":
    run_program(main, goes_on=True)
