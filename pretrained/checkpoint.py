"""Models on the disk: DIRECTORY/config.json and DIRECTORY/model.pt, and whose weights they are.

A prefix belongs to one set of frozen weights, so these get a name, their fingerprint. A damaged
file is a ValueError in one line; in files written here one changed bit is noticed. Not here:
which classes a model has (architectures.py), other people's files (hugging_face.py).
"""
import dataclasses
import hashlib
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import torch

from data.tokenizer import OWN_FILES
from pretrained.architectures import architecture, check_config
from utils.files import atomic_write, plain_file, read_json, sha256_of, write_json

# What reading a file that is damaged, or is something else, can raise.
UNREADABLE = (OSError, EOFError, LookupError, ArithmeticError, AttributeError, TypeError,
              ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)


def describe(error):
    """What is wrong with a file, in a few words."""
    if isinstance(error, pickle.UnpicklingError):   # PyTorch's own words advise to run it
        return "it holds code, or is no file of tensors"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def fingerprint(model):
    """A name for these very weights: 16 hex digits of SHA-256 of names, shapes, dtypes, values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def read_tensors(path):
    """What torch.save has written to `path`, tensors only, on the CPU. Raises one of UNREADABLE.

    Its zip format has a checksum (CRC-32) of every tensor, which PyTorch itself does not compare.
    """
    with open(plain_file(path), "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"      # the format before PyTorch 1.6 has no checksums
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            # The one bit beside the checksums that matters: for what is marked as a directory
            # PyTorch reads nothing, and gives whatever the memory held.
            damaged = archive.testzip() or next((entry.filename for entry in archive.infolist()
                                                 if entry.external_attr & 0x10), None)
        if damaged:
            raise ValueError(f"{damaged} in it has another checksum, or mark, than when it was "
                             "written")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_finite(tensors, source):
    """Raise ValueError where a tensor of the dictionary `tensors` has a NaN or an infinity: with it
    all logits are NaN, and decoding repeats token 0. source: where they come from, or are to go.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"got {source} with NaN or infinity in {name}; expected finite "
                             "numbers; fetch it again, or train it again with a lower lr")


def vocabulary_sums(directory):
    """{name: SHA-256} of the files of the vocabulary in a directory."""
    return {name: sha256_of(Path(directory) / name) for name in OWN_FILES
            if (Path(directory) / name).exists()}


def save(model, directory, again=False):
    """Write DIRECTORY/config.json and DIRECTORY/model.pt, each whole or not at all.

    The vocabulary has to be there before: config.json has its checksums. again: the weights are
    those of a model that learns and will be written again. Then config.json has no fingerprint and
    stays as it is, so that the two fit each other at any moment.
    """
    directory = Path(directory)
    state, config = model.state_dict(), directory / "config.json"
    check_finite(state, directory / "model.pt")
    about = {"architecture": model.architecture, "config": dataclasses.asdict(model.config),
             "generation_config": model.generation_config}
    if not again:
        about |= {"fingerprint": fingerprint(model), "files": vocabulary_sums(directory)}
    with atomic_write(directory / "model.pt") as file:
        torch.save(state, file)
        if not again or not config.exists():
            file.flush()                # a full disk has to show before config.json is replaced
            os.fsync(file.fileno())
            # config.json before model.pt: a kill between the two leaves a fingerprint that the old
            # weights do not have, and never new weights beside an old config.json.
            write_json(config, about)


def frame(directory):
    """(the model in `directory` without its weights, its config.json). Raises one of UNREADABLE."""
    about = read_json(directory / "config.json")
    classes = architecture(about["architecture"])
    config, generation = classes.config(**about["config"]), about.get("generation_config", {})
    check_config(config, directory / "config.json")
    for name, value in generation.items():
        # Several tokens may end a text; whatever else is one token.
        several = isinstance(value, list) and name == "eos_token_id"
        for token in value if several else [value]:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise ValueError(f"its generation_config has {name} = {value!r:.60}")
    with torch.device("meta"):              # no numbers yet: they come from a file, without a copy
        model = classes.model(config)
    model.generation_config = generation
    return model, about


def load(directory, device="cpu", dtype=torch.float32, named=False):
    """The frozen model in DIRECTORY: every weight has requires_grad False.

    named: config and fingerprint are enough; weights are read only where config.json has none.
    Raises ValueError where the directory does not hold a model written by `save`.
    """
    directory = Path(directory)
    try:
        model, about = frame(directory)
        if named and "fingerprint" in about:
            model.fingerprint = about["fingerprint"]
            return model
        model.load_state_dict(read_tensors(directory / "model.pt"), assign=True)
        model.fingerprint = fingerprint(model)
        if about.get("fingerprint", model.fingerprint) != model.fingerprint:
            raise ValueError("model.pt holds other weights than config.json names")
    except FileNotFoundError as error:
        raise ValueError(f"got {directory}, which has no {Path(error.filename).name}; expected "
                         "what `python -m pretrained.convert` writes; make it with that") from error
    except UNREADABLE as error:
        raise ValueError(f"got {directory}, whose files do not fit ({describe(error)}); expected "
                         "what `python -m pretrained.convert` writes; make it again") from error
    model = model.to(device, dtype).requires_grad_(False).eval()
    check_finite(model.state_dict(), directory)
    return model


def check_vocabulary(directory):
    """Raise ValueError unless the files of the vocabulary are those that `save` found there."""
    try:
        listed = read_json(Path(directory) / "config.json").get("files")
        found = vocabulary_sums(directory)
        for name in OWN_FILES:
            if listed is not None and listed.get(name) != found.get(name):
                raise ValueError(f"{name} has another SHA-256 than config.json names"
                                 if name in listed else f"config.json names no {name}")
    except UNREADABLE as error:
        raise ValueError(f"got {directory}, whose vocabulary is not that of its model "
                         f"({describe(error)}); expected the files that `python -m "
                         "pretrained.convert` wrote beside it; make it again") from error
