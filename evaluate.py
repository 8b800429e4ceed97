"""Decode a split of the data with a run of train.py and score it as the official scripts do.

    python evaluate.py --run out/NAME                       the test set
    python evaluate.py --run out/NAME --split dev --examples 100 --beam 5

The texts are kept beside the run, in SPLIT.jsonl, and a call that was stopped goes on from there;
the scores are in SPLIT.scores.json. The paper's scores (Li & Liang 2021, section 5.2) come from
well-kept packages, none of them is written here; one that is not installed is named and its scores
are left out. Not here: decoding itself (sample.py).
"""
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import sys
from math import inf
from pathlib import Path

from tqdm import tqdm

from data import headlines, tasks, world
from opening import name_of_dtype, run_settings
from plumbing import flag, parse, run, whole_file
from prefix import parts as tensors_of
from sample import Settings as Decoding
from sample import Speaker


@dataclasses.dataclass
class Settings:
    run: str = flag("", "directory of a training run, out/NAME")
    split: str = flag("test", "train, dev or test")
    data: str = flag("", "another data set than the one of the run, by name or .jsonl")
    data_dir: str = flag("", "read the data set from here; left out: as the run did")
    examples: int = flag(0, "the first so many tables only; 0: all", within=(0, inf))
    topics: bool = flag(False, "score each topic by itself, too")
    beam: int = flag(None, "as in sample.py; left out: by the run's data, see there",
                     kind=int, within=(1, 1000))
    length_penalty: float = flag(None, "as in sample.py", kind=float, within=(-100, 100))
    max_new: int = flag(None, "as in sample.py", kind=int, within=(1, inf))
    min_new: int = flag(None, "as in sample.py", kind=int, within=(0, inf))
    no_repeat: int = flag(0, "as in sample.py", within=(0, inf))
    batch_size: int = flag(16, "tables decoded at once", within=(1, inf))
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = flag("auto", "of the frozen weights; auto: bf16 on a GPU that has it, else fp32",
                      choices=["auto", "fp32", "bf16", "fp64"])


# ---- decode, and keep every text at once

DECODES = ("beam", "length_penalty", "max_new", "min_new", "no_repeat", "dtype")


def kept_texts(path, about):
    """The texts that an earlier call left in `path`; what a kill cut off is dropped.

    The file's first line tells how they were made. Raises ValueError where that is not `about`.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:              # the last line of a call that was killed, cut anywhere
            break
    if rows and rows[0] != about:
        differ = ", ".join(f"{key} ({rows[0].get(key)}, now {about[key]})" for key in about
                           if rows[0].get(key) != about[key])
        raise ValueError(f"got {path}, whose texts were decoded with another {differ}; expected "
                         "the same; move that file away, or give the same flags")
    return rows[1:]


def decode(speaker, examples, path, about, batch_size):
    """The text for every example, in order, read from `path` or decoded and added to it.

    Raises ValueError where the texts in `path` are not about these examples.
    """
    rows = kept_texts(path, about)
    for number, (row, example) in enumerate(zip(rows, examples), 1):
        if row["source"] != example.source:
            raise ValueError(f"got {path}, whose text {number} is about {row['source'][:40]!r}; "
                             f"expected {example.source[:40]!r}; the data have changed since: move "
                             "that file away")
    with whole_file(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in [about, *rows])
    if rows:
        print(f"{path}: {len(rows)} texts are there already", file=sys.stderr)
    bar = tqdm(total=max(len(examples), len(rows)), initial=len(rows), unit="table", disable=None)
    with bar, open(path, "a", encoding="utf-8") as file:
        for i in range(len(rows), len(examples), batch_size):
            batch = examples[i:i + batch_size]
            new = [{"source": e.source, "text": text, "topic": e.topic, "references": e.targets}
                   for e, text in zip(batch, speaker.say([e.source for e in batch]))]
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
            file.flush()
            rows += new
            bar.update(len(batch))
    return [row["text"] for row in rows[:len(examples)]]


# ---- what the official scripts make of a text before they compare

@dataclasses.dataclass(frozen=True)
class Rule:
    """How a data set's official script reads texts and references."""
    references: int = 100           # so many of them count, the first ones
    tokenize: str = "13a"           # sacrebleu's word for how text is cut into tokens
    lowercase: bool = False
    smooth: str = "exp"             # what an n-gram order without a match counts
    split: bool = False             # before all else, a blank around every sign
    ascii: bool = False             # and no accents


