"""Random command lines in front of every program: one line of refusal, or what was asked for.

    python tests/stress/fuzz_flags.py --count 5000

Each line has one to six flags of a program with values that are fair, odd or without end. All are
parsed: what is taken must be what stands there, in its flag's type and within the limits that
--help says. Every fourth that train.py, sample.py and pretrained.convert take is also carried
out, in a child with 4 GB and a minute: status 0, or 2 and one line, nothing of which says that it
was not expected.
"""
import contextlib
import dataclasses
import importlib
import io
import os
import random
import resource
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from common import child, empty_folder, end, make_task, parse, status_of

from utils.cli import number, run_program
from utils.cli import parse as parse_flags

# A program and the field that it takes without dashes.
PROGRAMS = {"train": None, "sample": "prompt", "pretrained.convert": "source",
            "scripts.evaluate": None, "scripts.pretrain": None, "scripts.claims": None,
            "scripts.draw": None, "scripts.tune": None, "scripts.bench": None}
VALUES = ("", "-", "--", "-1", "0", "1", "2", "3", "07", "1_0", "\u0663", "1e3", "1e-3", "0.5",
          "nan", "inf", "-inf", "1e999", "9" * 20, "9" * 5000, str(2 ** 31), str(2 ** 63),
          str(2 ** 64), str(10 ** 9), "True", "None", "a b", "\n", "\udcff", "\u6771", "x" * 5000,
          "/dev/null", "/dev/zero", ".", "/", "..", "my.jsonl", "bytes", "run", "cpu", "fp32",
          "bf16", "words", "sdpa", "prefix", "finetune", "out/a", "encoder=3", "1-1", "0-1", "5-2",
          "--help-me", "%s")
RUN = ("train", "sample", "pretrained.convert")
EVERY, MEMORY, LONGEST = 4, 4 << 30, 60            # children: one line in, bytes, seconds


def line(settings, rng):
    """(words of a command line, {field: the text of its last value})."""
    words, given = [], {}
    fields = dataclasses.fields(settings)
    for field in rng.choices(fields, k=rng.randint(1, 6)):
        name, value = "--" + field.name.replace("_", "-"), rng.choice(VALUES)
        kind = field.metadata["kind"]
        if field.metadata["within"] and rng.random() < 0.5:         # in the limits, or just outside
            low, high = field.metadata["within"]
            value = str(rng.choice((low, high, low + 1, low - 1, high + 1, kind(min(high, 7)))))
        elif field.metadata["choices"] and rng.random() < 0.5:
            value = rng.choice(field.metadata["choices"])
        if rng.random() < 0.03:
            name = rng.choice((name[:-1], name + "s", name.upper(), "-" + name[2:3], "-x", "--"))
        plain = kind is bool and rng.random() < 0.8
        words += [name] if plain else [f"{name}={value}"] if rng.random() < 0.6 else [name, value]
        given[field.name] = None if plain else value
    return words, given


def fault(settings, words, given, positional):
    """What is wrong with how `words` are parsed, "" if nothing is; None where they are refused."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = parse_flags(settings, words, "", positional)
    except ValueError as error:
        return f"a message of {len(str(error))} letters" if len(str(error)) > 12_000 else None
    except SystemExit as error:
        return f"status {error.code}" if error.code else None       # --help
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    for name in found.given:
        value, text = getattr(found, name), given.get(name)
        field = settings.__dataclass_fields__[name]
        kind, within = field.metadata["kind"], field.metadata["within"]
        if field.default is dataclasses.MISSING:
            value = value[-1]
            kind = str if kind is list else kind
        if type(value) is not kind or name != positional and text is not None and (
                value != kind(text)):
            return f"{name} is {value!r:.60}, not {text!r:.60}"
        if within and not within[0] <= value <= within[1]:
            return f"{name} is {value!r:.60}"
    return ""


def carried_out(module, words):
    """(what is wrong with a program that was called with `words`, "" if nothing is; its status)."""
    def program():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(LONGEST)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        torch.set_num_threads(1)
        run_program(lambda: module.main(words))
    status = status_of(child(program))
    said = Path("output.txt").read_text("utf-8", "replace")
    if status == -signal.SIGALRM:
        return "hangs", status
    wrong = "Traceback" in said or "did not expect" in said or said.count("error: ") > 1
    return f"status {status}: {said[-300:]!r}" if status not in (0, 2) or wrong else "", status


def limits_in_help(settings, failures, name):
    """Every limit is said in --help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parse_flags(settings, ["--help"], "")
    said = " ".join(text.getvalue().split())
    for field in dataclasses.fields(settings):
        if field.metadata["within"]:
            limits = " to ".join(map(number, field.metadata["within"]))
            if limits not in said:
                failures.append(f"{name} --help does not say {field.name} {limits}")


def main():
    args, failures, counts = parse(__doc__, 2000), [], Counter()
    rng = random.Random(args.seed)
    modules = {name: importlib.import_module(name) for name in PROGRAMS}
    modules["train"].show = lambda *_: None
    for name, module in modules.items():
        limits_in_help(module.Settings, failures, name)
    with empty_folder() as folder:
        task, waiting = make_task(folder), Counter()
        for _ in range(args.count):
            name = rng.choice(list(PROGRAMS))
            words, given = line(modules[name].Settings, rng)
            found = fault(modules[name].Settings, words, given, PROGRAMS[name])
            counts["refused" if found is None else "taken"] += 1
            if found:
                failures.append(f"{name} {words!r:.200}: {found}")
            # What is fair and takes minutes is left out: many steps, a compiler.
            if name not in RUN or found != "" or {"steps", "epochs", "compile"} & given.keys():
                continue
            waiting[name] += 1
            if waiting[name] % EVERY == 0:
                own = {"train": [*task[:-6], "--steps=2", "--batch-size=4", "--prefix-len=2",
                                 "--mid-dim=8"],
                       "sample": ["--model=bytes", "--device=cpu", "--max-new-tokens=3"],
                       "pretrained.convert": []}[name]
                found, status = carried_out(modules[name], [*own, *words])
                counts["done" if status == 0 else "refused later"] += 1
                if found:
                    failures.append(f"{name} {words!r:.200}: {found}")
    print(dict(counts))
    end(f"{args.count} command lines", failures, refused=counts["refused"], taken=counts["taken"],
        done=counts["done"])


if __name__ == "__main__":
    sys.exit(main())
