"""Damaged, odd and endless files in front of every reader: one line of refusal, or a result.

    python tests/stress/fuzz_files.py --count 10000

Two kinds of damage, at random places of a good file: bytes (flipped, cut, doubled, inserted), and a
value of a JSON file replaced by one of another type. A reader that takes the latter without a word
must give the same result as before, for the value is one that it does not read: everything else is
a silent change. Besides these a directory, a pipe, /dev/zero, and a gzip file of 3 GB. A case that
takes longer than a minute hangs.
"""
import contextlib
import copy
import dataclasses
import gzip
import importlib.util
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from common import empty_folder, end, make_task, parse, write_vocabulary
from conftest import random_gpt2

import train
from data import formats, summaries, tasks
from data.example import examples
from data.requests import read_requests
from data.tokenizer import load_tokenizer, read_dict, read_ranks
from pretrained.checkpoint import load, save
from pretrained.hugging_face import convert
from pretrained.load import load_model
from pretrained.peft_adapter import read_peft, write_peft
from pretrained.run_directory import load_prefix, load_state, resumed_settings, run_settings
from scripts.results import read_rows

LONGEST = 60                                        # seconds of a case
ODD = (None, True, -1, 0, 3.5, 2 ** 70, 1e308, "", "a", "\ud83d", "9" * 50, [], {}, [None],
       {"a": []})
XML = ('<benchmark><entries><entry category="City" eid="Id1"><modifiedtripleset><mtriple>A | is | B'
       '</mtriple></modifiedtripleset><lex comment="good">A is B.</lex></entry></entries>'
       "</benchmark>")
WEBNLG = {"entries": [{"1": {
    "category": "City", "modifiedtripleset": [{"subject": "A", "property": "is", "object": "B"}],
    "lexicalisations": [{"lex": "A is B.", "comment": "good"}]}}]}
ARTICLE = ("[SN]URL[SN]\nhttp://www.bbc.co.uk/news/uk-1\n\n[SN]FIRST-SENTENCE[SN]\nA road.\n\n"
           "[SN]RESTBODY[SN]\nIt is closed.\nEmail\n")


def texts(folder):
    """[(file, its text, how it is read)] of all data sets."""
    rows = [{"source": f"a {n}", "target": ["b", "c"], "topic": "t"} for n in range(3)]
    dart = [{"tripleset": [["A", "IS", "B"]], "annotations": [{"text": "A is B."}]}]
    talk = {"dialogue": "a: b", "summary": "c", "topic": "d"}

    def lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)
    splits = json.dumps({"train": [], "validation": ["1"], "test": []})
    (folder / "release/bbc-summary-data").mkdir(parents=True)
    (folder / "release/bbc-summary-data/1.summary").write_text(ARTICLE)
    (folder / "release" / summaries.XSUM_SPLITS).write_text(splits)
    (folder / "val.target").write_text("one\ntwo\n")
    return [
        ("my.dev.jsonl", lines(rows), lambda path: tasks.load("my.jsonl", "dev")),
        ("devset.csv", 'mr,ref\n"name[A], food[B]","It, B."\nname[C],D.\n',
         lambda path: tasks.load("e2e", "dev", ".")),
        ("dev.json", json.dumps(WEBNLG), lambda path: tasks.load("webnlg", "dev", ".")),
        ("a.xml", XML, lambda path: examples(formats.read_webnlg(path, False))),
        ("dart-v1.1.1-full-dev.json", json.dumps(dart),
         lambda path: tasks.load("dart", "dev", ".")),
        ("dart.jsonl", lines(dart), lambda path: examples(formats.read_dart(path))),
        ("val.source", "article one\narticle two\n", lambda path: tasks.load("xsum", "dev", ".")),
        (f"release/{summaries.XSUM_SPLITS}", splits,
         lambda path: tasks.load("xsum", "dev", "release")),
        ("release/bbc-summary-data/1.summary", ARTICLE,
         lambda path: tasks.load("xsum", "dev", "release")),
        ("dialogsum.dev.jsonl", lines([talk]), lambda path: tasks.load("dialogsum", "dev", ".")),
        ("scitldr_a_dev.jsonl", lines([{"source": ["a", "b"], "target": ["c"]}]),
         lambda path: tasks.load("scitldr", "dev", ".")),
        ("in.txt", "one\ntwo\n", lambda path: list(read_requests(path, []))),
        ("in.jsonl", lines([{"source": "one", "run": "A"}, {"source": "two", "run": "B"}]),
         lambda path: list(read_requests(path, ["out/A", "out/B"])))]


