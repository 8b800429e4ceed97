"""Scores of texts, as the official script of each data set computes them (Li & Liang 2021, 5.2).

They come from well-kept packages, NIST excepted (see there). Others' code fails in ways of its own:
whatever one scorer does, the others' numbers are kept, and no helper process is waited for without
a limit. Not here: decoding, and which texts are scored together (evaluate.py), the scores of the
invented world (data/toy_world/tables.py).
"""
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
from collections import Counter
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a data set's official script reads outputs and references."""
    references: int = 100           # so many of them count, the first ones
    empty_lines: bool = False       # for BLEU, a reference that is missing is one without a word
    tokenize: str = "13a"           # sacrebleu's word for how text is cut into tokens
    lowercase: bool = False
    smooth: str = "exp"             # what an n-gram order without a match counts
    split: bool = False             # first of all, a space around every punctuation mark
    ascii: bool = False             # and no accents
    rouge: str = "best"             # of several references: the best for each of and R-L;
                                    # "mean" of all; "best R-1": the one with that, for all three


DEFAULT = Rule()
# E2E: e2e-metrics, mteval-13a. WebNLG and DART: multi-bleu.perl with three files of references, on
# what stands between blanks; without a match its score is 0. DART's published reference files are
# split and lower-cased; outputs have to be as well. DialogSum: what is published is the mean over
# its three references. SciTLDR: its own script keeps the reference with the best R-1.
MULTI_BLEU = Rule(3, True, "none", lowercase=True, smooth="none", split=True)
RULES = {"e2e": Rule(lowercase=True), "dart": MULTI_BLEU,
         "webnlg": dataclasses.replace(MULTI_BLEU, ascii=True),
         "dialogsum": Rule(rouge="mean"), "scitldr": Rule(rouge="best R-1")}

# Seconds that a Java program may take to start, and for each line of text: some ten times what it
# takes on a busy machine of two cores. After that no answer will come.
START, EACH = 300, 0.1
JAVA = "install a Java runtime, as by `apt-get install default-jre-headless`"


def prepare(text, rule):
    """`text` as the script's first step leaves it."""
    if rule.ascii:
        from unidecode import unidecode
        text = unidecode(text)
    if rule.split:
        text = " ".join(" ".join(re.split(r"(\W)", text)).split())
    return text.lower() if rule.lowercase else text


# ---- each: a list of outputs and a list of references for each -> {name: number}

def sacrebleu_scores(outputs, references, rule, names=("BLEU", "CHRF", "TER")):
    from sacrebleu import metrics
    found = {}
    for name in names:
        metric, some = getattr(metrics, name)(), references
        if name == "BLEU":
            metric = metrics.BLEU(tokenize=rule.tokenize, smooth_method=rule.smooth, force=True)
            if rule.empty_lines:        # their length, 0, may be the closest to the output's
                some = [(*texts, *[""] * (rule.references - len(texts))) for texts in references]
        streams = [list(stream) for stream in itertools.zip_longest(*some)]   # None: has no more
        score = metric.corpus_score(outputs, streams)
        # Where the references' length is 0, multi-bleu says 0, sacrebleu leaves the penalty out.
        found[score.name.removesuffix("2")] = score.score if getattr(score, "ref_len", 1) else 0.0
    return found


