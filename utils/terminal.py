"""A person at a terminal, or a file in that place: progress, wrapped texts, questions, commands.

Knows nothing of the project.
"""
import contextlib
import shlex
import shutil
import sys
import textwrap

from tqdm import tqdm


class _Lines:
    """Standard error, where each state of a bar becomes a line of its own."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(items=None, total=None, initial=0, unit="step", name=None, unit_scale=False,
             leave=True):
    """A bar on a terminal. In a pipe or a file: a line every ten seconds, none for short work.

    items, total, ...: as tqdm's. Write messages beside it with `note`.
    """
    about = dict(total=total, initial=initial, unit=unit, desc=name and f"{name}: ",
                 unit_scale=unit_scale, leave=leave)
    if sys.stderr.isatty():
        return tqdm(items, **about, dynamic_ncols=True)
    return tqdm(items, **about, file=_Lines(), mininterval=10, delay=10, miniters=1,
                bar_format="{desc}{n_fmt} of {total_fmt} ({unit}), {elapsed} so far, {remaining} "
                           "to go{postfix}")


def labelled(label, text):
    """`label` and its text, wrapped below each other where a terminal is less wide."""
    line = f"{label:10} {text}"
    if not sys.stdout.isatty():
        return line
    return textwrap.fill(line, shutil.get_terminal_size().columns, break_on_hyphens=False,
                         subsequent_indent=" " * 11)


def command(*words, text=None):
    """`python` with these words, and a last one that may look like a flag, quoted so that it can be
    pasted into a shell.
    """
    if text is not None:
        words += ("--", text) if text.startswith("-") else (text,)
    return shlex.join(["python", *map(str, words)])


def note(text):
    """A line on standard error; a bar that stands there is drawn again below it."""
    tqdm.write(text, file=sys.stderr)


def typed_lines(prompt, what):
    """The lines that are typed, one by one, until Ctrl-D; a blank one is passed over.

    On a terminal there are arrows and a history, it is said first `what` to type, and `quit` ends
    it too. What comes through a pipe is taken as it is, without a prompt; where somebody types and
    the output is a file, the prompt goes to standard error.
    """
    typing = sys.stdin.isatty()
    terminal = typing and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):      # not on every system; then without arrows
            import readline  # noqa: F401  input() finds it
        print(f"type a {what} and press Enter; the arrow up brings back the last one; `quit` or "
              "Ctrl-D ends", file=sys.stderr)
    try:
        while True:
            if typing and not terminal:
                print(prompt, end="", file=sys.stderr, flush=True)
            # On a terminal input() has to know the prompt: an arrow draws the line again.
            line = input(prompt if terminal else "").strip()
            if terminal and line in ("quit", "exit"):
                return
            if line:
                yield line
    except EOFError:
        if typing:
            print(file=sys.stderr)      # what comes next begins on a line of its own