# E2E: e2e-metrics, mteval-13a. The others: multi-bleu.perl, on what stands between blanks; without
# a match its score is 0. DART's published reference files are split and lower-cased; texts have to
# be as well.
MULTI_BLEU = Rule(3, "none", lowercase=True, smooth="none", split=True)
RULES = {"e2e": Rule(lowercase=True), "dart": MULTI_BLEU,
         "webnlg": dataclasses.replace(MULTI_BLEU, ascii=True)}


def prepared(text, rule):
    """`text` as the script's first step leaves it."""
    if rule.ascii:
        from unidecode import unidecode
        text = unidecode(text)
    if rule.split:
        text = " ".join(" ".join(re.split(r"(\W)", text)).split())
    return text.lower() if rule.lowercase else text


# ---- the scores: texts and their references -> names and numbers

def of_sacrebleu(texts, references, rule):
    from sacrebleu.metrics import BLEU, CHRF, TER
    streams = [list(stream) for stream in itertools.zip_longest(*references)]   # None: has no more
    bleu = BLEU(tokenize=rule.tokenize, smooth_method=rule.smooth, force=True)
    return {score.name.removesuffix("2"): score.score for score in (
        metric.corpus_score(texts, streams) for metric in (bleu, CHRF(), TER()))}


def of_nltk(texts, references, rule):
    """NIST over up to 5-grams. nltk's counts, for each order, the matches with the one reference
    that fits best; mteval's counts those with all references together, so it is higher.
    """
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    cut = Tokenizer13a() if rule.tokenize == "13a" else str
    texts = [cut(text).split() for text in texts]
    if not any(len(text) >= 5 for text in texts):
        return {}                                   # nltk divides by the number of 5-grams
    return {"NIST": corpus_nist([[cut(r).split() for r in some] for some in references], texts)}


def treebank(texts, references, rule):
    """Both as pycocoevalcap's scorers take them, {number: [text, ...]}: in the Penn Treebank's
    tokens, lower-cased, without punctuation, where the rule has not cut them already.
    """
    if not shutil.which("java"):
        raise ImportError("java", name="java")
    # On one line: the tokenizer takes every line for a text of its own, whatever breaks it.
    said, wanted = ({i: [{"caption": " ".join(text.split())} for text in some]
                     for i, some in enumerate(all_of_them)}
                    for all_of_them in ([[text] for text in texts], references))
    if rule.split:
        return [{i: [row["caption"] for row in rows] for i, rows in x.items()}
                for x in (said, wanted)]
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    return [PTBTokenizer().tokenize(x) for x in (said, wanted)]


def of_coco(texts, references, rule):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    said, wanted = treebank(texts, references, rule)
    return {"ROUGE-L": 100 * float(Rouge().compute_score(wanted, said)[0]),
            "CIDEr": float(Cider().compute_score(wanted, said)[0])}


def of_meteor(texts, references, rule):
    from pycocoevalcap.meteor.meteor import Meteor
    said, wanted = treebank(texts, references, rule)
    return {"METEOR": 100 * Meteor().compute_score(wanted, said)[0]}


def of_rouge_score(texts, references, rule):
    """Summaries: F of stemmed words, of the reference that fits best, averaged over the texts."""
    from rouge_score.rouge_scorer import RougeScorer
    kinds = {"rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L"}
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    found = [scorer.score_multi(list(some), text) for text, some in zip(texts, references)]
    return {name: 100 * sum(f[kind].fmeasure for f in found) / len(found)
            for kind, name in kinds.items()}


SCORERS = {"BLEU, chrF and TER": of_sacrebleu, "NIST": of_nltk, "METEOR": of_meteor,
           "ROUGE-L and CIDEr": of_coco, "R-1, R-2 and R-L": of_rouge_score}


