"""From words on a command line to what they mean: a device, a model, its tokenizer, a finished run,
and the side doors that make things faster: attention, weights, a step of decoding or of training.

train.py and sample.py call it; nothing here is about prefix-tuning. Models lie in weights/NAME, or
anywhere; one that is known by name and not there yet is fetched by convert.py, a side door.
Not here: the formats of the files (model.py, prefix.py, data/tokenizer.py), the flags themselves.
"""
import difflib
import json
import sys
from pathlib import Path

import torch

from checkpoint import UNREADABLE, load
from data.tokenizer import OWN_FILES, BARTTokenizer, load_tokenizer
from model import attend
from prefix import load_prefix

WEIGHTS = Path(__file__).parent / "weights"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def decide_device(device, dtype):
    """(torch device, torch dtype) by --device and --dtype; says on stderr what they are and why."""
    cuda = torch.cuda.is_available()
    why = ("asked for" if device != "auto" else "there is one" if cuda else "no CUDA device here")
    name = ("cuda" if cuda else "cpu") if device == "auto" else device
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"got --device {name}, which PyTorch cannot use here (it sees "
                         f"{torch.cuda.device_count()} CUDA devices); use --device cpu") from error
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    because = "asked for" if dtype != "auto" else "fast here" if fast else "no fast bf16 known here"
    dtype = ("bf16" if fast else "fp32") if dtype == "auto" else dtype
    print(f"device {device} ({why}), weights in {dtype} ({because})", file=sys.stderr)
    return device, DTYPES[dtype]


def name_of_dtype(dtype):
    """The word of --dtype for a torch dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def find_model(name):
    """The directory of the model `name`: a path, or weights/NAME, downloaded where it can be."""
    if Path(name).is_dir():
        if not (Path(name) / "model.pt").exists() and (Path(name) / "config.json").exists():
            raise ValueError(f"got {name}, which has no model.pt; expected a converted directory; "
                             f"run `python convert.py {name} --out weights/NAME` first")
        return Path(name)
    if (WEIGHTS / name / "config.json").exists():
        return WEIGHTS / name
    try:
        from convert import NAMES, fetch        # a side door, for names that are not here yet
    except ImportError:
        NAMES = {}
    if name in NAMES:
        fetch(name, WEIGHTS / name)
        return WEIGHTS / name
    known = sorted({*NAMES, *(p.parent.name for p in WEIGHTS.glob("*/config.json"))})
    near = difflib.get_close_matches(name, known, 1)
    raise ValueError(f"got the model {name!r}; expected a directory or one of {', '.join(known)}"
                     + (f"; did you mean {near[0]}?" if near else "; convert.py makes new ones"))


def open_model(name, device, dtype, weights=None):
    """The frozen model called `name` and its tokenizer, on the device asked for.

    weights: another directory for the numbers, of a fine-tuned model; the tokenizer stays.
    """
    directory = find_model(name)
    model = load(weights or directory, *decide_device(device, dtype))
    tokenizer = load_tokenizer(directory)
    numbered = isinstance(tokenizer, BARTTokenizer)
    # A BART may have no row for <mask>, the last number, which no text has.
    most = max(tokenizer.ours.values()) if numbered else tokenizer.n_vocab - 1
    if most >= model.config.vocab_size or numbered != (model.architecture == "bart"):
        raise ValueError(f"got {directory}, whose vocabulary is not that of its model, of "
                         f"{model.config.vocab_size} tokens; expected {', '.join(OWN_FILES)} as "
                         "they stood beside the model that it was made of; copy what was there, "
                         "delete what was not")
    return model, tokenizer


def find_attention(name, model):
    """The function for the word of --attention. Raises ValueError where fused cannot run, with the
    reason: it is never replaced by the explicit form unasked.
    """
    if name == "explicit":
        return attend
    try:
        import fused                            # a side door, and triton behind it
    except ImportError as error:
        raise ValueError(f"got --attention fused, but there is no fused.py here ({error}); use "
                         "--attention explicit") from error
    fused.check(model.wte.weight.device, model.wte.weight.dtype)
    return fused.attend


def pack_weights(word, model, learning=False):
    """Do what --pack says: rearrange the weights of `model`, in place, for this CPU.

    learning: for a prefix that learns in front of them; else for decoding.
    """
    try:
        import packed                           # a side door
        reason = packed.possible(model)
    except ImportError as error:
        reason = f"there is no packed.py here ({error})"
    if word == "yes" and reason:
        raise ValueError(f"got --pack yes, but {reason}; expected fp32 or bf16 on a CPU; leave it "
                         "out")
    if not reason and (word == "yes" or word == "auto" and packed.worthwhile(model)):
        packed.pack(model, learning)


def recorded(model, rules, attend, beam, generator):
    """sample.generate in the form that --graph asks for, with recorded steps. Raises ValueError
    where nothing can be recorded, with the reason.
    """
    try:
        import graphs                           # a side door
        reason = graphs.impossible(model, rules, attend, beam)
    except ImportError as error:
        reason = f"there is no graphs.py here ({error})"
    if reason:
        raise ValueError(f"got --graph, but {reason}; expected a CUDA GPU, --beam 1 and nothing "
                         "that only Python can decide; leave it out")
    return graphs.Generate(generator)


def find_step(settings, model, plain):
    """The function for --compile, --gradient-checkpointing and --share-source: `plain`, which is
    loss.target_nats, or another form of it. `model` is changed in place, for --pack too.
    """
    if settings.method == "prefix" and not settings.compile:
        pack_weights(settings.pack, model, learning=True)
    if settings.compile or settings.gradient_checkpointing or settings.share_source:
        try:
            import step                         # a side door
        except ImportError as error:
            raise ValueError("got --compile, --gradient-checkpointing or --share-source, but there "
                             f"is no step.py here ({error}); leave it out") from error
        return step.prepared(settings, model)
    return plain


def run_settings(directory):
    """The settings that a run was trained with, from its config.json."""
    path = Path(directory) / "config.json"
    try:
        settings = json.loads(path.read_text("utf-8"))["settings"]
        if not isinstance(settings["model"], str):
            raise TypeError("its model is no text")
        return settings
    except UNREADABLE as error:
        raise ValueError(f"got {directory}, which is no run ({type(error).__name__}); expected the "
                         "config.json that train.py writes in it; look into out/") from error


def open_run(directory, device, dtype):
    """(model, tokenizer, prefix) of a run of train.py, as it decodes: the model with its prefix, or
    the fine-tuned model with none.
    """
    name, own = run_settings(directory)["model"], Path(directory) / "model"
    model, tokenizer = open_model(name, device, dtype, weights=own if own.exists() else None)
    if own.exists():
        return model, tokenizer, model.no_prefix()
    return model, tokenizer, load_prefix(Path(directory) / "prefix.pt", model)
