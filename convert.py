"""Hugging Face checkpoints, by name or from files on disk -> weights/NAME, as our programs read it.

    python convert.py gpt2-medium                       downloads, checks, converts
    python convert.py DIRECTORY --out weights/NAME      from config.json and its weights on disk
    python convert.py --run out/NAME --to-peft DIR      a prefix, for the package peft to read
    python convert.py --from-peft DIR --model gpt2 --out out/NAME           and one of peft's

The prefix belongs to one frozen language model (Li & Liang 2021, section 4.2); this brings that
model in. sample.py and train.py call `fetch` for a name that weights/ does not have yet. A file
from elsewhere is not trusted: tensors are read and code is refused, and every name and every shape
must be what model.py expects, for a checkpoint that nearly fits would talk nonsense without an
error. Not here: the tables of the names (model.py, beside the layers), peft's format
(peft_format.py), and the tokenizer, but for the file that numbers BART's tokens, which is kept.
"""
import dataclasses
import importlib.util
import json
import pickle
import re
import shutil
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import torch

from checkpoint import save
from model import ARCHITECTURES
from plumbing import download, flag, parse, run, whole_file

WEIGHTS = Path(__file__).parent / "weights"
HUB = "https://huggingface.co"
# Where each name lives: repository and commit. A commit, not "main", so that everybody gets the
# same numbers for ever.
NAMES = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "distilgpt2": ("distilbert/distilgpt2", "2290a62682d06624634c1f46a6ad5be0f47f38aa"),
    "bart-base": ("facebook/bart-base", "aadd2ab0ae0c8268c7c9693540e9904811f36177"),
    "bart-large": ("facebook/bart-large", "cb48c1365bd826bd521f650dc2e0940aee54720c"),
}
# SHA-256 sums that several publications agree on. For the other files the hub's own is asked for.
SHA256 = {
    ("gpt2", "model.safetensors"):
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ("gpt2", "pytorch_model.bin"):
        "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421",
    ("gpt2-xl", "model.safetensors"):
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ("distilgpt2", "model.safetensors"):
        "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
}
# Options of config.json that change the function and that model.py does not have: anything else
# than this is refused. A missing one has this value. (n_inner is not here: the shapes tell.)
FIXED_OPTIONS = {
    "gpt2": {"activation_function": "gelu_new", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "bart": {"activation_function": "gelu", "scale_embedding": False, "normalize_before": False,
             "add_final_layer_norm": False, "normalize_embedding": True, "add_bias_logits": False,
             "static_position_embeddings": False, "extra_pos_embeddings": 2,
             "is_encoder_decoder": True, "tie_word_embeddings": True},
}
# What config.json or the newer generation_config.json says of decoding: kept, to decode alike.
DECODING = ("forced_bos_token_id", "forced_eos_token_id", "num_beams", "length_penalty",
            "min_length", "max_length", "no_repeat_ngram_size", "early_stopping", "bos_token_id",
            "eos_token_id", "pad_token_id", "decoder_start_token_id")
# The file that numbers BART's tokens: of Hugging Face's upload, or of fairseq's.
VOCABULARIES = ("vocab.json", "dict.txt")
# What git leaves in the place of a large file where git-lfs is not installed.
LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass
class Settings:
    source: str = flag("", f"one of {', '.join(NAMES)}, or a directory with config.json and "
                           "model.safetensors or pytorch_model.bin")
    out: str = flag("", "the directory to write; empty: weights/ and the name of the source")
    run: str = flag("", "with --to-peft: the run of train.py whose prefix is wanted")
    to_peft: str = flag("", "write the prefix of --run to this directory, for the package peft")
    from_peft: str = flag("", "make a run, --out, of the prefix in this directory of peft's")
    model: str = flag("", "with --from-peft: its frozen model; left out: as peft's file names it")


def read_object(path):
    """The JSON object in a file."""
    try:
        return dict(json.loads(path.read_text("utf-8")).items())
    except (ValueError, AttributeError) as error:       # not JSON; JSON, but not an object
        raise ValueError(f"got {path}, which is damaged ({error}); expected a JSON object; delete "
                         "it and download it again") from error


def read_decoding(path, theirs):
    """How the makers decode, by config.json (`theirs`) or generation_config.json beside `path`."""
    newer = path.parent / "generation_config.json"
    both = theirs | (read_object(newer) if newer.exists() else {})
    return {name: both[name] for name in DECODING if both.get(name) is not None}


def read_config(path):
    """(our config, its model class) of a Hugging Face config.json."""
    if not path.exists():
        raise ValueError(f"got {path.parent}, which has no config.json; expected it beside the "
                         "weights; download it from the model's page")
    theirs = read_object(path)
    kind = theirs.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"got {path} of model_type {kind!r}; expected one of "
                         f"{', '.join(ARCHITECTURES)}; choose a checkpoint of these")
    for option, value in FIXED_OPTIONS[kind].items():
        if theirs.get(option, value) != value:
            raise ValueError(f"got {path} with {option} = {theirs[option]!r}; expected {value!r}, "
                             "model.py can do no other; choose another checkpoint")
    config_class, model_class = ARCHITECTURES[kind]
    ours = {}
    for field in dataclasses.fields(config_class):
        if field.name == "decoding":
            ours["decoding"] = read_decoding(path, theirs)
            continue
        ours[field.name] = theirs.get(field.name)
        if not isinstance(ours[field.name], field.type) or ours[field.name] <= 0:
            raise ValueError(f"got {path} with {field.name} = {ours[field.name]!r}; expected a "
                             f"positive {field.type.__name__}; correct it or download it again")
    return config_class(**ours), model_class


