"""Decode a split of the data with a run of train.py, and score the outputs.

    python -m scripts.evaluate --run out/NAME                       the test set
    python -m scripts.evaluate --run out/NAME --split dev --examples 100 --num-beams 5

The outputs are kept beside the run, in SPLIT.jsonl, and a call that was stopped goes on from there;
the scores are in SPLIT.scores.json. Not here: decoding itself (sample.py), the scores (scores.py).
"""
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import sample
from data import own, paper, tasks
from data.batches import group_by
from data.toy_world import headlines, tables
from prefix import tensors_of
from pretrained.load import name_of_dtype
from pretrained.run_directory import run_settings
from scripts.results import append_rows, lock_rows, read_rows, write_rows
from scripts.scores import DEFAULT, RULES, score
from utils.cli import flag, parse, run_program
from utils.files import atomic_write
from utils.terminal import progress


@dataclasses.dataclass
class Settings:
    run: str = flag("", "directory of a training run, out/NAME",
                    group="run and data: --run out/NAME --split dev")
    split: str = flag("test", "train, dev or test")
    data: str = flag("", "another data set than the one of the run, by name or your own")
    data_dir: str = flag("", "read the data set from here; left out: as the run did")
    source_key: str = flag("", "as in train.py; left out: as the run did")
    target_key: str = flag("", "as in train.py; left out: as the run did")
    examples: int = flag(0, "the first so many sources only; 0: all", within=(0, 10 ** 9))
    topics: bool = flag(False, "score each topic by itself, too")
    num_beams: int = flag(None, "as in sample.py; left out: by the data set, see there",
                          kind=int, within=(1, 1000), alias="beam",
                          group="search: --run out/NAME --num-beams 5")
    length_penalty: float = flag(None, "as in sample.py", kind=float, within=(-100, 100))
    max_new_tokens: int = flag(None, "as in sample.py", kind=int, within=(1, 100_000),
                               alias="max-new")
    min_new_tokens: int = flag(None, "as in sample.py", kind=int, within=(0, 100_000),
                               alias="min-new")
    no_repeat_ngram_size: int = flag(0, "as in sample.py", within=(0, 100_000), alias="no-repeat")
    batch_size: int = flag(16, "sources decoded at once", within=(1, 100_000),
                           group="device: --run out/NAME --device cpu")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = flag("auto", "of the frozen weights; auto: bf16 on a GPU that has it, else fp32",
                      choices=["auto", "fp32", "bf16", "fp16", "fp64"])


DECODING = ("num_beams", "length_penalty", "max_new_tokens", "min_new_tokens",
            "no_repeat_ngram_size", "dtype")


# ---- decode, and keep every output at once

def saved_outputs(path, about, examples):
    """The rows that an earlier call left in `path`, with today's references and topics; what a kill
    cut off is dropped.

    The file's first line, `about`, tells how they were decoded. Raises ValueError where that was
    done in another way, or from other sources.
    """
    first, *rows = read_rows(path) or [about]
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) for key in ("source", "text")):
            raise ValueError(f"got {path}, whose text {number} has no source or no text; expected "
                             "what this program wrote there; move that file away")
    if first != about:
        differ = ", ".join(f"{key} ({first.get(key)}, now {about.get(key)})"
                           for key in first | about if first.get(key) != about.get(key))
        raise ValueError(f"got {path}, whose texts were decoded with another {differ}; expected "
                         "the same; move that file away, or give the same flags")
    for number, (row, example) in enumerate(zip(rows, examples), 1):
        if row["source"] != example.source:
            both = row["source"], example.source
            start = max(0, len(os.path.commonprefix(both)) - 20)    # where they begin to differ
            was, now = (f"{'...' if start else ''}{text[start:start + 40]}" for text in both)
            raise ValueError(f"got {path}, whose text {number} is about {was!r}; expected {now!r}; "
                             "the data have changed since: move that file away")
        row |= {"topic": example.topic, "references": example.targets}
    return rows


def decode(generator, examples, path, about, batch_size):
    """The output for every example, in order, read from `path` or generated and added to it."""
    rows = saved_outputs(path, about, examples)
    write_rows(path, [about, *rows])
    if rows:
        print(f"{path}: {len(rows)} texts are there already", file=sys.stderr)
    with progress(total=max(len(examples), len(rows)), initial=len(rows), unit="source") as bar:
        for i in range(len(rows), len(examples), batch_size):
            batch = examples[i:i + batch_size]
            new = [{"source": e.source, "text": text, "topic": e.topic, "references": e.targets}
                   for e, text in zip(batch, generator.generate([e.source for e in batch]))]
            append_rows(path, new)
            rows += new
            bar.update(len(batch))
    return [row["text"] for row in rows[:len(examples)]]


