"""Summarising: XSum in both forms and by topic, DialogSum, SciTLDR, the world's headlines."""
import json
import random
import re

import pytest

from data import summaries
from data.example import Example
from data.tasks import load
from data.toy_world import headlines
from data.toy_world.tables import SPLITS, task
from data.toy_world.text import document
from data.toy_world.words import TRAIN_KINDS, UNSEEN_KINDS

PAGE = "http://web.archive.org/web/2015id_/http://www.bbc.co.uk/"
ARTICLES = {    # number: address, first sentence, the rest, split
    "11": ("news/world-europe-11", "A  treaty is signed.",
           "It was late.\nShare this with\nAll left.", "train"),
    "12": ("sport/0/football/12", "A cup is won.", "By two goals.", "train"),
    "13": ("news/health-13", "A cure is found.", "In a cellar.", "train"),
    "14": ("news/uk-england-14", "A road is closed.", "For a week.", "validation"),
    "15": ("sport/tennis/15", "A match is lost.", "In three sets.", "test"),
    "16": ("news/business-16", "A firm is sold.", "For a pound.", "test"),
    "17": ("news/technology-17", "A phone is shown.", "It folds.", "test"),
    "18": ("news/10384118", "A page without a topic.", "It is old.", "test"),
    "19": ("news/world-19", "An empty page.", "Email\nTwitter", "test"),
}


@pytest.fixture
def release(tmp_path):
    """The official release in small: a file an article, and one with the splits."""
    (tmp_path / "xsum" / "bbc-summary-data").mkdir(parents=True)
    splits = {"train": [], "validation": [], "test": []}
    for number, (address, first, rest, split) in ARTICLES.items():
        splits[split].append(number)
        (tmp_path / "xsum" / "bbc-summary-data" / f"{number}.summary").write_text(
            f"[SN]URL[SN]\n{PAGE}{address}\n\n[SN]TITLE[SN]\nBBC\n\n[SN]FIRST-SENTENCE[SN]\n"
            f"{first}\n\n[SN]RESTBODY[SN]\n{rest}\n")
    (tmp_path / "xsum" / summaries.XSUM_SPLITS).write_text(json.dumps(splits))
    return tmp_path


def test_an_article_of_the_release_is_its_body_and_its_first_sentence(release):
    """Would catch: the summary left in the article, the buttons of the page read as news."""
    first = load("xsum", "train", release)[0]
    assert first == Example("It was late. All left.", ("A treaty is signed.",), "news/world")
    assert [e.topic for e in load("xsum", "dev", release)] == ["news/uk"]
    assert len(load("xsum", "test", release)) == 4          # the empty page is left out


@pytest.mark.parametrize("name, split, topics", [
    ("xsum-news-to-sports", "train", ["news/world", "news/health"]),
    ("xsum-news-to-sports", "dev", ["news/uk"]),
    ("xsum-news-to-sports", "test", ["sport/tennis"]),
    ("xsum-within-news", "train", ["news/world"]),
    ("xsum-within-news", "dev", ["news/uk"]),
    ("xsum-within-news", "test", ["news/technology"])])
def test_extrapolation_is_tested_on_topics_that_training_never_saw(release, name, split, topics):
    """Would catch: sports in training, business in the test, a page without a topic on a side."""
    assert [e.topic for e in load(name, split, release)] == topics


def test_the_usual_pairs_of_files_are_read_line_by_line(tmp_path):
    """Would catch: lines that shift against each other at a blank article or a line separator."""
    (tmp_path / "val.source").write_text("One\u2028 two.\n\nThree.\n")
    (tmp_path / "val.target").write_text("A.\nB.\nC.\n")
    dev = load("xsum", "dev", tmp_path)
    assert dev == [Example("One two.", ("A.",)), Example("Three.", ("C.",))]
    with pytest.raises(ValueError, match="has no addresses; expected XSum-TRAINING-DEV-TEST"):
        load("xsum-within-news", "dev", tmp_path)
    (tmp_path / "val.target").write_text("A.\nB.\n")
    with pytest.raises(ValueError, match="got 3 lines in .*val.source and 2 in .*, expected as"):
        load("xsum", "dev", tmp_path)


def test_a_release_that_is_damaged_is_named(release):
    """Would catch: a traceback, or an article that is silently missing from the paper's data."""
    with pytest.raises(ValueError, match="got --data xsum without --data-dir.*from http"):
        load("xsum", "train")
    article = release / "xsum" / "bbc-summary-data" / "11.summary"
    article.write_text("[SN]URL[SN]\nx\n")
    with pytest.raises(ValueError, match="11.summary: got the sections URL, expected"):
        load("xsum", "train", release)
    article.unlink()
    with pytest.raises(ValueError, match="got no .*11.summary, expected every article"):
        load("xsum", "train", release)
    (release / "xsum" / summaries.XSUM_SPLITS).write_text('{"train": 3}')
    with pytest.raises(ValueError, match="got no list 'train'"):
        load("xsum", "train", release)
    (release / "xsum" / summaries.XSUM_SPLITS).unlink()
    with pytest.raises(ValueError, match="got no xsum train file in .*, expected XSum-TRAINING"):
        load("xsum", "train", release)


