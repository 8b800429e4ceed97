"""A prefix as the package peft stores it: a directory with adapter_config.json and its weights.

For GPT-2 and a Llama it is the very same numbers: one tensor `prompt_embeddings` (P, 2LHD), whose
column is ((2 * layer + {K: 0, V: 1}) * H + head) * D + i; of a Llama H are the key-value heads, in
peft's `token_dim` and `num_attention_heads` too. peft stores it folded, with projection (its word
for the MLP) or without. A BART's prefixes have no such form: peft has none for the encoder and for
the cross attention, and lets layers of the decoder share their keys and values.
Not here: peft itself, which is not needed. Letters as in model.py.
"""
import hashlib
import json
from pathlib import Path

import torch

from prefix import flatten, unflatten
from pretrained.checkpoint import UNREADABLE, check_finite, describe
from pretrained.hub import NAMES
from pretrained.hugging_face import read_file
from pretrained.load import load_model
from pretrained.run_directory import load_run, run_settings, save_prefix
from utils.files import atomic_write, read_json_object, write_json

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def check_one_prefix(model, name):
    """Raise ValueError for a model whose prefixes peft's format cannot hold."""
    if model.is_encoder_decoder:
        raise ValueError(f"got {name}, a {model.architecture}; expected a GPT-2 or a Llama: peft's "
                         "format has no place for prefixes of the encoder and of the cross "
                         "attention, and its decoder layers share theirs; keep it as prefix.pt")


def safetensors():
    """The module that reads and writes peft's files; ValueError where it is not installed."""
    try:
        import safetensors.torch
        return safetensors.torch
    except ImportError as error:
        raise ValueError("got no package safetensors, which peft's files are written with; `pip "
                         "install safetensors`") from error


def sum_of(tensor):
    """SHA-256 of a tensor's numbers; safetensors, the format, has no checksum."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def write_peft(run, out):
    """Write the prefix of the run in directory `run` to the directory `out`, for peft to read."""
    if not (Path(run) / "prefix.pt").exists():
        raise ValueError(f"got {run}, which has no prefix.pt; expected a run of train.py that "
                         "learned a prefix; choose another")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ValueError(f"got --to-peft {out}, which is not empty, or a file; expected a new "
                         "directory; choose another")
    model, _, prefix = load_run(run, "cpu", "fp32")
    check_one_prefix(model, run)
    L, _, _, H, P, D = prefix.shape
    if L < len(model.empty_prefix()):
        raise ValueError(f"got {run}, a prefix of the upper {L} of {len(model.empty_prefix())} "
                         "layers; expected one of all: peft's format has no other; train it "
                         "without --prefix-layers")
    flat = flatten(prefix).contiguous()                                         # (P, 2LHD)
    name = run_settings(run)["model"]
    about = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": P,
             "token_dim": H * D, "num_layers": L, "num_attention_heads": H,
             "num_transformer_submodules": 1, "prefix_projection": False,
             "encoder_hidden_size": H * D, "inference_mode": True,
             "base_model_name_or_path": NAMES[name][0] if name in NAMES else name}
    with atomic_write(Path(out) / WEIGHTS[0]) as file:
        file.write(safetensors().save({"prompt_embeddings": flat},
                                      metadata={"format": "pt", "sha256": sum_of(flat)}))
    with atomic_write(Path(out) / "adapter_config.json", "w") as file:
        json.dump(about, file, indent=1)


def read_config(directory):
    """peft's adapter_config.json. Raises ValueError unless it is of a prefix that fits here."""
    path = Path(directory) / "adapter_config.json"
    try:
        about = read_json_object(path)
        kind, task = about["peft_type"], about["task_type"]
        if not isinstance(about.get("base_model_name_or_path"), (str, type(None))):
            raise TypeError("its base_model_name_or_path is no text")
    except UNREADABLE as error:
        raise ValueError(f"got {directory}, which is no adapter of peft ({describe(error)}); "
                         "expected adapter_config.json and adapter_model.safetensors; give the "
                         "directory that save_pretrained wrote") from error
    if kind != "PREFIX_TUNING":
        raise ValueError(f"got {directory}, an adapter of the kind {kind}; expected PREFIX_TUNING, "
                         "the only kind that is read here; choose another adapter")
    parts = about.get("num_transformer_submodules") or 1
    if task != "CAUSAL_LM" or parts != 1:
        raise ValueError(f"got {directory}, a prefix for the task {task} and {parts} submodules; "
                         "expected CAUSAL_LM and 1: peft's prefix of an encoder-decoder is another "
                         "method (no prefix of the encoder and of the cross attention, layers that "
                         "share theirs); train one here")
    return about


def read_weights(directory):
    """The tensor `prompt_embeddings` (P, 2LHD) of peft's directory; ValueError if it has none."""
    path = next((p for p in map(Path(directory).joinpath, WEIGHTS) if p.exists()), None)
    if path is None:
        raise ValueError(f"got {directory} without {' or '.join(WEIGHTS)}; expected one of them; "
                         "give the directory that save_pretrained wrote")
    if path.suffix == ".safetensors":
        safetensors()                           # or the message that it is missing
    state = read_file(path)
    flat = state.get("prompt_embeddings", torch.empty(0))
    if flat.dim() != 2 or not flat.is_floating_point():
        raise ValueError(f"got {path} with {', '.join(list(state)[:3]) or 'nothing'}, its "
                         f"prompt_embeddings {flat.dtype} of shape {tuple(flat.shape)}; expected "
                         "one tensor prompt_embeddings (P, 2LHD) of floating point; save it again "
                         "with peft")
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        with safe_open(path, "pt") as file:
            ours = (file.metadata() or {}).get("sha256")        # where it was written here
        if ours not in (None, sum_of(flat)):
            raise ValueError(f"got {path}, which is damaged: its numbers have another SHA-256 than "
                             "when they were written; expected the file as it was; write it again")
    check_finite(state, path)
    return flat


def read_peft(directory, out, model_name=""):
    """Make a run in the directory `out` of peft's `directory`, for the frozen model `model_name`;
    empty: the one that peft's file names.

    sample.py decodes with the run, and `train.py --start-from` goes on from it.
    """
    if Path(out).exists():
        raise ValueError(f"got --out {out}, which exists; expected a new directory; choose another")
    about, flat = read_config(directory), read_weights(directory)
    theirs = about.get("base_model_name_or_path") or ""
    ours = {repository: name for name, (repository, _) in NAMES.items()}
    name = model_name or ours.get(theirs, theirs)
    if not name:
        raise ValueError(f"got {directory}, which names no base model; expected the one that the "
                         "prefix was trained with; name it with --model")
    model, _ = load_model(name, "cpu", "fp32")
    check_one_prefix(model, name)
    empty = model.empty_prefix()                                            # (L, 2, 1, H, 0, D)
    L, _, _, H, _, D = empty.shape
    expected = {"num_layers": L, "token_dim": H * D, "num_attention_heads": H,
                "num_virtual_tokens": len(flat), "columns": 2 * L * H * D}
    got = {key: value if about.get(key) is None else about[key] for key, value in expected.items()}
    got["columns"] = flat.size(1)
    if got != expected:
        raise ValueError(f"got {directory} with {got}; expected {expected}, as {name} and the "
                         "tensor have; choose its model with --model")
    save_prefix(Path(out) / "prefix.pt", unflatten(flat, empty.shape).contiguous(), model)
    settings = {"model": str(name), "data": "", "data_dir": "", "method": "prefix",
                "prefix_len": len(flat), "from_peft": str(directory)}
    write_json(Path(out) / "config.json", {"settings": settings, "fingerprint": model.fingerprint})
