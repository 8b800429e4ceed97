"""Hugging Face checkpoints on disk -> our models, in weights/NAME.

A file from elsewhere is not trusted: tensors are read and code is refused, and every name and every
shape must be what the model here expects, for a checkpoint that nearly fits would generate nonsense
without an error. Not here: the tables of the names (architectures.py), downloads (hub.py), the
tokenizer: its file is copied as it is, unless the vocabulary is GPT-2's own.
"""
import dataclasses
import importlib.util
import pickle
import re
import sys
import warnings
from pathlib import Path

import torch

from data.tokenizer import read_vocab
from model import GPT2
from pretrained.architectures import architecture, check_config
from pretrained.checkpoint import check_finite, read_tensors, save
from utils.files import atomic_write, plain_file, read_json_object, read_whole

# What is kept of how the makers decode: tokens. Beams and lengths are chosen by the data set.
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
# Vocabularies that are not read: with GPT-2's tokens in their place the text would be nonsense.
OTHER_VOCABULARIES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt")
GENERATION = (*FORCED, "bos_token_id", "eos_token_id")
# What git leaves in the place of a large file where git-lfs is not installed.
LFS_POINTER = b"version https://git-lfs"


def read_object(path):
    """The JSON object in a file."""
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"got {path}, which is damaged ({error}); expected a JSON object; delete "
                         "it and download it again") from error


def read_configs(directory):
    """config.json, in which the newer generation_config.json, where there is one, has the last word
    on decoding: as in transformers, what it does not force is not forced.
    """
    path, newer = directory / "config.json", directory / "generation_config.json"
    if not path.exists():
        raise ValueError(f"got {directory}, which has no config.json; expected it beside the "
                         "weights; download it from the model's page")
    both = read_object(path)
    if both.get("force_bos_token_to_be_generated"):     # what it was called until 2021
        both["forced_bos_token_id"] = both.get("bos_token_id")
    return both | (dict.fromkeys(FORCED) | read_object(newer) if newer.exists() else {})


def generation_config(both, vocab_size, path):
    """What is kept of `read_configs`: {name: a token, or a list of the several that end a text}.

    An end or beginning without a row in the word embedding cannot be generated, and is left out.
    """
    kept = {}
    for name in GENERATION:
        value = both.get(name)
        listed = value if isinstance(value, list) and name == "eos_token_id" else [value]
        tokens = [token for token in listed if type(token) is int and 0 <= token < vocab_size]
        if value is not None and not (listed and all(type(token) is int for token in listed)):
            raise ValueError(f"got {path} with {name} = {value!r:.60}; expected a token below "
                             f"{vocab_size}; correct it there or in generation_config.json")
        if name in FORCED and value is not None and tokens != [value]:
            raise ValueError(f"got {path} with {name} = {value!r}; expected a token below "
                             f"{vocab_size}; correct it there or in generation_config.json")
        if tokens:
            kept[name] = tokens if len(tokens) > 1 else tokens[0]
    return kept


def our_config(theirs, path):
    """(our config, its `Architecture`) of what the config.json at `path` has."""
    try:
        classes = architecture(theirs.get("model_type"))
    except ValueError as error:
        what = str(error).removeprefix("got ")
        raise ValueError(f"got {path} with {what}") from error
    theirs = classes.fill_config(theirs)
    for option, value in classes.fixed_options.items():
        names = value if isinstance(value, tuple) else (value,)
        if theirs.get(option) not in (*names, None):
            raise ValueError(f"got {path} with {option} = {theirs[option]!r}; expected "
                             f"{names[0]!r}, the model here can do no other; choose another "
                             "checkpoint")
    ours = {}
    for field in dataclasses.fields(classes.config):
        value = theirs.get(field.name)
        ours[field.name] = float(value) if field.type is float and type(value) is int else value
    config = classes.config(**ours)
    check_config(config, path)
    return config, classes


def shards_of(index):
    """The names of the files that an index.json names: files beside it, nothing elsewhere."""
    try:
        names = sorted(set(read_json_object(index)["weight_map"].values()))
        if not names or not all(re.fullmatch(r"[\w-][\w.-]*", name) for name in names):
            raise ValueError(f"the files {names!r:.80}")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"got {index}, which is damaged ({error!r}); expected a weight_map of "
                         "names of files; delete it and download it again") from error


def check_total(index, state):
    """Say on stderr where the shards that were read are not as large as their index.json states.

    No error: many an upload has another dtype than when its index was written.
    """
    metadata = read_json_object(index).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    # Tied weights may stand there twice, and are counted once.
    found = {tensor.data_ptr(): tensor.nbytes for tensor in state.values()}
    if stated is not None and stated != sum(found.values()):
        print(f"{index} states {stated!r:.60} bytes of weights, its files have "
              f"{sum(found.values())}: they may be of different uploads", file=sys.stderr)


def weight_files(directory):
    """The files that hold the weights: one, or an index.json and the shards that it names."""
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
            return [index, *(directory / shard for shard in shards_of(index))]
    raise ValueError(f"got {directory}, which has no weights; expected model.safetensors or "
                     "pytorch_model.bin; download one of them from the model's page")


