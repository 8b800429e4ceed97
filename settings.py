"""What a run of train.py is told: its flags, and the paper's settings where they are left out.

Table 6 of Li & Liang 2021 by data set and method; --help shows it, config.json of a run keeps what
was used. Called by train.py. Not here: what the settings do (train.py).
"""
import dataclasses
import itertools
from math import inf
from pathlib import Path

from data.tasks import NAMES
from opening import run_settings
from plumbing import flag

OWN = "all others, your own .jsonl too"
# What a flag left out means, by method and data set: the paper's table 6, for GPT-2, of XSum for
# BART. For the bundled world: found on its own held-out kinds (but for finetune-top2, untried).
# DialogSum and SciTLDR, which the paper has not: XSum's. Other files: E2E's, with the paper's
# low-data rate.
XSUM = dict(lr=5e-5, epochs=30, batch_size=14, prefix_len=100, mid_dim=800)
DEFAULTS = {
    "prefix": {
        "e2e": dict(lr=8e-5, epochs=5, batch_size=10, prefix_len=5),
        "webnlg": dict(lr=5e-5, epochs=5, batch_size=5, prefix_len=5),
        "dart": dict(lr=5e-5, epochs=10, batch_size=5, prefix_len=10),
        "world": dict(lr=3e-3, steps=200, batch_size=10, prefix_len=9),
        "world-hard": dict(lr=3e-3, steps=1500, batch_size=10, prefix_len=9),
        "world-headlines": dict(lr=3e-3, steps=600, batch_size=10, prefix_len=9),
        "xsum": XSUM,
        "dialogsum": XSUM,
        "scitldr": XSUM,
        "xsum-news-to-sports": dict(lr=5e-5, epochs=15, batch_size=36, prefix_len=40, mid_dim=800),
        "xsum-within-news": dict(lr=5e-5, epochs=30, batch_size=36, prefix_len=80, mid_dim=800),
        OWN: dict(lr=5e-5, epochs=5, batch_size=10, prefix_len=5),
    },
    "finetune": {
        "e2e": dict(lr=5e-5, epochs=5, batch_size=10),
        "webnlg": dict(lr=1e-5, epochs=10, batch_size=6),
        "dart": dict(lr=1e-5, epochs=10, batch_size=6),
        "world": dict(lr=1e-4, steps=200, batch_size=10),
        "world-hard": dict(lr=1e-4, steps=1500, batch_size=10),
        OWN: dict(lr=5e-5, epochs=5, batch_size=10),
    },
    "finetune-top2": {
        "e2e": dict(lr=5e-5, epochs=5, batch_size=10),
        "webnlg": dict(lr=5e-5, epochs=10, batch_size=9),
        "dart": dict(lr=5e-5, epochs=5, batch_size=5),
        "world": dict(lr=1e-4, steps=200, batch_size=10),
        "world-hard": dict(lr=1e-4, steps=1500, batch_size=10),
        OWN: dict(lr=5e-5, epochs=5, batch_size=10),
    },
}
NOTES = "\n".join(["defaults by method and data set:"] + [          # for --help
    f"  {method}, {data}: {values}" for method, by_data in DEFAULTS.items()
    for data, values in by_data.items()])
# Flags that only a prefix has; the values they are left at say that they were not given.
PREFIX_ONLY = ("prefix_len", "prefixes", "mid_dim", "init", "init_text", "start_from")


