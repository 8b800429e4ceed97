"""A run of train.py on the disk, out/NAME/:

    config.json     all settings, the git commit, versions, threads, the model's fingerprint
    log.jsonl       one object for each logged step
    prefix.pt       the best prefix so far, folded; of fine-tuning model/, the best weights
    resume.pt       everything that is needed to go on, copies of log.jsonl and prefix.pt included

Each file is whole or absent at any moment. They are written one after the other, so resume.pt alone
says what belongs together: going on puts back the others as they were when it was written. One
process writes (a lock, `.lock`), any number reads. Not here: what is learned (prefix.py,
baselines/).
"""
import dataclasses
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import torch

from data import own
from prefix import tensors_of
from pretrained.checkpoint import UNREADABLE, check_finite, describe, load, read_tensors, save
from pretrained.load import load_model
from utils import files
from utils.cli import check, nearest
from utils.files import append_lines, atomic_write, read_json, write_json

FORMAT = "prefix-tuning 1"
ROOT = Path(__file__).parent.parent
# What resume.pt has a copy of.
COPIED = ("log.jsonl", "prefix.pt", "model/model.pt", "model/config.json")
# Settings of train.py that may be others when a run goes on.
FREE = {"out", "resume", "device", "stop_at"}
# The settings of a run that other programs read, with their types.
READ = {"model": (str,), "data": (str,), "data_dir": (str,), "source_key": (str,),
        "target_key": (str,), "max_source": (int, type(None))}


# ---- a prefix

def save_prefix(path, folded, model):
    """Write a folded prefix, (L, 2, 1, H, P, D) or three such, and its model's fingerprint."""
    parts = [part.float().cpu() for part in tensors_of(folded)]
    prefix = dict(zip(folded._fields, parts)) if isinstance(folded, tuple) else parts[0]
    check_finite(prefix if isinstance(prefix, dict) else {"the prefix": prefix}, path)
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "fingerprint": model.fingerprint, "prefix": prefix}, file)


def load_prefix(path, model):
    """The folded prefix in `path`, on the model's device and in its dtype: (L, 2, 1, H, P, D), or
    three such.

    Raises ValueError for a file that is not a prefix, or a prefix trained with other weights: keys
    and values mean nothing to a model that did not help to find them.
    """
    try:
        saved = read_tensors(path)
        if saved["format"] != FORMAT:
            raise KeyError("format")
        fingerprint, prefix, empty = saved["fingerprint"], saved["prefix"], model.empty_prefix()
        if fingerprint == model.fingerprint:    # a BART's has other parts than a GPT-2's
            prefix = type(empty)(**prefix) if isinstance(empty, tuple) else prefix
            # It may have fewer layers, the upper ones, and any length.
            shapes = [(tuple(part.shape), (min(max(1, len(part)), len(like)), *like.shape[1:4],
                                           part.size(4), like.size(5)))
                      for part, like in zip(tensors_of(prefix), tensors_of(empty))]
    except UNREADABLE as error:
        raise ValueError(f"got {path}, which is no prefix ({describe(error)}); expected the "
                         "prefix.pt of a run of train.py with this kind of model; choose another "
                         "run, or train it again") from error
    if fingerprint != model.fingerprint:
        raise ValueError(f"got {path}, a prefix for the model {fingerprint!r}, expected one for "
                         f"the model that is loaded, {model.fingerprint!r}; load the one it was "
                         "trained with")
    for shape, expected in shapes:
        if shape != expected:
            raise ValueError(f"got {path} with a prefix of shape {shape}, expected {expected}; "
                             "train it again")
    prefix = prefix.to(model.word_embedding.weight)
    check_finite(prefix._asdict() if isinstance(prefix, tuple) else {"the prefix": prefix}, path)
    return prefix


def starting_point(settings, model, tokenizer):
    """The keys and values that train.py starts from, folded: those of the run --start-from, or of
    the words of --init words; None: at random.
    """
    if settings.start_from:
        return load_prefix(Path(settings.start_from) / "prefix.pt", model)
    if settings.init == "words":
        return model.prefix_from_tokens(tokenizer.encode(f" {settings.init_text}"))
    return None


# ---- a finished run