def test_dialogues_and_abstracts_become_one_line(tmp_path):
    """Would catch: line breaks that cut a source in a file of lines, references that are lost."""
    row = {"fname": "t0", "dialogue": "#Person1#: Hi.\n#Person2#: Hello.", "topic1": "greeting",
           "summary1": "They greet.", "summary2": "A\ngreeting.", "summary3": "Hi."}
    (tmp_path / "dialogsum.test.jsonl").write_text(json.dumps(row))
    assert load("dialogsum", "test", tmp_path) == [Example(
        "#Person1#: Hi. #Person2#: Hello.", ("They greet.", "A greeting.", "Hi."), "greeting")]
    (tmp_path / "SciTLDR-A").mkdir()
    rows = [{"source": ["We do.\n", "It works."], "target": ["It works. ", " "]},
            {"source": [], "target": ["Nothing."]}]
    (tmp_path / "SciTLDR-A" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load("scitldr", "dev", tmp_path) == [Example("We do. It works.", ("It works.",))]
    for name, text, words in (("dialogsum", '{"dialogue": "x"}', "line 1: got no target"),
                             ("scitldr", '{"source": "x"}', r"line 1: got the keys \['source'\]")):
        file = {"dialogsum": "dialogsum.test.jsonl", "scitldr": "SciTLDR-A/test.jsonl"}[name]
        (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=words):
            load(name, "test", tmp_path)


@pytest.mark.parametrize("name, split, examples, targets", [
    ("dialogsum", "train", 12460, 12460), ("dialogsum", "dev", 500, 500),
    ("dialogsum", "test", 500, 1500), ("scitldr", "train", 1992, 1992),
    ("scitldr", "dev", 619, 1453), ("scitldr", "test", 618, 1967)])
def test_the_official_files_have_the_published_counts(real_data, name, split, examples, targets):
    """Would catch: rows lost to a key of another release."""
    found = load(name, split, real_data)
    assert (len(found), sum(len(e.targets) for e in found)) == (examples, targets)


# ---- headlines of the micro-world

def test_a_headline_says_name_kind_and_the_first_two_facts():
    """Would catch: a headline that cannot be read off its report."""
    for example in headlines.task("train", 200):
        name, kind, facts = re.fullmatch(r"(\w+), a (\w+): (.+; .+)",
                                         example.targets[0]).groups()
        assert kind == example.topic and name in example.source
        assert all(value in example.source for value in headlines.VALUE.findall(facts))


def test_pre_training_never_shows_a_headline():
    """Would catch: a leak: a model that already writes headlines needs no prefix."""
    rng = random.Random(3)
    texts = [part.replace("{", "").replace("}", "") for _ in range(2000) for part in document(rng)]
    assert not any(re.search(r", a \w+: |\w; \w+ing ", text) for text in texts)


def test_other_things_are_named_in_front_or_behind_only():
    """Would catch: a report in which "It" comes to mean the wrong thing."""
    other = re.compile("|".join(re.escape(text).replace(r"\{0\}", r"\w+").replace(r"\{1\}", r"\w+")
                                for text in headlines.OTHERS))
    for example in headlines.task("train", 300):
        sentences = re.split(r"(?<=\.) ", example.source)
        kinds = ["other" if other.fullmatch(s) else "chatter" if s in headlines.CHATTER
                 else "fact" for s in sentences]
        facts = [n for n, kind in enumerate(kinds) if kind == "fact"]
        assert facts and 1 <= len(kinds) - len(facts) <= 3
        assert "other" not in kinds[facts[0]:facts[-1]]


def test_the_splits_are_those_of_the_tables():
    """Would catch: names or kinds of the test that training has seen."""
    for split in ("train", "dev", "test-seen", "test-unseen"):
        assert len(headlines.task(split)) == SPLITS[split][2]
    names = {split: {e.targets[0].split(",")[0] for e in headlines.task(split)}
             for split in ("train", "dev", "test-seen")}
    assert not names["train"] & names["dev"] and not names["train"] & names["test-seen"]
    assert {e.topic for e in headlines.task("train")} <= set(TRAIN_KINDS)
    assert {e.topic for e in headlines.task("test-unseen")} <= set(UNSEEN_KINDS)
    assert headlines.task("dev") == headlines.task("dev") != headlines.task("dev", seed=1)
    with pytest.raises(ValueError, match="got split 'tset'"):
        headlines.task("tset")


def test_headlines_are_scored_by_their_values():
    """Would catch: a score that is pleased with half of the facts, or with one fact too many."""
    examples = headlines.task("dev", 20)
    right = [e.targets[0] for e in examples]
    assert headlines.headline_accuracy(examples, right) == 1
    assert headlines.headline_accuracy(examples, [text.split(";")[0] for text in right]) == 0
    assert headlines.headline_accuracy(examples, [f"{text} in Margate" for text in right]) == 0
    assert headlines.headline_accuracy(examples, right[1:] + right[:1]) == 0
    tables = [e.source for e in task("near", "dev", 5)]
    assert headlines.headline_accuracy(examples[:5], tables) == 0