def read_file(path):
    """The tensors in one file, by their names. Whatever else a pickle holds is refused, not run."""
    if not path.exists():
        raise ValueError(f"got {path.parent} without {path.name}; expected every file that its "
                         "index.json names; download it too")
    with open(plain_file(path), "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"got {path}, which only points to the weights; expected the weights "
                             "themselves; run `git lfs pull` there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of odd bytes; the error has what matters
            state = read_tensors(path)
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


def same_numbers(a, b):
    """Whether two tensors are one, but for the rounding of one of them to a shorter dtype."""
    return torch.equal(a, b.to(a.dtype)) or torch.equal(a.to(b.dtype), b)


def rename(theirs, model, classes, source):
    """The state dict of `model` made of a Hugging Face one, which is emptied on the way: otherwise
    a large model would be in memory twice. classes: its `Architecture`.
    """
    ours = {}
    for name in list(theirs):
        tensor, short = theirs.pop(name), name.removeprefix(classes.root)
        if ends_with(short, classes.ignored):
            continue
        check_finite({name: tensor}, source)
        if short in ours:
            raise ValueError(f"got {source} with {short} twice, once behind {classes.root!r}; "
                             "expected it once; save it again")
        if ends_with(short, classes.transposed) and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        ours[short] = tensor
    for name, twin in classes.tied.items():
        # A model that has both has a head of its own, as some Llamas.
        copy = None if name in model.state_dict() else ours.pop(name, None)
        if copy is None:
            continue
        ours.setdefault(twin, copy)             # a file may have the one tensor under any name
        if not same_numbers(copy, ours[twin]):
            raise ValueError(f"got {source} where {name} differs from {twin}; expected one tensor "
                             "for both, as in the paper's models; choose another checkpoint")
    for name in classes.zero:
        like = next((t for t in ours.values() if t.is_floating_point()), torch.zeros(()))
        ours.setdefault(name, like.new_zeros(model.state_dict()[name].shape))
    return ours


def check_names(ours, model, source):
    """Raise ValueError unless names and shapes are those of `model`, in floating point."""
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


def read_checkpoint(directory):
    """(model without numbers, state dict in our names) of the Hugging Face files in `directory`.

    The model takes no memory: it has the shapes, and is a frame for the state dict, whose numbers
    stay in their dtype. Raises ValueError for anything that is not exactly a model that can be
    computed here.
    """
    directory, theirs = Path(directory), {}
    path, both = directory / "config.json", read_configs(directory)
    config, classes = our_config(both, path)
    with torch.device("meta"):
        model = classes.model(config)
    model.generation_config = generation_config(both, config.vocab_size, path)
    first, *shards = weight_files(directory)
    for file in shards or [first]:
        theirs |= read_file(file)
    if shards:
        check_total(first, theirs)
    ours = rename(theirs, model, classes, directory)
    check_names(ours, model, directory)
    return model, ours


def find_vocabulary(directory, classes):
    """The file that has the tokens of this architecture, or None where they are GPT-2's."""
    found = [path for path in map(directory.joinpath, classes.vocabularies) if path.exists()]
    if classes.model is not GPT2:
        if not found:
            raise ValueError(f"got {directory} without its vocabulary; expected "
                             f"{' or '.join(classes.vocabularies)}, for its tokens have other "
                             "numbers than GPT-2's; download one from the model's page, or save "
                             "it with transformers")
        return found[0]
    for path in found:
        try:
            tokens = read_vocab(path)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"got {path}, which is damaged ({error}); expected a JSON object with "
                             "the tokens; delete it and download it again") from error
        if (tokens.get("\u0120the"), tokens.get("<|endoftext|>")) == (262, 50256):
            return None
        if path.name == "tokenizer.json":
            return path
        raise ValueError(f"got {path}, of a GPT-2 with a vocabulary of its own; expected GPT-2's, "
                         "or tokenizer.json beside it, which has all of it; download that, or save "
                         "it with transformers")
    other = [name for name in OTHER_VOCABULARIES if (directory / name).exists()]
    if other:
        raise ValueError(f"got {directory} with {other[0]}, a vocabulary of another kind than "
                         "GPT-2's; expected tokenizer.json, which any has; save it with "
                         "transformers")
    return None


def convert(source_directory, out_directory):
    """Read the Hugging Face checkpoint in one directory, write what `load` reads to another.

    Raises ValueError, and writes nothing, where it is no model that can be computed here.
    """
    source, out = Path(source_directory), Path(out_directory)
    if source.resolve() == out.resolve():
        raise ValueError(f"got {out} to read and to write; expected two directories, for both have "
                         "a config.json; choose another one with --out")
    model, state = read_checkpoint(source)
    vocabulary = find_vocabulary(source, architecture(model.architecture))
    model.load_state_dict(state, assign=True)
    if vocabulary:
        with atomic_write(out / vocabulary.name) as file:
            file.write(read_whole(vocabulary))
    save(model, out)
