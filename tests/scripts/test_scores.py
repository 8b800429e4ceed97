"""Scores come from others' packages: what they get, and what happens where one of them fails."""
import dataclasses
import importlib
import math
import random
import re
import shutil
import sys
import tempfile
import time

import pytest

from data import tasks
from scripts import scores

# e2e-metrics on its own example; NIST is that of its Python form (7.8212 in Perl).
OFFICIAL = {"BLEU": (72.03, 0.005), "NIST": (7.7889, 5e-5), "ROUGE-L": (79.10, 0.005),
            "CIDEr": (2.304, 0.0005)}


def need(*packages):
    for package in packages:
        pytest.importorskip(package, reason=f"a score needs it: pip install {package}")


@pytest.fixture(scope="module")
def example(real_data):
    """The official scorer's own texts and references."""
    folder = real_data / "metrics" / "e2e"
    if not folder.is_dir():
        pytest.skip("put e2e-metrics' example-inputs into metrics/e2e/ of the data to run this")
    texts = (folder / "e2e_example.out.txt").read_text("utf-8").splitlines()
    blocks = (folder / "e2e_example.ref.txt").read_text("utf-8").strip().split("\n\n")
    return texts, [block.splitlines() for block in blocks]


def test_the_official_example_has_its_official_scores(example, monkeypatch):
    """BLEU, NIST, ROUGE-L and CIDEr to the digits that are published.

    Would catch: another case or tokenisation, references in the wrong place or left out, NIST of
    one reference only.
    """
    need("sacrebleu")
    monkeypatch.delitem(scores.SCORERS, "METEOR")     # takes half a minute to start
    numbers, missing = scores.score(*example, scores.RULES["e2e"])
    for name, (official, tolerance) in OFFICIAL.items():
        if name in numbers:
            assert abs(numbers[name] - official) < tolerance, name
    assert {"BLEU", "NIST"} <= numbers.keys()
    if "CIDEr" in missing:
        pytest.skip("BLEU and NIST were compared; for ROUGE-L and CIDEr install pycocoevalcap and "
                    "Java")
    assert OFFICIAL.keys() <= numbers.keys()


def multi_bleu(outputs, references):
    """What multi-bleu.perl counts, slowly, from words: a line of each reference file may be empty.
    """
    correct, total, said, wanted = [0] * 5, [0] * 5, 0, 0
    for words, some in zip(outputs, references):
        said += len(words)
        distances = [(abs(len(words) - len(reference)), len(reference)) for reference in some]
        wanted += min(distances)[1]                     # of two as close the shorter
        for n in range(1, 5):
            grams = [words[i:i + n] for i in range(len(words) - n + 1)]
            for gram in {tuple(gram) for gram in grams}:
                count = grams.count(list(gram))
                most = max(sum(reference[i:i + n] == list(gram) for i in range(len(reference)))
                           for reference in some)
                total[n] += count
                correct[n] += min(count, most)
    if not wanted or not all(correct[1:]):
        return 0.0
    penalty = math.exp(1 - wanted / said) if said < wanted else 1
    return 100 * penalty * math.prod(correct[n] / total[n] for n in range(1, 5)) ** 0.25


def test_a_missing_reference_is_an_empty_line_of_multi_bleu():
    """1,000 random cases. Would catch: a brevity penalty from the references that are there only,
    which scores DART's leaderboard a point too low.
    """
    need("sacrebleu")
    rng, above, penalised = random.Random(5), 0, 0
    for _ in range(1000):
        def some_words(most):
            return [rng.choice("abc") for _ in range(rng.randint(1, most))]
        references = [[some_words(20) for _ in range(rng.randint(1, 3))]
                      for _ in range(rng.randint(1, 3))]
        outputs = [some_words(12) if rng.random() < 0.5 else some[0][:rng.randint(1, 20)]
                   for some in references]
        whole = [some + [[]] * (3 - len(some)) for some in references]
        bleu = scores.sacrebleu_scores(
            [" ".join(words) for words in outputs],
            [[" ".join(words) for words in some] for some in references], scores.RULES["dart"],
            ["BLEU"])["BLEU"]
        expected = multi_bleu(outputs, whole)
        assert bleu == pytest.approx(expected, abs=1e-9), (outputs, references)
        above += expected > 0
        penalised += abs(expected - multi_bleu(outputs, references)) > 1
    assert above > 300 and penalised > 100      # the cases are such that it matters