def score(texts, references, rule=Rule()):
    """({name: number}, {scores that are left out: the package that is missing})."""
    numbers, missing = {}, {}
    try:
        ready = [prepared(text, rule) for text in texts]
        known = [[prepared(r, rule) for r in some[:rule.references]] for some in references]
    except ImportError as error:
        return {}, {"all scores of this data set": error.name}
    for names, scorer in SCORERS.items():
        try:
            numbers |= scorer(ready, known, rule)
        except ImportError as error:
            missing[names] = error.name.split(".")[0]
    return numbers, missing


def parts(data, examples, topics):
    """{name: indices of its examples}: all; seen and unseen, where there are such; the topics."""
    of_topic = {}
    for i, example in enumerate(examples):
        of_topic.setdefault(example.topic, []).append(i)
    found = {"all": list(range(len(examples)))}
    seen = (tasks.WEBNLG_SEEN if data == "webnlg" else
            set(world.TRAIN_KINDS) if data in tasks.WORLDS else None)
    if seen is not None:
        for name, inside in (("seen", True), ("unseen", False)):
            found[name] = [i for i, e in enumerate(examples) if (e.topic in seen) == inside]
    if topics:
        found |= {topic or "no topic": rows for topic, rows in sorted(of_topic.items())}
    return {name: rows for name, rows in found.items() if rows}


def table(scores):
    """The scores of every part as lines of text, a column each."""
    columns = list(dict.fromkeys(name for numbers in scores.values() for name in numbers))
    width = max(map(len, scores)) + 2
    lines = [" " * width + "tables".rjust(7) + "".join(c.rjust(max(8, len(c) + 2)) for c in columns
                                                       if c != "tables")]
    for part, numbers in scores.items():
        cells = (f"{numbers[c]:.2f}" if c in numbers else "-" for c in columns if c != "tables")
        lines.append(part.ljust(width) + str(numbers["tables"]).rjust(7)
                     + "".join(cell.rjust(max(8, len(c) + 2)) for cell, c in
                               zip(cells, (c for c in columns if c != "tables"))))
    return "\n".join(lines)


def main(argv=None):
    settings = parse(Settings, argv, "Decode a split of a data set, and score it.")
    if not settings.run:
        raise ValueError("got no --run; expected the directory of one; `python evaluate.py --run "
                         "out/NAME`")
    trained = run_settings(settings.run)
    data = settings.data or trained["data"]
    examples = tasks.load(data, settings.split, settings.data_dir or trained["data_dir"] or None)
    examples = examples[:settings.examples or None]
    speaker = Speaker(Decoding(run=[settings.run], device=settings.device, **{
        name: getattr(settings, name) for name in DECODES}))
    prefix = next(iter(speaker.prefixes.values()))
    mark = hashlib.sha256(b"".join(part.float().cpu().numpy().tobytes()
                                   for part in tensors_of(prefix))).hexdigest()[:16]
    about = {"data": data, "split": settings.split, "prefix": mark,
             "model": speaker.model.fingerprint,        # a fine-tuned run has no prefix
             **{name: getattr(speaker.settings, name) for name in DECODES},
             "dtype": name_of_dtype(speaker.model.wte.weight.dtype)}
    path = Path(settings.run) / f"{settings.split}.jsonl"
    texts = decode(speaker, examples, path, about, settings.batch_size)
    scores, missing = {}, {}
    for part, rows in parts(data, examples, settings.topics).items():
        own, said = [examples[i] for i in rows], [texts[i] for i in rows]
        numbers, without = score(said, [e.targets for e in own], RULES.get(data, Rule()))
        if data in tasks.WORLDS:
            right = (headlines.headline_accuracy if data == "world-headlines" else
                     world.slot_accuracy)
            numbers |= {"slots": 100 * right(own, said),
                        "exact": 100 * world.exact_match(own, said)}
        scores[part], missing = {"tables": len(rows)} | numbers, missing | without
    print(table(scores))
    for names, package in missing.items():
        print(f"{package} is not installed, so there is no {names}", file=sys.stderr)
    with whole_file(path.with_suffix(".scores.json"), "w") as file:
        json.dump(about | {"scores": scores}, file, indent=1)
    print(f"texts in {path}, scores in {path.with_suffix('.scores.json')}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