def nist_score(outputs, references, rule):
    """NIST over up to 5-grams (Doddington 2002), as mteval-13a computes it.

    By hand, because no package gives the official figure: nltk's counts, for each order, the
    matches with one reference only, which is 1.2 to 1.7 lower and ranks systems otherwise.
    Raises ValueError where no reference has a word.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    cut = Tokenizer13a() if rule.tokenize == "13a" else str

    def ngrams(words):
        return Counter(tuple(words[i:i + n]) for n in range(1, 6)
                       for i in range(len(words) - n + 1))
    counts, gained, said, length = Counter(), [0] * 6, [0] * 6, 0
    references = [[cut(text).split() for text in some] for some in references]
    for words in itertools.chain(*references):
        counts.update(ngrams(words))
        counts[()] += len(words)                # the number of all words, for unigrams
    if not counts[()]:
        raise ValueError("no reference has a word")
    for text, some in zip(outputs, references):
        found, length = ngrams(cut(text).split()), length + statistics.fmean(map(len, some))
        for ngram, count in found.items():
            said[len(ngram)] += count
        # The matches with all references together; rare words, and rare ways to go on, count most.
        for ngram, count in (found & functools.reduce(Counter.__or__, map(ngrams, some))).items():
            gained[len(ngram)] += count * math.log2(counts[ngram[:-1]] / counts[ngram])
    ratio = min(1, said[1] / length)            # two thirds of the words: half of the score
    factor = ratio and math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2)
    return {"NIST": factor * sum(g / s for g, s in zip(gained, said) if s)}


@functools.cache
def late(command):
    """Set once `command` has let us wait: it is not waited for again."""
    return threading.Event()


def java(words, talk, lines):
    """What `talk(process)` returns, for `java WORDS` with text in its two pipes.

    lines: how many it gets, which decides how long it may take. Raises OSError where it fails or
    takes longer; no process and no file is left behind.
    """
    command, limit = shutil.which("java"), START + EACH * lines
    if command is None:
        raise OSError(f"java is not installed, which pycocoevalcap needs; {JAVA}")
    if late(command).is_set():
        raise OSError("java took too long before")
    # Its errors are a file: nobody has to read them while it writes.
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "errors", "w+b") as said:
        # METEOR cannot read its own numbers in a language or a country that writes 0,5.
        process = subprocess.Popen(
            [command, "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", *words],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            encoding="utf-8", start_new_session=True)   # a group of its own, ended as a whole

        def end():
            with contextlib.suppress(OSError):      # it has ended
                os.killpg(process.pid, signal.SIGKILL)
        alarm = threading.Timer(limit, lambda: (late(command).set(), end()))
        alarm.start()
        try:
            return talk(process)
        except (OSError, ValueError) as error:
            end()
            said.seek(0)
            told = [line for line in said.read().decode("utf-8", "replace").splitlines()
                    if line.strip() and not line.lstrip().startswith("at ")]
            raise OSError(f"java took more than {limit:.0f} s" if late(command).is_set() else
                          f"java failed: {'; '.join([str(error), *told[-2:]])}") from error
        finally:
            alarm.cancel()
            end()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()


@functools.lru_cache(maxsize=1)                 # METEOR, ROUGE-L and CIDEr ask for the same
def treebank_lines(texts):
    """The Penn Treebank's tokens of each text, lower-cased, without punctuation, a blank between.

    pycocoevalcap's own PTBTokenizer writes a file into the folder where packages are installed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    def talk(process):
        lines = process.communicate("".join(text + "\n" for text in texts))[0].split("\n")
        if process.returncode or len(lines) != len(texts) + 1:
            raise ValueError(f"{len(lines) - 1} lines for {len(texts)} texts, exit status "
                             f"{process.returncode}: {' '.join(lines)[:100]}")
        return [" ".join(word for word in line.rstrip().split(" ")
                         if word not in ptbtokenizer.PUNCTUATIONS) for line in lines]
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    return java(["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
                 "-lowerCase"], talk, len(texts))


def treebank(outputs, references, rule):
    """Both as pycocoevalcap's scorers take them, {number: [text, ...]}: in the Penn Treebank's
    tokens, where the rule has not cut them already. ValueError where no reference has a token.
    """
    # On one line: the tokenizer takes every line for a text of its own, whatever breaks it.
    both = [{i: [" ".join(text.split()) for text in some] for i, some in enumerate(texts)}
            for texts in ([[text] for text in outputs], references)]
    if not rule.split:
        lines = iter(treebank_lines(tuple(t for texts in both for some in texts.values()
                                          for t in some)))
        both = [{i: [next(lines) for _ in some] for i, some in texts.items()} for texts in both]
    if not any(text for some in both[1].values() for text in some):
        raise ValueError("the Penn Treebank's tokenizer finds no word in any reference")
    return both