@dataclasses.dataclass
class Settings:
    model: str = flag("tiny-gpt2", "the frozen model: gpt2, gpt2-medium, ..., another name in "
                                   "weights/, or a directory; with --start-from that run's")
    data: str = flag("", f"{', '.join(NAMES)}, or a .jsonl file of your own; left out: world, for "
                         "tiny-bart world-headlines")
    data_dir: str = flag("", "read the data set from here; left out: it is downloaded, but for "
                             "summarising, whose files you have to fetch")
    method: str = flag("prefix", "what learns", choices=list(DEFAULTS))
    prefix_len: int = flag(None, "P, keys and values in front of every layer", kind=int,
                           within=(1, inf))
    prefixes: str = flag("", "BART's places and, after =, their lengths where it is not "
                             "--prefix-len: encoder,decoder,cross=20; left out: all three")
    mid_dim: int = flag(None, "hidden width of the MLP in front of the prefix; 0: no MLP; left "
                              "out: 512, for summarising 800", kind=int, within=(0, inf))
    init: str = flag("random", "start from N(0, 1), from U(0, 1), or from what the model makes of "
                               "real words", choices=["random", "uniform", "words"])
    start_from: str = flag("", "start from the prefix of this run, of train.py or of convert.py "
                               "--from-peft: exactly with --mid-dim 0, else an MLP is fitted to it")
    init_text: str = flag("table-to-text:", "the words of --init words; P is their length")
    examples: int = flag(0, "learn from this many sources, drawn by the seed; 0: from all",
                         within=(0, inf))
    max_source: int = flag(512, "BART's sources are cut to this many tokens", within=(3, inf))
    max_target: int = flag(60, "BART's targets are cut to this many tokens", within=(3, inf))
    lr: float = flag(None, "highest learning rate", kind=float, within=(1e-12, 1e30))
    epochs: int = flag(None, "times that every pair is seen", kind=int, within=(1, inf))
    steps: int = flag(None, "steps of the optimiser, in place of epochs", kind=int,
                      within=(1, inf))
    warmup: int = flag(0, "steps in which the learning rate rises; then it falls to 0 in a line",
                       within=(0, inf))
    batch_size: int = flag(None, "pairs in a step", kind=int, within=(1, inf))
    clip: float = flag(1.0, "longest gradient; longer ones are scaled down", within=(1e-12, 1e30))
    weight_decay: float = flag(0.0, "AdamW's, on the prefix", within=(0, 100))
    dev_every: int = flag(0, "steps between two looks at the dev loss; 0: a tenth of the run",
                          within=(0, inf))
    dev_pairs: int = flag(500, "pairs of the dev set that are scored then, a fixed sample; 0: all",
                          within=(0, inf))
    seed: int = flag(101, "of the prefix, the order of the data and the choice of examples",
                     within=(0, 10 ** 12))
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = flag("auto", "of the frozen weights, the prefix is fp32; auto: bf16 on a GPU that "
                              "has it, else fp32", choices=["auto", "fp32", "bf16", "fp64"])
    attention: str = flag("explicit", "fused: one kernel that reads the prefix without copying it; "
                                      "needs a CUDA GPU and triton", choices=["explicit", "fused"])
    compile: bool = flag(False, "compile the step, once for each of a few shapes; needs a C++ "
                                "compiler, on a GPU triton too, and minutes at the start")
    gradient_checkpointing: bool = flag(False, "less memory for more work: compute each block "
                                               "again on the way back")
    share_source: bool = flag(False, "a batch holds the targets of few sources, and what several "
                                     "texts begin with is computed once; so other pairs meet")
    pack: str = flag("auto", "lay out the frozen weights for this CPU's kernels, which then take "
                             "over twice the memory; auto: where it can and the model is large",
                     choices=["auto", "yes", "no"])
    out: str = flag("", "directory of the run; left out: out/MODEL-DATA")
    resume: str = flag("", "directory of a run to go on with; its own settings are used")
    stop_at: int = flag(0, "stop after this step as Ctrl-C would, to be resumed; 0: at the end",
                        within=(0, inf))

    given = frozenset()         # no flag: which of them the command line has, where there is one


