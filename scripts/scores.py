"""Scores of texts, as the official script of each data set computes them (Li & Liang 2021, 5.2).

They come from well-kept packages and none of them is written here; one that is not installed is
named, and its scores are left out. Not here: decoding, and which texts are scored together
(evaluate.py), the scores of the invented world (data/toy_world/tables.py).
"""
import dataclasses
import itertools
import re
import shutil


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a data set's official script reads outputs and references."""
    references: int = 100           # so many of them count, the first ones
    tokenize: str = "13a"           # sacrebleu's word for how text is cut into tokens
    lowercase: bool = False
    smooth: str = "exp"             # what an n-gram order without a match counts
    split: bool = False             # before all else, a blank around every sign
    ascii: bool = False             # and no accents


DEFAULT = Rule()
# E2E: e2e-metrics, mteval-13a. The others: multi-bleu.perl, on what stands between blanks; without
# a match its score is 0. DART's published reference files are split and lower-cased; outputs have
# to be as well.
MULTI_BLEU = Rule(3, "none", lowercase=True, smooth="none", split=True)
RULES = {"e2e": Rule(lowercase=True), "dart": MULTI_BLEU,
         "webnlg": dataclasses.replace(MULTI_BLEU, ascii=True)}


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
    streams = [list(stream) for stream in itertools.zip_longest(*references)]   # None: has no more
    options = {"BLEU": dict(tokenize=rule.tokenize, smooth_method=rule.smooth, force=True)}
    found = (getattr(metrics, name)(**options.get(name, {})).corpus_score(outputs, streams)
             for name in names)
    return {score.name.removesuffix("2"): score.score for score in found}


def nltk_scores(outputs, references, rule):
    """NIST over up to 5-grams. nltk counts, for each order, the matches with the one reference that
    fits best; mteval counts those with all references together, so its number is higher.
    """
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    cut = Tokenizer13a() if rule.tokenize == "13a" else str
    outputs = [cut(text).split() for text in outputs]
    if not any(len(text) >= 5 for text in outputs):
        return {}                                   # nltk divides by the number of 5-grams
    return {"NIST": corpus_nist([[cut(r).split() for r in some] for some in references], outputs)}


def treebank(outputs, references, rule):
    """Both as pycocoevalcap's scorers take them, {number: [text, ...]}: in the Penn Treebank's
    tokens, lower-cased, without punctuation, where the rule has not cut them already.
    """
    if not shutil.which("java"):
        raise ImportError("java", name="java")
    # On one line: the tokenizer takes every line for a text of its own, whatever breaks it.
    both = [{i: [" ".join(text.split()) for text in some] for i, some in enumerate(texts)}
            for texts in ([[text] for text in outputs], references)]
    if rule.split:
        return both
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    return [PTBTokenizer().tokenize({i: [{"caption": text} for text in some]
                                     for i, some in texts.items()}) for texts in both]


def coco_scores(outputs, references, rule):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    outputs, references = treebank(outputs, references, rule)
    return {"ROUGE-L": 100 * float(Rouge().compute_score(references, outputs)[0]),
            "CIDEr": float(Cider().compute_score(references, outputs)[0])}


def meteor_scores(outputs, references, rule):
    from pycocoevalcap.meteor.meteor import Meteor
    outputs, references = treebank(outputs, references, rule)
    return {"METEOR": 100 * Meteor().compute_score(references, outputs)[0]}


def rouge_scores(outputs, references, rule):
    """For summaries: F of stemmed words, of the reference that fits best, averaged over outputs."""
    from rouge_score.rouge_scorer import RougeScorer
    kinds = {"rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L"}
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    found = [scorer.score_multi(list(some), text) for text, some in zip(outputs, references)]
    return {name: 100 * sum(f[kind].fmeasure for f in found) / len(found)
            for kind, name in kinds.items()}


SCORERS = {"BLEU, chrF and TER": sacrebleu_scores, "NIST": nltk_scores, "METEOR": meteor_scores,
           "ROUGE-L and CIDEr": coco_scores, "R-1, R-2 and R-L": rouge_scores}


def score(outputs, references, rule=DEFAULT):
    """({name: number}, {scores that are left out: the package that is missing}).

    outputs: a list of texts; references: a list of texts for each.
    """
    numbers, missing = {}, {}
    try:
        outputs = [prepare(text, rule) for text in outputs]
        references = [[prepare(r, rule) for r in some[:rule.references]] for some in references]
    except ImportError as error:
        return {}, {"all scores of this data set": error.name}
    for names, scorer in SCORERS.items():
        try:
            numbers |= scorer(outputs, references, rule)
        except ImportError as error:
            missing[names] = error.name.split(".")[0]
    return numbers, missing