def test_a_text_shorter_than_half_of_its_only_reference_is_no_penalty_on_dart():
    """18 words are said; the closest lengths are 0 and 10. chrF and TER leave missing ones out."""
    need("sacrebleu")
    words = [f"w{i}" for i in range(20)]
    texts = [" ".join(words[:8]), " ".join(words[10:])]
    references = [[" ".join(words)], [" ".join(words[10:])] * 3]
    dart, plain = (scores.sacrebleu_scores(texts, references, rule) for rule in (
        scores.RULES["dart"], dataclasses.replace(scores.RULES["dart"], empty_lines=False)))
    assert dart["BLEU"] == pytest.approx(100) and plain["BLEU"] < 60
    assert (dart["chrF"], dart["TER"]) == (plain["chrF"], plain["TER"])


def test_nist_weighs_what_is_rare_and_counts_all_references():
    """By hand: a of 8 words 4 times, b 2 times; "a b" twice after 4 times "a".

    Would catch: matches with one reference only, weights of a single reference, no penalty for
    half of the words, a text of one word that divides by zero.
    """
    need("sacrebleu")
    rule, references = scores.Rule(tokenize="none"), [["a b a c", "a b a d"]]
    info = {"a": 1, "b": 2, "c": 3, "d": 3}                         # log2(8 / how often)
    whole = scores.nist_score(["a c a d"], references, rule)["NIST"]
    # a, c, a, d; of "a c", "c a", "a d" the first and the last: once of 4 times a
    assert whole == pytest.approx((info["a"] * 2 + info["c"] + info["d"]) / 4 + (2 + 2) / 3)
    half = scores.nist_score(["a b"], references, rule)["NIST"]
    factor = 0.5 ** (math.log(0.5) / math.log(2 / 3)) ** 2
    assert half == pytest.approx(factor * ((info["a"] + info["b"]) / 2 + 1))    # b: 2 of 4 times
    assert scores.nist_score(["c"], references, rule)["NIST"] > 0
    assert scores.nist_score([""], references, rule)["NIST"] == 0
    with pytest.raises(ValueError, match="no reference has a word"):
        scores.nist_score(["a"], [["", " "]], rule)


def test_webnlg_is_scored_on_lower_cased_ascii_words_and_three_references():
    """Would catch: an accent, a capital or a fourth reference that decides."""
    need("sacrebleu", "unidecode")
    rule = scores.RULES["webnlg"]
    assert scores.prepare("José's  (Café)", rule) == "jose ' s ( cafe )"
    assert scores.prepare("José's", scores.RULES["dart"]) == "josé ' s"
    wrong = "nothing of this fits at all"
    text, same = ["Ålesund lies in Norway, (Europe)"], "alesund lies in norway , ( europe )"
    for references, bleu in (([wrong, wrong, same], 100), ([wrong, wrong, wrong, same], 0)):
        numbers = scores.sacrebleu_scores(
            [scores.prepare(t, rule) for t in text],
            [[scores.prepare(r, rule) for r in references[:rule.references]]], rule)
        assert abs(numbers["BLEU"] - bleu) < 1e-9