def weight_files(directory):
    """The files that hold the weights: one, or the several of a checkpoint cut into shards."""
    names = ["model.safetensors", "pytorch_model.bin"]
    if importlib.util.find_spec("safetensors") is None:
        there = [*directory.glob("model.safetensors*")]
        names.remove("model.safetensors")
        if there and not [*directory.glob("pytorch_model.bin*")]:
            raise ValueError(f"got {there[0]}; expected the package safetensors, which reads it; "
                             "`pip install safetensors`, or put pytorch_model.bin there")
    for name in names:
        index = directory / f"{name}.index.json"
        if (directory / name).exists():
            return [directory / name]
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"got {index}, which is damaged ({error!r}); expected a "
                                 "weight_map; delete it and download it again") from error
            return [directory / shard for shard in shards]
    raise ValueError(f"got {directory}, which has no weights; expected model.safetensors or "
                     "pytorch_model.bin; download one of them from the model's page")


def read_file(path):
    """The tensors in one file, by their names. Whatever else a pickle holds is refused, not run."""
    if not path.exists():
        raise ValueError(f"got {path.parent} without {path.name}; expected every file that its "
                         "index.json names; download it too")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"got {path}, which only points to the weights; expected the weights "
                             "themselves; run `git lfs pull` there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of odd bytes; the error says what matters
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch's message: it recommends weights_only=False, which would run the code.
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"got {path}, which is no plain file of tensors ("
                         + (f"it calls {code[1]}, which was not run" if code else "unknown bytes")
                         + "); expected tensors only; delete it and take the model's "
                         "model.safetensors instead") from error
    except Exception as error:      # a damaged file can fail in any way, as an OSError too
        raise ValueError(f"got {path}, which is damaged or cut short ({type(error).__name__}: "
                         f"{str(error)[:80]}); expected a whole file; delete it and fetch it again"
                         ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"got {path}, which holds other things than tensors with names; expected "
                         "a state dict; save it with torch.save(model.state_dict(), ...)")
    return state


def ends_with(name, ends):
    """Whether `name` ends with one of `ends`, whole words only: "attn.bias" is the end of
    "h.0.attn.bias", but not of "h.0.c_attn.bias".
    """
    return any(f".{name}".endswith(f".{end}") for end in ends)


