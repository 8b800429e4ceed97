"""From words on a command line to what they mean: a device, a dtype, a model and its tokenizer.

Models lie in weights/NAME, or anywhere; one that is known by name and not there yet is downloaded.
Not here: the formats of the files (checkpoint.py, data/tokenizer.py), runs (run_directory.py).
"""
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import torch

from data.tokenizer import OWN_FILES, load_tokenizer
from pretrained.checkpoint import check_vocabulary, load
from pretrained.hub import NAMES, PACKAGES, fetch
from utils.cli import nearest

WEIGHTS = Path(__file__).parent.parent / "weights"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "fp64": torch.float64}


def decide_device(device, dtype):
    """(torch device, torch dtype) by --device and --dtype; prints both on stderr, and why it
    chose one.

    Raises ValueError for a device that PyTorch cannot use here.
    """
    cuda = torch.cuda.is_available()
    why = ("" if device != "auto" else " (there is one)" if cuda else " (no CUDA device here)")
    name = ("cuda" if cuda else "cpu") if device == "auto" else device
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:     # the second: PyTorch built without CUDA
        raise ValueError(f"got --device {name}, which PyTorch cannot use here (it sees "
                         f"{torch.cuda.device_count()} CUDA devices); use --device cpu") from error
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    because = ("" if dtype != "auto" else " (fast here)" if fast else
               " (no fast bf16 on this GPU; --dtype fp16 may be faster)" if device.type == "cuda"
               else " (no fast bf16 known here)")
    dtype = ("bf16" if fast else "fp32") if dtype == "auto" else dtype
    print(f"device {device}{why}, weights in {dtype}{because}", file=sys.stderr)
    return device, DTYPES[dtype]


def name_of_dtype(dtype):
    """The word of --dtype for a torch dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def find_model(name):
    """The directory of the model `name`: a path, or weights/NAME, downloaded if it can be.

    Raises ValueError for a name that is not known.
    """
    if not name:                # "" would be the directory that one stands in
        raise ValueError("got the model ''; expected a name or a directory; name it with --model")
    here, ours = Path(name), WEIGHTS / name
    if (here / "model.pt").exists():
        return here
    if (ours / "config.json").exists():
        return ours
    if (here / "config.json").exists():
        raise ValueError(f"got {name}, which has no model.pt; expected a converted directory; "
                         f"run `python -m pretrained.convert {name} --out weights/NAME` first")
    if name in NAMES or name in PACKAGES:
        fetch(name, ours)
        return ours
    if here.is_dir():           # so late: a folder that has a model's name only is not in its way
        return here
    known = sorted({*NAMES, *PACKAGES, *(p.parent.name for p in WEIGHTS.glob("*/config.json"))})
    raise ValueError(f"got the model {name!r}; expected a directory or one of {', '.join(known)}; "
                     + nearest(name, known, "`python -m pretrained.convert` makes new ones"))


def fingerprint_of(model, tokenizer):
    """A name for a model with its tokens, 16 digits of SHA-256.

    It covers the weights' own fingerprint, the config (with another number of heads the weights
    compute something else), the end token and the text of every token.
    """
    # Only what is not the default, so that a new field of the config changes no old fingerprint.
    config = {field.name: getattr(model.config, field.name)
              for field in dataclasses.fields(model.config)
              if getattr(model.config, field.name) != field.default}
    about = [model.fingerprint, model.architecture, config, tokenizer.eos_token_id]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for number in range(tokenizer.max_id + 1):
        digest.update(tokenizer.decode([number]).encode() + b"\0")
    return digest.hexdigest()[:16]


def load_model(name, device, dtype, weights=None, base=None):
    """The frozen model called `name` and its tokenizer, on the device asked for.

    weights: another directory for the numbers, of a fine-tuned model; the tokenizer stays. base:
    then the fingerprint of the model that was tuned, None where it is not known. Raises ValueError
    where these do not fit each other.
    """
    directory = find_model(name)
    model = load(weights or directory, *decide_device(device, dtype))
    check_vocabulary(directory)
    tokenizer = load_tokenizer(directory)
    if (tokenizer.max_id >= model.config.vocab_size
            or tokenizer.is_encoder_decoder != model.is_encoder_decoder):
        raise ValueError(f"got {directory}, whose vocabulary is not that of its model, of "
                         f"{model.config.vocab_size} tokens; expected {', '.join(OWN_FILES)} as "
                         "they stood beside the model that it was made of; copy what was there, "
                         "delete what was not")
    if weights and base:
        now = fingerprint_of(load(directory, named=True), tokenizer)
        if now != base:
            raise ValueError(f"got {weights}, tuned from the model {base!r}; expected {directory} "
                             f"to be that one, not {now!r}; put back the one it was tuned from")
    model.fingerprint = fingerprint_of(model, tokenizer)
    return model, tokenizer