def resolve(settings):
    """Fill in what was left out with the data set's defaults: config.json says everything."""
    if settings.steps and settings.epochs:
        raise ValueError("got --steps and --epochs; expected one of them; leave one out")
    if settings.init == "words" and settings.prefix_len:
        raise ValueError("got --prefix-len with --init words; expected one of them: the words of "
                         "--init-text decide the length")
    if settings.start_from and (settings.prefix_len or settings.prefixes or
                                settings.init != "random"):
        raise ValueError("got --start-from with --prefix-len, --prefixes or --init; expected it "
                         "without: the prefix of that run decides; leave them out")
    if settings.start_from and "model" not in settings.given:
        settings.model = run_settings(settings.start_from)["model"]
    if settings.method != "prefix":
        for field in dataclasses.fields(Settings):
            if field.name in PREFIX_ONLY and getattr(settings, field.name) != field.default:
                raise ValueError(f"got --{field.name.replace('_', '-')} with --method "
                                 f"{settings.method}, which has no prefix; expected one of them; "
                                 "leave one out")
    if settings.init != "words" and settings.init_text != Settings.init_text:
        raise ValueError(f"got --init-text with --init {settings.init}; expected it with --init "
                         "words; leave it out" + ("" if settings.start_from else ", or add that"))
    if settings.pack == "yes" and (settings.compile or settings.method != "prefix"):
        raise ValueError("got --pack yes with --compile or with a --method that moves the weights; "
                         "expected --pack alone; leave it out")
    if not settings.data:
        settings.data = "world-headlines" if settings.model == "tiny-bart" else "world"
    length_given = settings.steps or settings.epochs
    defaults = DEFAULTS[settings.method]
    for name, value in defaults.get(settings.data, defaults[OWN]).items():
        if getattr(settings, name) is None and not (length_given and name in ("steps", "epochs")):
            setattr(settings, name, value)
    if settings.mid_dim is None:
        settings.mid_dim = 512
    if not settings.out:
        name = f"out/{Path(settings.model).name}-{Path(settings.data).name.removesuffix('.jsonl')}"
        name += "" if settings.method == "prefix" else f"-{settings.method}"
        free = (n for n in itertools.count(2) if not Path(f"{name}-{n}").exists())
        settings.out = f"{name}-{next(free)}" if Path(name).exists() else name
    elif Path(settings.out).exists():
        raise ValueError(f"got --out {settings.out}, which exists; expected a new directory; "
                         f"choose another, or go on with `--resume {settings.out}`")
    return settings


def resumed(asked):
    """The settings of the run to go on with; of the new call only --device and --stop-at."""
    try:
        settings = Settings(**run_settings(asked.resume))
    except TypeError as error:
        raise ValueError(f"got {asked.resume}, whose config.json has other settings ({error}); "
                         "expected those of this version of train.py; start a new run") from error
    for field in dataclasses.fields(Settings):
        if field.name in ("resume", "device", "stop_at"):
            setattr(settings, field.name, getattr(asked, field.name))
        elif field.name in asked.given:
            raise ValueError(f"got --{field.name.replace('_', '-')} with --resume; expected only "
                             "--device and --stop-at beside it; start a new run for new settings")
    settings.out = asked.resume
    return settings


def places_of(settings, model):
    """{place: P}, where the prefixes of `model` stand and how long they are."""
    if model.architecture != "bart" and settings.prefixes:
        raise ValueError(f"got --prefixes {settings.prefixes} with {settings.model}; expected a "
                         "BART, GPT-2 has one place only; leave it out")
    lengths = {}
    for part in (settings.prefixes or ",".join(model.places)).split(","):
        place, equals, length = part.strip().partition("=")
        if (place not in model.places or place in lengths
                or equals and not (length.isdecimal() and int(length))):
            raise ValueError(f"got --prefixes {settings.prefixes}; expected one or more of "
                             f"{', '.join(model.places)}, each once, with =LENGTH, at least 1, or "
                             "without")
        if length and settings.init == "words":
            raise ValueError(f"got --prefixes {settings.prefixes} with --init words; expected no "
                             "length: the words of --init-text decide it")
        lengths[place] = int(length or settings.prefix_len)
    # Text and prefix share GPT-2's positions, BART's not.
    if model.architecture != "bart" and settings.prefix_len >= model.config.n_positions:
        raise ValueError(f"got a prefix of {settings.prefix_len}; expected less than the model's "
                         f"{model.config.n_positions} positions; lower --prefix-len")
    return lengths


def room_for(settings, model, learner):
    """How many tokens a pair may have; of BART a source, and a target."""
    most = model.config.n_positions
    if model.architecture == "bart":            # they do not share the positions, nor with a prefix
        return min(settings.max_source, most), min(settings.max_target, most)
    if {"max_source", "max_target"} & settings.given:
        raise ValueError(f"got --max-source or --max-target with {settings.model}; expected a "
                         "BART: a GPT-2 reads all that fits its positions; leave it out")
    return most - learner().size(4)
