"""Two tasks on the invented world, and their scores: a table in, one of several possible texts out.

A table is written as in the paper: `name : Belora | kind : ship | cargo : sugar`. "near" asks for a
style that the pre-trained model nearly has (facts in the table's order, but "a ship which ... and
also ..."); "hard" asks for planning that it was never taught (the last facts come first, as
participles in front of the name).
Splits: train, dev and test-seen are of the same kinds; dev-kinds and test-unseen are of kinds that
no training table has. Names in dev and test tables occur nowhere else, not even in pre-training.
Not here: the text for pre-training (text.py).
"""
import random
import re

from data.example import Example
from data.toy_world.words import (
    ATTRIBUTES,
    DEV_KINDS,
    KINDS,
    TRAIN_KINDS,
    UNSEEN_KINDS,
    join_list,
    make_thing,
    verbalize,
)

# split -> kinds, groups of names (see name_group), tables
SPLITS = {"train": (TRAIN_KINDS, range(2, 10), 2000), "dev": (TRAIN_KINDS, (1,), 200),
          "dev-kinds": (DEV_KINDS, (1,), 200), "test-seen": (TRAIN_KINDS, (0,), 200),
          "test-unseen": (UNSEEN_KINDS, (0,), 200)}
STYLES = ("near", "hard")


def linearise(thing):
    return " | ".join(f"{key} : {value}" for key, value in thing.entries())


# ---- the styles. Three writers for each table: writer 0 always uses a fact's usual phrase, 1 and 2
# draw one of its three phrases, and each has its own way of building sentences.

def phrases_of(writer, thing, rng):
    """Every fact in this writer's words: (with a main verb, as a participle)."""
    usual = (1, 0, 0) if writer == 0 else (40, 35, 25)
    return [verbalize(fact, rng, usual) for fact in thing.facts]


def near(thing, writer, rng):
    """`Belora is a ship which carries sugar, sails from Marford and also was built in 1874.`"""
    verbs = [verb for verb, _ in phrases_of(writer, thing, rng)]
    start = f"{thing.name} is a {thing.kind}"
    if writer == 2:
        start = f"There is a {thing.kind} called {thing.name}"
    if writer != 1 or len(verbs) < 4:
        return f"{start} which {join_list(verbs, ' and also ')}."
    half = len(verbs) // 2
    first, second = join_list(verbs[:half], " and also "), join_list(verbs[half:], " and also ")
    return f"{start} which {first}. It {second}."


def hard(thing, writer, rng):
    """`A ship built in 1874 and sailing from Marford, Belora, which carries sugar, is painted red.`

    The last two facts (of writer 1 only the last) come first, the others follow in their order. The
    sentence holds two of these; what is left comes after "It also".
    """
    phrases = phrases_of(writer, thing, rng)
    front = 1 if writer == 1 else 2
    participles = [participle for _, participle in phrases[:-front - 1:-1]]
    verbs = [verb for verb, _ in phrases[:-front]]
    text = f"A {thing.kind} {join_list(participles)}, {thing.name}"
    now, later = verbs[:2], verbs[2:]
    if writer == 0 and len(now) == 2:
        text += f", which {now[0]}, {now[1]}."
    else:
        text += f" {join_list(now)}."
    return f"{text} It also {join_list(later)}." if later else text


def task(style="near", split="train", size=None, seed=0, writers=(0, 1, 2)):
    """The tables of a split with up to three references each; the topic is the kind.

    size: how many tables, from the start of the split (None: all of them, see SPLITS). writers:
    whose references; with the first one alone a reference is a function of its table.
    Both styles share their tables. Raises ValueError for a style or split that does not exist.
    """
    if style not in STYLES or split not in SPLITS:
        raise ValueError(f"got style {style!r} and split {split!r}; expected one of "
                         f"{', '.join(STYLES)} and one of {', '.join(SPLITS)}; choose from these")
    kinds, groups, full = SPLITS[split]
    tables = random.Random(f"tables {split} {seed}")
    words = random.Random(f"{style} {split} {seed}")
    write, examples = {"near": near, "hard": hard}[style], []
    for _ in range(full if size is None else size):
        thing = make_thing(list(kinds), groups, 3, tables)
        references = [write(thing, writer, words) for writer in writers]
        words.shuffle(references)
        examples.append(Example(linearise(thing), tuple(dict.fromkeys(references)), thing.kind))
    return examples


# ---- scores that need no package
FRAME = {"A", "It", "There"}            # the capitals of the styles that begin no name
WORDS = {word for values, *_ in ATTRIBUTES.values() if isinstance(values, list) for word in values}
# Whatever might be a value: a capital, a number, a word of the lists, a kind.
VALUE = re.compile(rf"\b(?:[A-Z]\w*|\w*\d\w*|{'|'.join(sorted(WORDS | set(KINDS)))})\b")


def all_values_and_no_other(source, output):
    """Whether `output` has every value of the table exactly, and no other value of the world.

    The attribute of a value is not looked at: a start and an end that change places pass.
    """
    values = [entry.split(" : ", 1)[1] for entry in source.split(" | ")]
    for value in sorted(set(values), key=len, reverse=True):
        output, count = re.subn(rf"\b{re.escape(value)}\b", "#", output)
        if not count:
            return False
    return all(word in FRAME for word in VALUE.findall(output))


def slot_accuracy(examples, outputs):
    """Share of the outputs with every value of their table exactly, and no other of the world."""
    pairs = zip(examples, outputs, strict=True)
    return sum(all_values_and_no_other(e.source, text) for e, text in pairs) / len(examples)


def exact_match(examples, outputs):
    """Share of the outputs that equal one of the references."""
    pairs = zip(examples, outputs, strict=True)
    return sum(text.strip() in e.targets for e, text in pairs) / len(examples)
