"""Summarising in the invented world: a report with facts and chatter in, one headline out.

A report has all facts of one thing, in sentences as in pre-training, with chatter before, between
and after: sentences about nothing, and sentences about something else. Its headline has name, kind
and the first two facts of the report, in a notation that pre-training never has: `Rudibis, a
bridge: opened in 1919; crossing the Doreka`. Splits, kinds and names as in tables.py.
"""
import random

from data.example import Example
from data.toy_world.tables import SPLITS, VALUE
from data.toy_world.text import prose
from data.toy_world.words import KINDS, make_name, make_thing, verbalize

# Sentences that tell nothing of the thing. "{0}" and "{1}" are another thing and its kind.
CHATTER = ("Good morning.", "It was a quiet week.", "People talk about it.", "We asked around.",
           "More about this tomorrow.", "Nobody was surprised.", "So much for today.",
           "This is what we know.", "There is more to say.", "Some of it is old news.")
OTHERS = ("Last week we wrote about {0}, the {1}.", "Some prefer {0}, another {1}.",
          "It has nothing to do with {0}, a {1}.", "The {1} {0} is not meant.")


def chatter(groups, rng):
    """One sentence beside the point."""
    if rng.random() < 0.7:
        return rng.choice(CHATTER)
    return rng.choice(OTHERS).format(make_name("thing", groups, rng), rng.choice(list(KINDS)))


def report(thing, groups, rng):
    """Prose on `thing` with one to three sentences of chatter among its sentences."""
    sentences = prose(thing, rng).split(". ")
    sentences = [sentence.removesuffix(".") + "." for sentence in sentences]
    for _ in range(rng.randint(1, 3)):
        # A sentence with "It" must keep its subject: another thing is named in front or behind.
        new = chatter(groups, rng)
        ends = (0, len(sentences)) if "," in new or "meant" in new else range(len(sentences) + 1)
        sentences.insert(rng.choice(list(ends)), new)
    return " ".join(sentences)


def headline(thing, rng):
    facts = [verbalize(fact, rng, (1, 0, 0))[1] for fact in thing.facts[:2]]
    return f"{thing.name}, a {thing.kind}: {'; '.join(facts)}"


def task(split="train", size=None, seed=0):
    """The reports of a split, each with its one headline; the topic is the kind.

    size: how many, from the start of the split (None: all). Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"got split {split!r}; expected one of {', '.join(SPLITS)}; choose one")
    kinds, groups, full = SPLITS[split]
    rng, examples = random.Random(f"headlines {split} {seed}"), []
    for _ in range(full if size is None else size):
        thing = make_thing(list(kinds), groups, 3, rng)
        examples.append(Example(report(thing, groups, rng), (headline(thing, rng),), thing.kind))
    return examples


def headline_accuracy(examples, outputs):
    """Share of the outputs with the values of the right headline, in any words, and no other value
    of the world.
    """
    pairs = list(zip(examples, outputs, strict=True))
    return sum(sorted(VALUE.findall(text)) == sorted(VALUE.findall(e.targets[0]))
               for e, text in pairs) / len(pairs)