def run_settings(directory):
    """The settings that a run was trained with, from its config.json.

    Raises ValueError for a directory that is no run.
    """
    try:
        settings = read_json(Path(directory) / "config.json")["settings"]
        # Other settings are only compared or shown; `resumed_settings` checks all of them.
        for name, kinds in READ.items():
            if (name in settings or name == "model") and not isinstance(settings[name], kinds):
                raise TypeError(f"its {name} is {settings[name]!r:.60}")
        return settings
    except UNREADABLE as error:
        runs = sorted(str(path.parent) for path in Path("out").glob("*/config.json")
                      if path.parent != Path(directory))
        raise ValueError(f"got {directory}, which is no run ({describe(error)[:150]}); expected "
                         "the config.json that train.py writes in it; " + nearest(
                             str(directory), runs, f"choose one of {', '.join(runs[:9])}" if runs
                             else "train one: `python train.py` writes it into out/")) from error


def resumed_settings(args):
    """The settings of the run --resume; of `args`, the new call, only --device and --stop-at.

    Raises ValueError for other flags, and for a run that has other settings than this version.
    """
    theirs = run_settings(args.resume)
    new = sorted(args.given - {"resume", "device", "stop_at"})
    if new:
        raise ValueError(f"got --{new[0].replace('_', '-')} with --resume; expected only --device "
                         "and --stop-at beside it; start a new run for new settings")
    names = {field.name for field in dataclasses.fields(args)}
    other = sorted(names ^ theirs.keys())       # unknown here, or not there: neither is guessed
    if other:
        raise ValueError(f"got {args.resume}, whose config.json has other settings "
                         f"({', '.join(other)}); expected those of this version of train.py; start "
                         "a new run")
    check(type(args)(**theirs), lambda name: f"{args.resume}/config.json with {name} =")
    return dataclasses.replace(type(args)(**theirs), resume=args.resume, out=args.resume,
                               device=args.device, stop_at=args.stop_at)


def weights_learn(model):
    return any(weight.requires_grad for weight in model.parameters())


def save_learned(directory, learner, model):
    """Write what was learned so far: the prefix, or the whole model where its weights learn."""
    if weights_learn(model):
        save(model, Path(directory) / "model", again=True)
    else:
        save_prefix(Path(directory) / "prefix.pt", learner.fold(), model)


def load_learned(directory, model):
    """(model, prefix) as `save_learned` wrote them; `model` itself may have changed since."""
    directory = Path(directory)
    if weights_learn(model):
        return load(directory / "model", model.device, model.dtype), model.empty_prefix()
    return model, load_prefix(directory / "prefix.pt", model)


def load_run(directory, device, dtype):
    """(model, tokenizer, prefix) of a run, as it decodes: the model with its prefix, or the
    fine-tuned model with an empty one.
    """
    weights = Path(directory) / "model"
    weights = weights if weights.exists() else None
    model, tokenizer = load_model(run_settings(directory)["model"], device, dtype, weights,
                                  read_json(Path(directory) / "config.json").get("fingerprint"))
    if weights:
        return model, tokenizer, model.empty_prefix()
    return model, tokenizer, load_prefix(Path(directory) / "prefix.pt", model)


# ---- a run that is written

def names_of(settings):
    """The directories to try for a new run: --out, or out/MODEL-DATA and that with a number."""
    if settings.out:
        return [settings.out]
    name = f"out/{Path(settings.model).name}-{own.name_of(settings.data)}"
    name += "" if settings.method == "prefix" else f"-{settings.method}"
    return itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))


def make_directory(names):
    """Create the first of `names` that does not exist; two processes never get the same one."""
    for name in names:
        try:
            files.make_folder(Path(name).parent)
            os.mkdir(name)
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(f"could not make the directory {name}: {error}; choose another place by "
                          "--out, in which you may write") from error
        files.sync_folder(Path(name).parent)
        files.lock(Path(name) / ".lock")
        return str(name)
    raise ValueError(f"got --out {name}, which exists; expected a new directory; choose another")


def commit_here():
    """The git commit of this project, None where it is no checkout, as in somebody's repository."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    said = subprocess.run(["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=ROOT, env=own,
                          capture_output=True, text=True).stdout
    top, *commit = said.splitlines() or [""]
    return commit[0] if commit and Path(top).resolve() == ROOT.resolve() else None


def environment():
    """What else than the settings decides the last bits of the numbers."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


