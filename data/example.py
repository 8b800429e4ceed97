"""An example: one source and all its references, and the one check of what may be text in it.

Every reader of a file yields rows (where, source, targets, topic), `where` being the file with the
line or the entry; `examples` looks at all of them. Text only.
"""
import re
import sys
from dataclasses import dataclass

LONGEST_BLANK = 100_000         # in characters; a million before a word are too many for tiktoken
# The limit of one split, whose texts are all in memory until they are tokens: their characters, and
# 400 for each example, for what else Python keeps of it.
MOST_CHARACTERS = 4 << 30


@dataclass(frozen=True, slots=True)
class Example:
    source: str
    targets: tuple[str, ...]        # several references; training takes each as a pair of its own
    topic: str = ""                 # WebNLG's category, or the "topic" of a line of JSON


def short(value):
    """`value` as a message shows it: a whole file may stand on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_blanks(text, got="got a text"):
    """Raise ValueError for a run of blanks that is too long for tiktoken, whose Rust panics on it:
    no Exception, and a page on stderr.
    """
    if len(text) >= LONGEST_BLANK and re.search(rf"(?<!\s)\s{{{LONGEST_BLANK}}}", text):
        raise ValueError(f"{got} with {LONGEST_BLANK:,} blanks in a row or more, which tiktoken "
                         "cannot read; expected fewer; delete them")


def check_text(text, what, where):
    """Raise ValueError for what is no text that a model could read or generate."""
    # "\ud83d" alone is legal JSON, and no character.
    if not (isinstance(text, str) and text.strip()
            and text.encode("utf-8", "ignore").decode() == text):
        raise ValueError(f"{where}: got the {what} {short(text)}, expected text, neither blank nor "
                         "with half a character; mend or delete it")
    check_blanks(text, f"{where}: got a {what}")


def examples(rows):
    """An Example for each of a reader's `rows`; a ValueError for what is no text in one."""
    found, size = [], 0
    for where, source, targets, topic in rows:
        if not targets:
            raise ValueError(f"{where}: got no target, expected one or more; mend or delete it")
        check_text(source, "source", where)
        for text in targets:
            check_text(text, "target", where)
        if topic not in ("", None):
            check_text(topic, "topic", where)
        size += 400 + len(source) + sum(map(len, targets))
        if size > MOST_CHARACTERS:
            raise ValueError(f"{where}: got more than {MOST_CHARACTERS >> 30} GB of text in one "
                             "split, expected less; learn from fewer lines")
        found.append(Example(source, tuple(targets), topic or ""))
    return found


def without_blanks(rows, path):
    """The rows of a release that is known to have blank texts, without them; stderr says how many.

    path: the file or the folder of it, for that note.
    """
    n_targets = n_rows = 0
    for where, source, targets, topic in rows:
        texts = [text for text in targets if str(text).strip()]
        n_targets += len(targets) - len(texts)
        if texts and str(source).strip():
            yield where, source, texts, topic
        else:
            n_rows += 1
    if n_targets or n_rows:
        print(f"{path}: left out {n_targets} blank targets, {n_rows} examples without source or "
              "target", file=sys.stderr)


def gather(found):
    """One Example for each distinct source and topic, in order, with the targets of all of them."""
    targets = {}
    for example in found:
        targets.setdefault((example.source, example.topic), []).extend(example.targets)
    return [Example(source, tuple(texts), topic) for (source, topic), texts in targets.items()]