def test_the_best_of_several_references_counts():
    """Would catch: only the first reference compared, or a text with another's references."""
    need("sacrebleu", "rouge_score")
    texts = ["the red ship sails today", "a small bridge was built here"]
    references = [["something else is here", texts[0], "no"], [texts[1]]]
    assert scores.sacrebleu_scores(texts, references, scores.Rule())["BLEU"] > 99.99
    assert scores.rouge_scores(texts, references, scores.Rule())["R-2"] > 99.99
    swapped = scores.sacrebleu_scores(texts, references[::-1], scores.Rule())
    assert swapped["BLEU"] < 5


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\u2028"])
def test_a_line_break_in_a_reference_moves_no_other(line_break):
    """Would catch: a tokenizer that takes each line for a text, and all later ones for others."""
    need("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("METEOR, ROUGE-L and CIDEr need Java")
    texts = ["the cat sat on the mat", "a dog ran over the hill"]
    references = [[f"the cat sat{line_break}on the mat"], ["a dog ran over the hill"]]
    both = scores.treebank(texts, references, scores.Rule())
    assert both == 2 * [{0: [texts[0]], 1: [texts[1]]}]


def test_dialogsum_is_the_mean_over_references_and_scitldr_the_one_with_the_best_r1():
    """Would catch: figures that are 6 points above what they are compared with."""
    need("rouge_score")
    text, some = "a b c d", ["a c b e d", "a b x y", "z"]
    # R-1 8/9, 1/2, 0; R-2 0, 1/3, 0; R-L 2/3, 1/2, 0
    expected = {"dialogsum": (25 / 54, 1 / 9, 7 / 18), "scitldr": (8 / 9, 0, 2 / 3),
                "xsum": (8 / 9, 1 / 3, 2 / 3)}
    for data, numbers in expected.items():
        found = scores.rouge_scores([text], [some], scores.RULES.get(data, scores.DEFAULT))
        assert list(found) == ["R-1", "R-2", "R-L"]
        assert list(found.values()) == pytest.approx([100 * number for number in numbers]), data


@pytest.mark.parametrize("data, expected", [("dialogsum", (53.38, 26.76, 45.15)),
                                            ("scitldr", (32.56, 9.85, 24.12))])
def test_people_score_each_other_as_published(real_data, data, expected):
    """The first person's summary against the others'; DialogSum's paper: 53.35 and 26.72."""
    need("rouge_score")
    examples = tasks.load(data, "test", real_data)
    found = scores.rouge_scores([e.targets[0] for e in examples], [e.targets[1:] for e in examples],
                                scores.RULES[data])
    assert tuple(round(number, 2) for number in found.values()) == expected


def only(monkeypatch, *names):
    """Leave the other scorers out."""
    monkeypatch.setattr(scores, "SCORERS", {name: scores.SCORERS[name] for name in names})


def test_rouge_score_is_not_asked_about_letters_that_it_does_not_know(monkeypatch):
    """Would catch: 0.00 for a text that equals its reference; an accent that counts as foreign."""
    need("rouge_score")
    only(monkeypatch, "R-1 R-2 R-L")
    for text in ("我喜欢猫", "Жил-был кот 3", "\U0001F600", "..."):
        numbers, missing = scores.score([text], [[text]])
        assert not numbers and "knows the letters a to z" in missing["R-1"] == missing["R-L"]
    for text in ("Ça a été réglé à Besançon", "42"):
        assert scores.rouge_scores([text], [[text]], scores.DEFAULT)["R-1"] > 99.99


def test_a_missing_package_is_named_and_the_others_are_shown(monkeypatch):
    """Would catch: an evaluation that ends after hours of decoding for want of one package."""
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)             # no Java
    texts = ["the red ship sails from the port today"]
    numbers, missing = scores.score(texts, [texts])
    assert missing["R-L"] == "rouge_score is not installed; `pip install rouge_score`"
    assert "R-L" not in numbers
    assert re.fullmatch("(java is not installed, which pycocoevalcap needs; |pycocoevalcap is not "
                        "installed; `pip install pycocoevalcap`, and )install a Java runtime, .*",
                        missing["METEOR"])
    assert missing["METEOR"] == missing["ROUGE-L"] == missing["CIDEr"]
    assert "METEOR" not in numbers
    need("sacrebleu")
    assert numbers["BLEU"] > 99.99


def test_whatever_one_scorer_does_the_others_are_shown(monkeypatch, tmp_path):
    """Would catch: an exception of another's package, a number that is none, in place of a table.
    """
    def fails(*_):
        raise ZeroDivisionError("division by zero")
    broken = tmp_path / "broken_package.py"
    broken.write_text("raise ImportError('libx.so.6: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(scores, "SCORERS", {
        "A B": fails, "C": lambda *_: importlib.import_module("broken_package"),
        "D": lambda *_: {"D": float("nan")}, "E": lambda *_: {"E": 1.0}})
    numbers, missing = scores.score(["a"], [["a"]])
    assert numbers == {"E": 1.0}
    assert missing["A"] == missing["B"] == "ZeroDivisionError division by zero"
    assert "cannot open shared object file" in missing["C"] and "nan" in missing["D"]


def test_references_without_a_word_cost_only_the_scores_that_need_one():
    """Emoji, and a blank. Would catch: CIDEr's maximum of nothing, NIST's division by no length."""
    need("sacrebleu", "pycocoevalcap")
    for reference, data in (("\U0001F600", ""), ("", "webnlg")):
        if data:
            need("unidecode")
        numbers, missing = scores.score(["there is a bridge in town"], [[reference]],
                                        scores.RULES.get(data, scores.DEFAULT))
        assert {"BLEU", "chrF", "TER"} <= numbers.keys() and "CIDEr" in missing
        assert ("NIST" in numbers) == (reference != "")