def our_names(theirs, model, source):
    """The state dict of `model` made of a Hugging Face one, which is emptied on the way: otherwise
    a large model would be in memory twice.
    """
    ours = {}
    for name in list(theirs):
        tensor, short = theirs.pop(name), name.removeprefix(model.checkpoint_root)
        if ends_with(short, model.checkpoint_ignored):
            continue
        if short in ours:
            raise ValueError(f"got {source} with {short} twice, once behind "
                             f"{model.checkpoint_root!r}; expected it once; save it again")
        if ends_with(short, model.checkpoint_transposed) and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        ours[short] = tensor
    for name, twin in model.checkpoint_tied.items():
        copy = ours.pop(name, None)
        if copy is None:
            continue
        ours.setdefault(twin, copy)             # a file may have the one tensor under any name
        if copy.dtype != ours[twin].dtype or not torch.equal(copy, ours[twin]):
            raise ValueError(f"got {source} where {name} differs from {twin}; expected one tensor "
                             "for both, as in the paper's models; choose another checkpoint")
    for name in model.checkpoint_zero:
        like = next((t for t in ours.values() if t.is_floating_point()), torch.zeros(()))
        ours.setdefault(name, like.new_zeros(model.state_dict()[name].shape))
    return ours


def check_names(ours, model, source):
    """Raise ValueError unless names, shapes and kinds of numbers are exactly those of `model`."""
    wanted = model.state_dict()
    for what, names in (("without", wanted.keys() - ours.keys()),
                        ("with the unknown", ours.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"got {source} {what} {', '.join(sorted(names)[:3])}{more}; expected "
                             f"the names of {type(model).__name__} with its config.json; choose a "
                             "plain language model, or download both files again")
    for name, tensor in ours.items():
        if tensor.shape != wanted[name].shape or not tensor.is_floating_point():
            raise ValueError(f"got {source} with {name} of shape {tuple(tensor.shape)}, "
                             f"{tensor.dtype}; expected {tuple(wanted[name].shape)} (Conv1D "
                             "weights transposed), floating point; download config.json and "
                             "weights of one and the same model")


def empty_model(config, model_class):
    """A model without numbers, that takes no memory: the shapes, and a frame for a state dict."""
    with torch.device("meta"):
        return model_class(config)


def read_checkpoint(directory):
    """(config, state dict in our names) of the Hugging Face checkpoint in `directory`.

    The numbers keep their dtype. Raises ValueError for anything that is not exactly a model that
    model.py can compute.
    """
    directory, theirs = Path(directory), {}
    config, model_class = read_config(directory / "config.json")
    model = empty_model(config, model_class)
    for path in weight_files(directory):
        theirs |= read_file(path)
    ours = our_names(theirs, model, directory)
    check_names(ours, model, directory)
    return config, ours


def convert(source_directory, out_directory):
    """Read the Hugging Face checkpoint in one directory, write what `load` reads to another."""
    if Path(source_directory).resolve() == Path(out_directory).resolve():
        raise ValueError(f"got {out_directory} to read and to write; expected two directories, for "
                         "both have a config.json; choose another one with --out")
    config, state = read_checkpoint(source_directory)
    model = empty_model(config, dict(ARCHITECTURES.values())[type(config)])
    vocabularies = [path for path in map(Path(source_directory).joinpath, VOCABULARIES)
                    if path.exists()]
    if model.architecture == "bart" and not vocabularies:
        raise ValueError(f"got {source_directory}, a BART without its vocabulary; expected "
                         f"{' or '.join(VOCABULARIES)}, for its tokens have other numbers than "
                         "GPT-2's; download one from the model's page")
    if model.architecture == "gpt2" and (Path(source_directory) / "vocab.json").exists():
        tokens = read_object(Path(source_directory) / "vocab.json")
        if (tokens.get("\u0120the"), tokens.get("<|endoftext|>")) != (262, 50256):
            raise ValueError(f"got {source_directory}, a GPT-2 with a vocabulary of its own; "
                             "expected GPT-2's, the only one that it would be read with; choose "
                             "another model")
    model.load_state_dict(state, assign=True)
    if model.architecture == "bart":
        with whole_file(Path(out_directory) / vocabularies[0].name) as file:
            file.write(vocabularies[0].read_bytes())
    save(model, out_directory)


def _declared(headers):
    """The SHA-256 in the headers of a reply, or None; a shorter tag is not one."""
    tag = (headers.get("X-Linked-ETag") or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


class _StopAtSum(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, reply, code, message, headers, url):
        # None: do not follow. urllib then raises this very reply as an HTTPError.
        return (None if _declared(headers) else
                super().redirect_request(request, reply, code, message, headers, url))


def declared_sha256(url):
    """The SHA-256 that the server states for the file at `url`, or None where it states none.

    Hugging Face states it in its own first reply, which sends us on to a storage host. That host
    does not repeat it, so following the redirection, as urllib does by itself, would lose it.
    """
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.build_opener(_StopAtSum).open(request, timeout=60) as reply:
            return _declared(reply.headers)
    except urllib.error.HTTPError as reply:
        if reply.code < 400:
            return _declared(reply.headers)
        raise OSError(f"could not ask {url} for its checksum: {reply}; try again later") from reply
    except urllib.error.URLError as error:
        raise OSError(f"could not reach {url}: {error.reason}; check the connection, or download "
                      "the files elsewhere and convert their directory") from error


def fetch(name, out_directory, hub=HUB):
    """Download the model `name`, check it, convert it into `out_directory`.

    The downloads lie in OUT/hf until the conversion is done, so that what is whole need not be
    fetched again, and are then removed: they are as large as the result.
    """
    if name not in NAMES:
        raise ValueError(f"got the name {name!r}; expected one of {', '.join(NAMES)}; download "
                         "another one yourself and convert its directory")
    (repository, commit), source = NAMES[name], Path(out_directory) / "hf"
    has_safetensors = importlib.util.find_spec("safetensors") is not None
    weights = "model.safetensors" if has_safetensors else "pytorch_model.bin"
    vocabulary = ("vocab.json",) if name.startswith("bart") else ()
    for file in ("config.json", *vocabulary, weights):
        if (source / file).exists():
            print(f"{source / file} is there already", file=sys.stderr)
            continue
        url = f"{hub}/{repository}/resolve/{commit}/{file}"
        sha256 = SHA256.get((name, file)) or declared_sha256(url)
        if sha256 is None and file == weights:
            raise ValueError(f"got no SHA-256 for {url}; expected the server to state one; "
                             f"download it by other means and put it at {source / file}")
        download(url, source / file, sha256)
    convert(source, out_directory)
    shutil.rmtree(source)


def convert_prefix(settings):
    """A prefix to peft's format, or from it."""
    from peft_format import read_peft, write_peft
    if settings.to_peft:
        if not settings.run or settings.from_peft or settings.source:
            raise ValueError("got --to-peft; expected --run out/NAME beside it, and nothing else; "
                             "`python convert.py --run out/NAME --to-peft DIR`")
        write_peft(settings.run, settings.to_peft, {n: where for n, (where, _) in NAMES.items()})
        print(f"wrote {settings.to_peft}/adapter_config.json and adapter_model.safetensors; read "
              f"them with PeftModel.from_pretrained(model, {settings.to_peft!r})")
        return
    if not settings.out or settings.run or settings.source:
        raise ValueError("got --from-peft; expected --out out/NAME beside it, and --model; `python "
                         "convert.py --from-peft DIR --model gpt2 --out out/NAME`")
    read_peft(settings.from_peft, settings.out, settings.model,
              {where: name for name, (where, _) in NAMES.items()})
    print(f"wrote {settings.out}; decode with: python sample.py --run {settings.out}\n"
          f"train on with: python train.py --start-from {settings.out} --data ...")


def main(argv=None):
    settings = parse(Settings, argv, "Hugging Face files -> weights/NAME",
                     positional="source")
    if settings.to_peft or settings.from_peft:
        convert_prefix(settings)
        return
    out = Path(settings.out or WEIGHTS / Path(settings.source).resolve().name)
    if settings.source and Path(settings.source).is_dir():
        convert(settings.source, out)
    elif settings.source in NAMES:
        fetch(settings.source, out)
    else:
        raise ValueError(f"got {settings.source!r}; expected a directory or one of "
                         f"{', '.join(NAMES)}; `python convert.py --help` tells more")
    print(f"wrote {out}/config.json and {out}/model.pt")


if __name__ == "__main__":
    run(main)
