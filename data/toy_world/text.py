"""English for pre-training: fact sheets, prose, questions and retellings of the invented world.

A document has its values in braces: "{Belora} is a {restaurant} serving {Thai} food." `encode`
drops the braces and marks the first mention of a value, which is not learned: nobody can predict a
made-up name, everybody can copy it. Most documents are a sheet, then prose with the same facts.
Not here, on purpose: the notation and the styles of the tasks (tables.py). No key is followed by
" : ", no document has both " | " and " : ", none has "a ship which" or "and also", no sentence
begins with "A ship carrying"; tests/test_toy_world.py proves it.
"""
import random
import re

from data.toy_world.words import ATTRIBUTES, ENDINGS, KINDS, Thing, join_list, make_thing, verbalize

GROUPS = range(2, 10)           # of names; 0 and 1 are kept for the tasks' test and dev tables


def braced(thing):
    """The same thing with its values in braces."""
    facts = tuple((key, f"{{{value}}}") for key, value in thing.facts)
    return Thing(f"{{{thing.name}}}", f"{{{thing.kind}}}", facts)


# ---- sheets: the key first, in several notations
NOTATIONS = [("{} = {}", "\n "), ("{} = {}", " ; "), ("{} -> {}", ", "), ("( {}, {} )", " "),
             ("{} {}", " / "), ("{}: {}", "\n "), ("[ {} ] {}", " "), ("{}: {}", ", ")]


def sheet(thing, rng):
    entry, between = rng.choice(NOTATIONS)
    return between.join(entry.format(key, value) for key, value in thing.entries())


# ---- prose: an opening sentence, then sentences of one or more facts, in the order of the sheet
def opening(thing, facts, rng):
    """(the first sentence, how many of `facts` are in it)."""
    name, kind = thing.name, thing.kind
    way, count = rng.randrange(6), rng.choices((1, 2, 3, 4, 6), (30, 30, 20, 10, 10))[0]
    verbs = [verb for verb, _ in facts[:count]]
    participles = [participle for _, participle in facts[:min(count, 2)]]
    if way == 0:
        return f"{name} is a {kind}.", 0
    if way == 1:
        return f"There is a {kind} called {name}.", 0
    if way == 2:
        return f"{name} is a {kind} {join_list(participles)}.", len(participles)
    subject = [f"{name} is a {kind} that", f"The {kind} {name}", f"A {kind} called {name}"][way - 3]
    return f"{subject} {join_list(verbs)}.", len(verbs)


def prose(thing, rng):
    """The whole sheet as a short text."""
    phrases = [verbalize(fact, rng) for fact in thing.facts]
    text, at = opening(thing, phrases, rng)
    while at < len(phrases):
        key, value = thing.facts[at]
        named = ATTRIBUTES[key][0] in list(ENDINGS)         # "its owner is", but not "its seats is"
        if named and rng.random() < 0.25:
            text, at = f"{text} Its {key} is {value}.", at + 1
            continue
        count = rng.choices((1, 2, 3, 4), (35, 35, 20, 10))[0]
        subjects = ("It", f"The {thing.kind}", thing.name, "It also")
        subject = rng.choices(subjects, (45, 20, 15, 20))[0]
        text += f" {subject} {join_list([verb for verb, _ in phrases[at:at + count]])}."
        at += count
    return text


# ---- documents: each a list of parts, with an <|endoftext|> after each
def paired(first, second, rng):
    """Two texts on one thing in one document; seldom as neighbours, an <|endoftext|> between them.

    Seldom, so that prose is not what a model generates by itself after the end of a sheet: most
    often a question follows there (`sheet_then_question`). The model knows that prose can follow,
    too, and a prefix brings this out.
    """
    if rng.random() < 0.15:
        return [first, second]
    return [first + rng.choice(("\n ", "\n\n ", " # ")) + second]


def sheet_then_prose(thing, rng):
    return paired(sheet(thing, rng), prose(thing, rng), rng)


def sheet_then_sheet(thing, rng):
    """Mostly in two notations: all there is to learn is to find a key and to copy its value."""
    return paired(sheet(thing, rng), sheet(thing, rng), rng)


def prose_then_sheet(thing, rng):
    return [prose(thing, rng) + "\n " + sheet(thing, rng)]


def question(thing, rng):
    """About one fact; " : " stands after "question" and "answer" only."""
    key, value = fact = rng.choice(thing.facts)
    if rng.random() < 0.7:
        return f"question : {thing.name}, {key} ? answer : {value}"
    return f"question : which {thing.kind} {verbalize(fact, rng)[0]} ? answer : {thing.name}"


def questions(thing, rng):
    """A sheet or prose, then questions."""
    text = rng.choice((sheet, prose))(thing, rng)
    return ["\n ".join([text, question(thing, rng), question(thing, rng)])]


def sheet_then_question(thing, rng):
    return [sheet(thing, rng), question(thing, rng)]


def retelling(thing, rng):
    return [prose(thing, rng) + " In other words, " + prose(thing, rng)]


def summary(thing, rng):
    """Only the first fact comes again."""
    text = rng.choice((sheet, prose))(thing, rng)
    fact = verbalize(thing.facts[0], rng)[1]
    return [f"{text}\n In short, {thing.name} is a {thing.kind} {fact}."]


def headline(thing, rng):
    """Prose under a title; " | " stands here and nowhere else."""
    return [f"{thing.name} | {thing.kind}\n {prose(thing, rng)}"]


MIXTURE = {sheet_then_prose: 60, sheet_then_question: 20, sheet_then_sheet: 10,
           prose_then_sheet: 3, questions: 2, retelling: 2, summary: 2, headline: 1}


def world_thing(rng, groups=GROUPS):
    """A thing of any kind, ready to be written about."""
    return braced(make_thing(list(KINDS), groups, 2, rng))


def document(rng):
    """One document: a list of parts with values in braces."""
    way = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    return way(world_thing(rng), rng)


def words_of(text):
    return re.findall(r"\w+", text.lower())


def known_share(texts):
    """The share of all words of `texts` that stand in 4,000 documents, nearly all of the world's:
    1,998 different words of 2,007 in 32,000 documents.
    """
    rng = random.Random(0)
    seen = {word for _ in range(4000) for part in document(rng) for word in words_of(part)}
    words = [word for text in texts for word in words_of(text)]
    return sum(word in seen for word in words) / max(1, len(words))


FIRST, TEXT, AGAIN = 0, 1, 2        # a token of: a value's first mention, words, a value again


def mark(text, tokenizer, seen):
    """(tokens, what each belongs to) of a text with values in braces; `seen` gathers the values."""
    ids, roles = [], []
    # A value takes along the blank before it: the tokenizer joins a blank to the next word.
    for piece in re.split(r"( ?\{[^}]*\})", text):
        is_value, words = piece.endswith("}"), re.sub(r"[{}]", "", piece)
        role = TEXT if not is_value else AGAIN if words in seen else FIRST
        seen.add(words)
        tokens = tokenizer.encode(words)
        ids += tokens
        roles += [role] * len(tokens)
    return ids, roles


def encode(parts, tokenizer):
    """The tokens of a document, and what each belongs to: FIRST, TEXT or AGAIN.

    A part becomes " part " <|endoftext|>, with the blanks of the paper's official code.
    """
    ids, roles, seen = [], [], set()
    for part in parts:
        for whole, more in zip((ids, roles), mark(f" {part} ", tokenizer, seen)):
            whole += more
        ids.append(tokenizer.eos_token_id)
        roles.append(TEXT)
    return ids, roles
