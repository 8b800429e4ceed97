"""The paper's settings as data: the defaults of the flags, by data set and method.

Training: table 6 of Li & Liang 2021. Decoding: section 5.3 and the official code. --help shows
them; config.json of a run has those that were used. The settings of the invented world were chosen
on its held-out kinds (its finetune-top2 was not tuned), those of smollm2 in a few short runs.
DialogSum and SciTLDR are not in the paper and get XSum's. Other data gets E2E's, with the paper's
low-data learning rate.
"""
import dataclasses
from pathlib import Path

from data import own, summaries
from utils.terminal import command

# Flags of train.py that only a prefix has.
PREFIX_ONLY = ("prefix_len", "prefix_layers", "prefixes", "mid_dim", "init", "init_text",
               "start_from")
OTHER = "all others, your own too"
XSUM = dict(lr=5e-5, epochs=30, batch_size=14, prefix_len=100, mid_dim=800)         # of BART
TRAINING = {
    "prefix": {
        "e2e": dict(lr=8e-5, epochs=5, batch_size=10, prefix_len=5),
        "webnlg": dict(lr=5e-5, epochs=5, batch_size=5, prefix_len=5),
        "dart": dict(lr=5e-5, epochs=10, batch_size=5, prefix_len=10),
        "smollm2 e2e": dict(lr=1e-3, steps=340, batch_size=12, prefix_len=10, warmup=20,
                            share_source=3, dev_pairs=100, dev_every=113),
        "world": dict(lr=3e-3, steps=200, batch_size=10, prefix_len=9),
        "world-hard": dict(lr=3e-3, steps=1500, batch_size=10, prefix_len=9),
        "world-headlines": dict(lr=3e-3, steps=600, batch_size=10, prefix_len=9),
        "xsum": XSUM,
        "dialogsum": XSUM,
        "scitldr": XSUM,
        "xsum-news-to-sports": dict(lr=5e-5, epochs=15, batch_size=36, prefix_len=40, mid_dim=800),
        "xsum-within-news": dict(lr=5e-5, epochs=30, batch_size=36, prefix_len=80, mid_dim=800),
        OTHER: dict(lr=5e-5, epochs=5, batch_size=10, prefix_len=5),
    },
    "finetune": {
        "e2e": dict(lr=5e-5, epochs=5, batch_size=10),
        "webnlg": dict(lr=1e-5, epochs=10, batch_size=6),
        "dart": dict(lr=1e-5, epochs=10, batch_size=6),
        "world": dict(lr=1e-4, steps=200, batch_size=10),
        "world-hard": dict(lr=1e-4, steps=1500, batch_size=10),
        OTHER: dict(lr=5e-5, epochs=5, batch_size=10),
    },
    "finetune-top2": {
        "e2e": dict(lr=5e-5, epochs=5, batch_size=10),
        "webnlg": dict(lr=5e-5, epochs=10, batch_size=9),
        "dart": dict(lr=5e-5, epochs=5, batch_size=5),
        "world": dict(lr=1e-4, steps=200, batch_size=10),
        "world-hard": dict(lr=1e-4, steps=1500, batch_size=10),
        OTHER: dict(lr=5e-5, epochs=5, batch_size=10),
    },
}
# The official code's 11 and 62 tokens of a summary count BART's start token: it is not generated.
# Differs from the paper: for tables its code counts the source's tokens too, in its minimum of 5
# and in the length of the length penalty; here both count generated tokens only.
TABLES = dict(num_beams=5, min_new_tokens=5, max_new_tokens=100, length_penalty=1.0)
SUMMARIES = dict(num_beams=6, min_new_tokens=10, max_new_tokens=61, length_penalty=0.8)
DECODING = {**dict.fromkeys(("e2e", "webnlg", "dart"), TABLES),
            **dict.fromkeys(summaries.NAMES, SUMMARIES),            # the paper's is XSum
            OTHER: dict(num_beams=1, min_new_tokens=0, max_new_tokens=100, length_penalty=1.0)}