def binaries(folder):
    """[(file, None, how it is read)] of models, vocabularies, prefixes and runs."""
    base = str(folder / "bytes")
    flags = make_task(folder)
    settings = train.resolve(train.parse(train.Settings, flags, ""))
    model, _ = load_model(base, "cpu", "fp32")
    learner = train.make_learner(dataclasses.replace(settings, prefix_len=2, mid_dim=4), model)
    run = folder / "run"
    settings = train.run_directory.create(dataclasses.replace(settings, out=str(run)), "", model)
    train.run_directory.save_learned(run, learner, model)
    train.run_directory.save_state(settings, {"fingerprint": "f", "data": "d", "step": 3,
                                              "learner": learner.state_dict()})
    (folder / "log").write_text(2 * json.dumps({"step": 1, "loss": 2.5}) + "\n")
    write_vocabulary(folder / "dict")
    (folder / "dict/dict.txt").write_text("".join(f"{256 - n} 1\n" for n in range(257)))
    theirs = random_gpt2(vocab_size=61, n_positions=33, n_embd=12, n_layer=2, n_head=3).float()
    hf = folder / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps({
        "model_type": "gpt2", **dataclasses.asdict(theirs.config), "bos_token_id": 3}))
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {"wte.weight": "part.bin"}}))
    torch.save({name: tensor.t().contiguous() if name.endswith((
        "c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
        for name, tensor in theirs.state_dict().items()}, hf / "part.bin")

    def converted(path):
        save(theirs, folder / "converted")          # what is there is overwritten
        convert(hf, folder / "converted")
        found = load(folder / "converted")
        return {**found.state_dict(), "config": found.config, "ends": found.generation_config}

    def state(path):
        found = load(base)
        return {**found.state_dict(), "config": found.config, "ends": found.generation_config}

    def settings_of(path):
        found = run_settings("run")
        new = resumed_settings(dataclasses.replace(train.Settings(), resume="run"))
        return found.get("model"), found.get("data"), new
    found = [("bytes/config.json", state), ("bytes/model.pt", state),
             ("bytes/tokenizer.tiktoken", read_ranks), ("dict/dict.txt", read_dict),
             ("dict/dict.txt", lambda path: load_tokenizer("dict").theirs),
             ("run/config.json", settings_of), ("log", lambda path: read_rows(path)),
             ("run/prefix.pt", lambda path: load_prefix(path, model)),
             ("run/resume.pt", lambda path: load_state(settings, "f", "d")),
             *((f"hf/{name}", converted) for name in (
                 "config.json", "generation_config.json", "pytorch_model.bin.index.json",
                 "part.bin"))]
    if importlib.util.find_spec("safetensors"):
        def peft(path):
            shutil.rmtree("from", ignore_errors=True)
            read_peft("peft", "from")
            return load_prefix("from/prefix.pt", model)
        write_peft("run", "peft")
        found.append(("peft/adapter_config.json", peft))
    return [(name, None, read) for name, read in found]


def damage_bytes(raw, rng):
    """`raw` with one to three places damaged."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(raw) + 1), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(5)
        if kind == 0 and raw:
            raw[at - 1] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at:at + length]
        elif kind == 2:
            raw[at:at] = raw[at:at + length]
        elif kind == 3:
            raw[at:at] = rng.choice((b"\x00", b"\xff", b"\n", b"\r", b'"', b"{", b"[" * 5000,
                                     b"]]>", b"\xef\xbb\xbf", b"1e999", b"\xed\xa0\x80",
                                     b" " * 200))
        else:
            raw = raw[:at]
    return bytes(raw)


def places(value, found=()):
    """The paths to all values inside of a JSON value, itself among them."""
    yield found
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for key, inner in items:
        yield from places(inner, (*found, key))


def damage_json(text, rng):
    """(the text with one value of another type, whether that may be fair, what it is) of JSON or
    JSON lines.
    """
    try:
        lines = [json.dumps(json.loads(text))]
    except ValueError:                              # several lines of JSON
        lines = text.splitlines()
    at = rng.randrange(len(lines))
    value = json.loads(lines[at])
    path = rng.choice(list(places(value)))
    old = value
    for key in path:
        old = old[key]
    new = copy.deepcopy(rng.choice([odd for odd in ODD if type(odd) is not type(old)]))
    if path:
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = new
    else:
        value = new
    if isinstance(value, dict) and path[:1] != ("sha256",):
        value.pop("sha256", None)       # with it the checksum alone would refuse every change
    lines[at] = json.dumps(value)
    name = next((key for key in reversed(path) if isinstance(key, str)), "")
    fair = (type(old) in (int, float) and type(new) in (int, float)     # 3 for 3.0
            or name in ("target", "topic", "run", "metadata") or isinstance(old, list) and (
                isinstance(new, str) and name == "source")              # a text for a list of one
            or name.endswith("_token_id") and type(new) is int          # the same
            or new is None or "settings" in path and old is None)       # what is left out
    return "\n".join(lines) + "\n", fair, f"{'.'.join(map(str, path))} = {new!r}"


def same(a, b):
    """Whether two results of a reader are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def outcome(read, path):
    """("refused", message), ("taken", result) or ("traceback" or "hang", what)."""
    def late(number, frame):
        raise TimeoutError("hangs")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return "taken", read(path)
    except TimeoutError:
        return "hang", f"longer than {LONGEST} s"
    except (ValueError, OSError) as error:
        return "refused", str(error)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:80]}"
    finally:
        signal.alarm(0)