def create(settings, summary, model):
    """Make the directory of a new run, write down all settings and the summary of the parameters.

    Returns the settings with --out, whose default is the first name that is free.
    """
    settings = dataclasses.replace(settings, out=make_directory(names_of(settings)))
    write_json(Path(settings.out) / "config.json", {
        "settings": dataclasses.asdict(settings), "parameters": summary,
        "fingerprint": model.fingerprint, "commit": commit_here(),
        "environment": environment()})
    return settings


def append_log(directory, **values):
    """Add a line to log.jsonl; it is on the disk when this returns."""
    append_lines(Path(directory) / "log.jsonl", [json.dumps(values) + "\n"])


def save_state(settings, state):
    """Write resume.pt: `state`, a dictionary of what torch.load reads without running code, the
    settings, and a copy of the run's other files as they are now.

    Raises ValueError for weights with NaN or infinity; the last good state stays.
    """
    directory = Path(settings.out)
    check_finite(state.get("learner", state.get("model", {})), directory / "resume.pt")
    copies = {name: torch.from_numpy(numpy.memmap(directory / name, numpy.uint8, "c"))
              for name in COPIED if (directory / name).exists()}
    with atomic_write(directory / "resume.pt") as file:
        torch.save(state | {"settings": dataclasses.asdict(settings), "files": copies}, file)


def remove_unsaved(directory):
    """Remove a run that ended before its first saving, if there is one. Raises ValueError while
    another process writes it.
    """
    if Path(directory).exists() and not (Path(directory) / "resume.pt").exists():
        with files.locked(Path(directory) / ".lock"):
            shutil.rmtree(directory)


def mend(directory):
    """Restore a run's other files, as its log, to what they were when resume.pt was written, if it
    was, and say so: programs that choose between runs read the log.
    """
    path = Path(directory) / "resume.pt"
    if path.exists():
        with files.locked(path.with_name(".lock")):
            try:
                put_back(directory, read_tensors(path))
            except UNREADABLE as error:
                raise ValueError(f"got {path}, which is damaged ({describe(error)}); expected what "
                                 "train.py wrote there; remove that run") from error


def check_settings(state, settings, free):
    """Raise ValueError unless a saved state is of a run with these settings, but for those that are
    `free`.
    """
    theirs, ours = state["settings"], dataclasses.asdict(settings)
    other = [f"--{name.replace('_', '-')} {theirs.get(name)}" for name in theirs | ours
             if name not in free and theirs.get(name) != ours.get(name)]
    if other:
        raise ValueError(f"it is of a run with {' '.join(other)}")


def put_back(directory, state):
    """Make the run's other files those of `state`. What is lost by that is said, but for lines of
    the log after that step: they will be written again.
    """
    for name in COPIED:
        path, now = Path(directory) / name, b""
        files.remove_temporaries(path)                  # of a kill in the middle of a write
        if name not in state.get("files", {}):
            continue
        then = state["files"][name].numpy().tobytes()
        if path.exists():
            now = path.read_bytes()
        if now == then:
            continue
        if name != "log.jsonl" or not now.startswith(then):
            print(f"{path} is not that of step {state['step']}, to which resume.pt belongs; it is "
                  "put back from there", file=sys.stderr)
        with atomic_write(path) as file:
            file.write(then)
    files.remove_temporaries(Path(directory) / "resume.pt")


def load_state(settings, fingerprint, data):
    """What `save_state` wrote last; the run's other files are put back as they were then.

    fingerprint, data: names of the model's weights and of the pairs. Raises ValueError where these
    or the settings are not those of the state, for it would make no sense to go on.
    """
    directory = Path(settings.out)
    path = directory / "resume.pt"
    files.lock(directory / ".lock")
    try:
        # On the CPU AdamW counts its steps; on a GPU every step would wait for that number.
        state = read_tensors(path)
        check_settings(state, settings, FREE)
        if state["fingerprint"] != fingerprint:
            raise ValueError("it was trained with other weights of the model")
        if state["data"] != data:
            raise ValueError("the data or its tokens have changed since")
        before = read_json(directory / "config.json").get("environment", environment())
    except UNREADABLE as error:
        raise ValueError(f"got {path}, which cannot be resumed ({describe(error)}); expected what "
                         "train.py wrote there; start a new run") from error
    put_back(directory, state)
    if before != environment():
        print(f"{directory} was begun with {before}, now it is {environment()}: the last bits of "
              "its numbers may be others", file=sys.stderr)
    return state