def description(generator, settings, data):
    """Everything that decides the outputs: the first line of their file."""
    prefix, = generator.prefixes.values()
    numbers = b"".join(part.float().cpu().numpy().tobytes() for part in tensors_of(prefix))
    return {"data": data, "split": settings.split,
            "prefix": hashlib.sha256(numbers).hexdigest()[:16],
            "model": generator.model.fingerprint,       # a fine-tuned run has no prefix
            **{name: getattr(generator.settings, name) for name in DECODING},
            "dtype": name_of_dtype(generator.model.dtype)}


# ---- the scores of every part of the split

def parts_of(data, examples, topics):
    """{name: indices of its examples}: all; seen and unseen, where there are such; the topics.

    A topic whose name is taken, by one of those three, say, is called "topic NAME".
    """
    every = range(len(examples))
    found = {"all": list(every)}
    seen = (tasks.WEBNLG_SEEN if data == "webnlg" else
            set(tables.TRAIN_KINDS) if data in tasks.WORLDS else None)
    if seen is not None:
        found["seen"] = [i for i in every if examples[i].topic in seen]
        found["unseen"] = [i for i in every if examples[i].topic not in seen]
    if topics and any(example.topic for example in examples):
        groups = group_by(every, lambda i: examples[i].topic)
        for rows in sorted(groups, key=lambda rows: examples[rows[0]].topic):
            name = examples[rows[0]].topic or "no topic"
            while name in found:
                name = f"topic {name}"
            found[name] = rows
    return {name: rows for name, rows in found.items() if rows}


def scores_of(data, examples, outputs):
    """({name: number}, {name of a score that cannot be had: why}) of some outputs."""
    numbers, missing = score(outputs, [e.targets for e in examples], RULES.get(data, DEFAULT))
    if data in tasks.WORLDS:
        slots = (headlines.headline_accuracy if data == "world-headlines" else
                 tables.slot_accuracy)
        numbers |= {"slots": 100 * slots(examples, outputs),
                    "exact": 100 * tables.exact_match(examples, outputs)}
    return {"tables": len(examples)} | numbers, missing


def table(scores, missing, unit="tables"):
    """The scores of every part as lines of text, a column each; "-" for one that is missing.

    unit: what its first column counts.
    """
    columns = list(dict.fromkeys(name for found in (*scores.values(), *missing.values())
                                 for name in found))
    width = max(map(len, scores)) + 2

    def line(name, cells):
        return name.ljust(width) + "".join(
            cell.rjust(7 if column == "tables" else max(8, len(column) + 2))
            for column, cell in zip(columns, cells))
    lines = [line("", (unit if c == "tables" else c for c in columns))]
    for part, numbers in scores.items():
        lines.append(line(part, (str(numbers[c]) if c == "tables" else
                                 f"{numbers[c]:.2f}" if c in numbers else "-" for c in columns)))
    return "\n".join(lines)


def reasons(missing):
    """A line for every reason why scores are missing: which ones, of which part, why."""
    for why in dict.fromkeys(why for absent in missing.values() for why in absent.values()):
        parts = [part for part, absent in missing.items() if why in absent.values()]
        names = dict.fromkeys(name for absent in missing.values() for name in absent
                              if absent[name] == why)
        where = "" if parts[0] == "all" else f" for {', '.join(parts[:3])}" + (
            f" and {len(parts) - 3} more" if len(parts) > 3 else "")
        yield f"no {', '.join(names)}{where}: {why}"


def main(argv=None):
    settings = parse(Settings, argv, "Decode a split of a data set, and score it.")
    if not settings.run:
        raise ValueError("got no --run; expected the directory of one; `python -m scripts.evaluate "
                         "--run out/NAME`")
    trained = run_settings(settings.run)
    data = settings.data or trained.get("data", "")
    data_dir = settings.data_dir or trained.get("data_dir") or None
    keys = [getattr(settings, f"{name}_key") or key
            for name, key in zip(own.KEYS, own.keys_of(trained))]
    examples = tasks.load(data, settings.split, data_dir, keys=keys)
    examples = examples[:settings.examples or None]
    paper.fill_in(settings, paper.DECODING, data)       # of the data that are decoded
    generator = sample.Generator(sample.Settings(
        run=[settings.run], device=settings.device, ban=paper.banned_after(data),
        **{name: getattr(settings, name) for name in DECODING}))
    about = description(generator, settings, data)
    path = Path(settings.run) / f"{settings.split}.jsonl"
    lock_rows(path)
    outputs = decode(generator, examples, path, about, settings.batch_size)
    scores, missing = {}, {}
    for part, rows in parts_of(data, examples, settings.topics).items():
        scores[part], missing[part] = scores_of(data, [examples[i] for i in rows],
                                                [outputs[i] for i in rows])
    print(table(scores, missing, "tables" if data in paper.ONE_LINE else "sources"))
    for line in reasons(missing):
        print(line, file=sys.stderr)
    with atomic_write(path.with_suffix(".scores.json"), "w") as file:
        json.dump(about | {"scores": scores}, file, indent=1)
    print(f"texts in {path}, scores in {path.with_suffix('.scores.json')}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main, goes_on=True)
