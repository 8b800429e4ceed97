"""A run of train.py on the disk, out/NAME/:

    config.json     all settings, versions, the git commit, the fingerprint of the frozen model
    log.jsonl       one object for each logged step
    prefix.pt       the best prefix so far, folded; of fine-tuning model/, the best weights
    resume.pt       everything that is needed to go on

Each file is whole or absent at any moment. Not here: what is learned (prefix.py, baselines/).
"""
import dataclasses
import json
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from prefix import tensors_of
from pretrained.checkpoint import UNREADABLE, check_finite, describe, load, save
from pretrained.load import load_model
from utils.cli import check
from utils.files import atomic_write

FORMAT = "prefix-tuning 1"
HERE = Path(__file__).parent
# The settings of a run that other programs read, with their types.
READ = {"model": (str,), "data": (str,), "data_dir": (str,), "max_source": (int, type(None))}


# ---- a prefix

def save_prefix(path, folded, model):
    """Write a folded prefix, (L, 2, 1, H, P, D) or three such, and its model's fingerprint."""
    parts = [part.float().cpu() for part in tensors_of(folded)]
    prefix = dict(zip(folded._fields, parts)) if isinstance(folded, tuple) else parts[0]
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "fingerprint": model.fingerprint, "prefix": prefix}, file)


def load_prefix(path, model):
    """The folded prefix in `path`, on the model's device and in its dtype: (L, 2, 1, H, P, D), or
    three such.

    Raises ValueError for a file that is not a prefix, or a prefix trained with other weights: keys
    and values mean nothing to a model that did not help to find them.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
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
                         "prefix.pt of a run of train.py with this kind of model") from error
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
    path = Path(directory) / "config.json"
    try:
        settings = json.loads(path.read_text("utf-8"))["settings"]
        # The other settings are only compared or shown; those of a run that goes on: `check`.
        for name, kinds in READ.items():
            if (name in settings or name == "model") and not isinstance(settings[name], kinds):
                raise TypeError(f"its {name} is {settings[name]!r:.60}")
        return settings
    except UNREADABLE as error:
        raise ValueError(f"got {directory}, which is no run ({describe(error)[:120]}); expected "
                         "the config.json that train.py writes in it; look into out/") from error


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
        save(model, Path(directory) / "model")
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
    model, tokenizer = load_model(run_settings(directory)["model"], device, dtype,
                                  weights=weights if weights.exists() else None)
    if weights.exists():
        return model, tokenizer, model.empty_prefix()
    return model, tokenizer, load_prefix(Path(directory) / "prefix.pt", model)


# ---- a run that goes on

def save_config(settings, summary, model):
    """Create the directory and write down all settings, and the summary of the parameters."""
    commit = None
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True,
                                text=True).stdout.strip() or None
    about = {"settings": dataclasses.asdict(settings), "parameters": summary,
             "fingerprint": model.fingerprint, "commit": commit,
             "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    with atomic_write(Path(settings.out) / "config.json", "w") as file:
        json.dump(about, file, indent=1)


def append_log(directory, **values):
    with open(Path(directory) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def save_state(directory, state):
    """Write resume.pt: `state`, a dictionary of what torch.load reads without running code."""
    with atomic_write(Path(directory) / "resume.pt") as file:
        torch.save(state, file)


def load_state(directory, fingerprint, data):
    """What `save_state` wrote last; lines of the log that came after it are dropped.

    fingerprint, data: names of the model's weights and of the pairs. Raises ValueError where they
    are not those of the state, for it would make no sense to go on.
    """
    directory = Path(directory)
    path, log = directory / "resume.pt", directory / "log.jsonl"
    try:
        # On the CPU AdamW counts its steps; on a GPU every step would wait for that number.
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise ValueError("it was trained with other weights of the model")
        if state["data"] != data:
            raise ValueError("the data or its tokens have changed since")
        lines = [line for line in log.read_text("utf-8").splitlines() if line.endswith("}")]
        lines = [line for line in lines if json.loads(line)["step"] <= state["step"]]
    except UNREADABLE as error:
        raise ValueError(f"got {path}, which cannot be resumed ({describe(error)}); expected what "
                         "train.py wrote there; start a new run") from error
    with atomic_write(log, "w") as file:
        file.writelines(f"{line}\n" for line in lines)
    for left_behind in directory.rglob("*.tmp"):        # of a kill in the middle of a write
        left_behind.unlink()
    return state