def meteor_score(outputs, references, rule):
    """By METEOR's own program. pycocoevalcap's Meteor waits for ever for a Java that has ended."""
    from pycocoevalcap.meteor import meteor
    outputs, references = treebank(outputs, references, rule)

    def talk(process):
        def read():
            line = process.stdout.readline()
            if not re.fullmatch(r"[\d.E -]+\n", line):
                raise ValueError(f"got {line!r}, expected numbers")
            return line.strip()

        def write(*parts):
            with contextlib.suppress(BrokenPipeError):      # its last words are read then
                process.stdin.write(" ||| ".join(parts) + "\n")
                process.stdin.flush()
        counts = []
        for i in outputs:
            write("SCORE", *(" ".join(text.replace("|||", " ").split())
                             for text in (*references[i], *outputs[i])))
            counts.append(read())
        write("EVAL", *counts)
        return float([read() for _ in range(len(counts) + 1)][-1])      # each text's; that of all
    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    return {"METEOR": 100 * java(
        ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"], talk,
        len(outputs) + sum(map(len, references.values())))}


def rouge_l_score(outputs, references, rule):
    from pycocoevalcap.rouge.rouge import Rouge
    outputs, references = treebank(outputs, references, rule)
    return {"ROUGE-L": 100 * float(Rouge().compute_score(references, outputs)[0])}


def cider_score(outputs, references, rule):
    from pycocoevalcap.cider.cider import Cider
    outputs, references = treebank(outputs, references, rule)
    return {"CIDEr": float(Cider().compute_score(references, outputs)[0])}


def rouge_scores(outputs, references, rule):
    """For summaries: F of stemmed words, averaged over outputs; of several references by the rule.

    R-L is rougeL: the text is one sequence of words, whatever its lines; rougeLsum is not here.
    Raises ValueError where most letters of the references are none that rouge-score knows.
    """
    from rouge_score.rouge_scorer import RougeScorer
    letters = [c for some in references for text in some for c in text.lower() if c.isalnum()]
    if 2 * sum(c.isascii() for c in letters) <= len(letters):
        raise ValueError("rouge-score knows the letters a to z and digits only, and the references "
                         + ("have mostly others" if letters else "have none"))
    kinds = {"rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L"}
    scorer = RougeScorer(list(kinds), use_stemmer=True)

    def of_one(text, some):
        found = [[f.fmeasure for f in scorer.score(one, text).values()] for one in some]
        return (max(found, key=lambda three: three[0]) if rule.rouge == "best R-1" else
                map(statistics.fmean if rule.rouge == "mean" else max, zip(*found)))
    sums = map(sum, zip(*map(of_one, outputs, references)))
    return {name: 100 * total / len(outputs) for name, total in zip(kinds.values(), sums)}


SCORERS = {"BLEU": functools.partial(sacrebleu_scores, names=["BLEU"]),
           "chrF": functools.partial(sacrebleu_scores, names=["CHRF"]),
           "TER": functools.partial(sacrebleu_scores, names=["TER"]),
           "NIST": nist_score, "METEOR": meteor_score, "ROUGE-L": rouge_l_score,
           "CIDEr": cider_score, "R-1 R-2 R-L": rouge_scores}


def reason(error):
    """Why a score is not there, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.split(".")[0]
        more = f", and {JAVA}" if name == "pycocoevalcap" and not shutil.which("java") else ""
        return f"{name} is not installed; `pip install {name}`{more}"
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__} "
    return " ".join(f"{kind}{error}".split())[:200] or type(error).__name__


def score(outputs, references, rule=DEFAULT):
    """({name: number}, {name of a score that cannot be had: why}).

    outputs: a list of texts; references: a list of texts for each.
    """
    numbers, missing = {}, {}
    try:
        outputs = [prepare(text, rule) for text in outputs]
        references = [[prepare(r, rule) for r in some[:rule.references]] for some in references]
    except ImportError as error:
        return {}, dict.fromkeys(" ".join(SCORERS).split(), reason(error))
    for names, scorer in SCORERS.items():
        try:
            found = scorer(outputs, references, rule)
            if not all(map(math.isfinite, found.values())):
                raise ValueError(f"{scorer} gives {found}")
            numbers |= found
        except Exception as error:      # others' code; what it did is said, and the rest is shown
            missing |= dict.fromkeys(names.split(), reason(error))
    return numbers, missing
