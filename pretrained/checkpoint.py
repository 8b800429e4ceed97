"""Models on the disk: DIRECTORY/config.json and DIRECTORY/model.pt, and whose weights they are.

A prefix belongs to one set of frozen weights, so these get a name, their fingerprint. A damaged
file is a ValueError in one line. Not here: which classes a model has (architectures.py), other
people's files (hugging_face.py).
"""
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
from pathlib import Path

import torch

from pretrained.architectures import architecture, check_config
from utils.files import atomic_write

# What reading a file that is damaged, or is something else, can raise.
UNREADABLE = (OSError, EOFError, LookupError, ArithmeticError, AttributeError, TypeError,
              ValueError, RuntimeError, pickle.UnpicklingError)


def describe(error):
    """What is wrong with a file, in a few words."""
    if isinstance(error, pickle.UnpicklingError):   # PyTorch's own words advise to run it
        return "it holds code, or is no file of tensors"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def fingerprint(model):
    """A name for these very weights: 16 digits of SHA-256 of all names, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def check_finite(tensors, source):
    """Raise ValueError where a tensor of the dictionary `tensors` has a NaN or an infinity: with it
    a model says its token 0 for ever. source: where they come from.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"got {source} with NaN or infinity in {name}; expected finite "
                             "numbers; fetch it again, or train it again with a lower lr")


def save(model, directory):
    """Write DIRECTORY/config.json and DIRECTORY/model.pt, each whole or not at all."""
    directory = Path(directory)
    about = {"architecture": model.architecture, "fingerprint": fingerprint(model),
             "config": dataclasses.asdict(model.config),
             "generation_config": model.generation_config}
    with atomic_write(directory / "model.pt") as file:
        torch.save(model.state_dict(), file)
        file.flush()                    # what was there before is needed where the disk is full
        os.fsync(file.fileno())
        # Without its config.json the directory is no model: a kill between the two files cannot
        # leave new weights under an old fingerprint.
        (directory / "config.json").unlink(missing_ok=True)
    with atomic_write(directory / "config.json", "w") as file:    # last: then all is complete
        json.dump(about, file, indent=1)


def load(directory, device="cpu", dtype=torch.float32):
    """The frozen model in DIRECTORY: every weight has requires_grad False.

    Raises ValueError where the directory does not hold a model written by `save`.
    """
    directory = Path(directory)
    try:
        about = json.loads((directory / "config.json").read_text("utf-8"))
        classes, mark = architecture(about["architecture"]), about["fingerprint"]
        config, generation = classes.config(**about["config"]), about.get("generation_config", {})
        check_config(config, directory / "config.json")
        for token in itertools.chain(*(value if isinstance(value, list) else [value]
                                       for value in generation.values())):
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise ValueError(f"its generation_config has the token {token!r:.60}")
        state = torch.load(directory / "model.pt", map_location="cpu", weights_only=True)
        with torch.device("meta"):         # no numbers yet: they come from the file, without a copy
            model = classes.model(config)
        model.load_state_dict(state, assign=True)
        if fingerprint(model) != mark:
            raise ValueError("model.pt holds other weights than config.json names")
    except FileNotFoundError as error:
        raise ValueError(f"got {directory}, which has no {Path(error.filename).name}; expected "
                         "what `python -m pretrained.convert` writes; make it with that") from error
    except UNREADABLE as error:
        raise ValueError(f"got {directory}, whose files do not fit ({describe(error)}); expected "
                         "what `python -m pretrained.convert` writes; make it again") from error
    model.fingerprint = mark
    model.generation_config = generation
    model = model.to(device, dtype).requires_grad_(False).eval()
    check_finite(model.state_dict(), directory)
    return model