LINE_BREAKS = ("\n", "\n\n")            # GPT-2's tokens 198 and 628
ONE_LINE = ("e2e", "webnlg", "dart", "world", "world-hard")         # tables, whose texts have none


def banned_after(data):
    """The texts that are never generated for a data set: for tables, line breaks."""
    return list(LINE_BREAKS) if data in ONE_LINE else []


def fill_in(settings, defaults, data, given=frozenset()):
    """Give every setting that was left out the default of the data set, in place.

    given: the names that the command line has; these stay, even where they are the flag's default.
    """
    untouched = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, value in defaults.get(data, defaults[OTHER]).items():
        if getattr(settings, name) == untouched[name] and name not in given:
            setattr(settings, name, value)


def contradictions_in(s):
    """(whether it is so, what was got, what was expected) for flags that exclude each other."""
    defaults = {field.name: field.default for field in dataclasses.fields(s)}
    changed = [name for name in PREFIX_ONLY if getattr(s, name) != defaults[name]]
    words, first = s.init == "words", "".join(changed[:1]).replace("_", "-")
    is_run, again = (Path(s.out) / "config.json").exists(), command("train.py", "--resume", s.out)
    return (
        (s.steps and s.epochs, "--steps and --epochs", "one of them; leave one out"),
        (words and s.prefix_len, "--prefix-len with --init words",
         "one of them: the words of --init-text decide the length"),
        (s.start_from and (s.prefix_len or s.prefix_layers or s.prefixes or s.init != "random"),
         "--start-from with --prefix-len, --prefix-layers, --prefixes or --init",
         "it without: the prefix of that run decides; leave them out"),
        (s.method != "prefix" and changed, f"--{first} with --method {s.method}",
         "one of them: that method has no prefix; leave one out"),
        (s.method != "prefix" and s.dtype == "fp16", f"--method {s.method} with --dtype fp16",
         "fp32 or bf16: a loss scale helps gradients, not the steps of weights; use --dtype fp32"),
        (not words and s.init_text != defaults["init_text"], f"--init-text with --init {s.init}",
         "it with --init words; leave it out" + ("" if s.start_from else ", or add that")),
        ((s.source_key, s.target_key) != own.KEYS and not own.is_own(s.data),
         f"--source-key or --target-key with the data {s.data or 'world'}",
         "them with your own data; leave them out"),
        (s.out and Path(s.out).exists(), f"--out {s.out}, which exists",
         "a new directory; choose another" + (f", or go on with `{again}`" if is_run else "")))


def resolve_training(args):
    """train.py's settings with what was left out filled in, so that config.json has them all.

    Raises ValueError for flags that do not go together.
    """
    for wrong, got, expected in contradictions_in(args):
        if wrong:
            raise ValueError(f"got {got}; expected {expected}")
    s = dataclasses.replace(args)
    if not s.data:
        s.data = "world-headlines" if s.model == "tiny-bart" else "world"
    duration = s.epochs, s.steps
    both = f"{Path(s.model).name} {s.data}"         # some models have their own
    fill_in(s, TRAINING[s.method], both if both in TRAINING[s.method] else s.data, args.given)
    if any(duration):                   # given: then the data set's own does not count
        s.epochs, s.steps = duration
    s.mid_dim = 512 if s.mid_dim is None else s.mid_dim
    if s.method != "prefix" and s.dtype == "auto":
        s.dtype = "fp32"                # steps of 1e-5 would be rounded away in bf16 weights
    return s


def training_notes():
    """The defaults of training as lines of text, for --help."""
    return "\n".join(["defaults by method and data set:"] + [
        f"  {method}, {data}: {values}" for method, by_data in TRAINING.items()
        for data, values in by_data.items()])


def decoding_notes():
    """The defaults of decoding as lines of text, for --help."""
    return "\n".join(["defaults by data set:"] + [
        f"  {data}: {values}" for data, values in DECODING.items()])