def endless(cases, failures, counts):
    """A directory, a pipe, /dev/zero and a bomb in the place of each text file."""
    member = gzip.compress(bytes(64 << 20))
    Path("bomb").write_bytes(48 * member)           # 3 GB in 3 MB
    for name, _, read in cases:
        path = Path(name)
        kept = path.read_bytes()
        for kind, make in (("directory", Path.mkdir), ("pipe", os.mkfifo),
                           ("/dev/zero", lambda path: path.symlink_to("/dev/zero")),
                           ("bomb", lambda path: path.symlink_to(Path("bomb").resolve()))):
            path.unlink()
            make(path)
            found, what = outcome(read, path)
            counts[f"{kind}: {found}"] += 1
            # A directory is none of a reader's files, or a tree of XML files: it has none.
            if found != "refused" and not (kind == "directory" and found == "taken"):
                failures.append(f"{name} as {kind}: {found} {what}")
            path.rmdir() if kind == "directory" else path.unlink()
            path.write_bytes(kept)


def main():
    args, failures, counts = parse(__doc__, 2000), [], Counter()
    rng = random.Random(args.seed)
    with empty_folder() as folder:
        with contextlib.redirect_stderr(io.StringIO()):
            cases = [*texts(folder), *binaries(folder)]
        for name, text, _ in cases:
            if text is not None:
                Path(name).write_text(text)
        good = [outcome(read, Path(name)) for name, _, read in cases]
        for (name, *_), (found, what) in zip(cases, good):
            if found != "taken":
                sys.exit(f"{name}, whole: {found} {what}")
        for n in range(args.count):
            (name, _, read), (_, right) = rng.choice(list(zip(cases, good)))
            path, fair, about = Path(name), True, "bytes"
            whole = path.read_bytes()
            if ".json" in name and rng.random() < 0.6:
                changed, fair, about = damage_json(whole.decode(), rng)
                path.write_text(changed)
            else:
                path.write_bytes(damage_bytes(whole, rng))
            found, what = outcome(read, path)
            if found == "taken" and not fair and not same(what, right):
                found, what = "silent change", ""
            if found not in ("taken", "refused"):
                failures.append(f"{name}, case {n}: {found} {what}; {about[:80]}")
            counts[found] += 1
            path.write_bytes(whole)
        endless([case for case in cases if case[1] is not None], failures, counts)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print("\n".join(failures[20:]) + f"{dict(counts)}; at most {memory} MB of memory")
    end(f"{args.count} files", failures, taken=counts["taken"], refused=counts["refused"])


if __name__ == "__main__":
    main()