# ---- Java, a helper that is not trusted

@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a shell script in Java's place, for the three scores that may ask for it."""
    need("pycocoevalcap")
    only(monkeypatch, "METEOR", "ROUGE-L", "CIDEr")
    scores.treebank_lines.cache_clear()

    def put(script, start=scores.START):
        path = tmp_path / f"bin{len(list(tmp_path.iterdir()))}" / "java"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(shutil, "which", lambda name: str(path))
        monkeypatch.setattr(scores, "START", start)
    return put


def test_a_java_that_does_not_work_is_named(fake_java):
    """Would catch: a wait without end, a word of Java's taken for a score, a reason left out."""
    texts, words = ["the cat sat on the mat"], ["the", "cat"]
    for script, why in (
            ("echo 'Could not reserve enough space for object heap'; exit 1", "enough space"),
            ("echo 'no JVM found' >&2; exit 1", "no JVM found"),
            ("exit 0", "java failed"),
            ("echo hello; echo hello; cat > /dev/null", "'hello"),
            ("while read line; do echo 0,5; done", "'0,5")):
        fake_java(script)
        numbers, missing = scores.score(texts, [texts], scores.RULES["dart"])
        assert why in missing["METEOR"], script
        assert numbers["ROUGE-L"] > 99.99                   # DART's texts are cut without Java
    fake_java("exit 1")
    with pytest.raises(OSError, match="0 lines for 2 texts, exit status 1"):
        scores.treebank([" ".join(words)], [[" ".join(words)]], scores.DEFAULT)


@pytest.mark.parametrize("script", ["sleep 300", "while :; do echo x >&2; done"])
def test_nothing_waits_for_java_without_a_limit(fake_java, script):
    """Would catch: an evaluation that never ends, a process left behind that holds the pipes, a
    second wait for what did not answer once.
    """
    fake_java(script, start=0.2)
    texts, began = ["the cat sat on the mat"], time.monotonic()
    _, missing = scores.score(texts, [texts])
    assert "java took more than 0 s" == missing["METEOR"]
    assert missing["ROUGE-L"] == missing["CIDEr"] == "java took too long before"
    assert time.monotonic() - began < 60          # of 300


def test_meteor_speaks_english_with_java(fake_java):
    """Would catch: 0,5 from a Java in German, and from one in English in Germany, which METEOR
    itself cannot read.
    """
    fake_java('case "$*" in *-Duser.language=en*-Duser.country=US*) point=. ;; *) point=, ;; esac\n'
              'while read line; do case $line in\nEVAL*) echo 1.0; echo 0.5; echo 0${point}75;;\n'
              "*) echo 3.0 0${point}5;;\nesac; done")
    texts = ["the cat sat", "a dog"]
    found = scores.meteor_score(texts, [[text] for text in texts], scores.RULES["dart"])
    assert found == {"METEOR": 75.0}


def test_no_folder_of_packages_is_written_to(monkeypatch):
    """Would catch: packages that root has installed and a user cannot score with."""
    need("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("the Penn Treebank's tokenizer needs Java")
    scores.treebank_lines.cache_clear()
    real = tempfile.mkdtemp

    def elsewhere(suffix=None, prefix=None, dir=None):
        assert dir is None
        return real(suffix, prefix, dir)
    monkeypatch.setattr(tempfile, "mkdtemp", elsewhere)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", None)
    assert scores.treebank(["A cat."], [["A dog!"]], scores.DEFAULT) == [{0: ["a cat"]},
                                                                        {0: ["a dog"]}]


@pytest.mark.slow
def test_meteor_is_that_of_its_makers_in_any_language(example, monkeypatch):
    """Would catch: another protocol than pycocoevalcap's Meteor, a country's decimal comma."""
    need("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("METEOR needs Java")
    from pycocoevalcap.meteor.meteor import Meteor
    outputs, references = scores.treebank(*example, scores.RULES["e2e"])
    theirs = 100 * Meteor().compute_score(references, outputs)[0]
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    assert scores.meteor_score(*example, scores.RULES["e2e"]) == {"METEOR": theirs}


def test_words_are_compared_by_their_stems():
    """Would catch: rouge-score without its stemmer, a mean over something else than the texts."""
    need("rouge_score")
    found = scores.rouge_scores(["the ships sail", "a b", "c"],
                                [["the ship sailed"], ["x"], ["y"]], scores.Rule())
    assert found["R-1"] == pytest.approx(100 / 3)
