"""Command lines: flags from a settings dataclass, and mistakes reported in one line.

Every program here keeps its settings in one dataclass whose fields carry their own help text, so
that the dataclass is the documentation of the flags. A mistake that a user can make is a ValueError
or an OSError that says what was got, what was expected and what to do next; `run_program` turns it
into one line and exit status 2, and what nobody expected into one line and status 70. Knows nothing
of the project.
"""
from utils.before_torch import leave

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

# Set to anything, this environment variable brings the traceback of every error.
TRACEBACK = "PREFIX_TUNING_TRACEBACK"


def flag(default, text, choices=None, kind=None, within=None, alias=None, group=None):
    """A field of a settings dataclass: its default, its help text, and the values it may take, as
    `choices` or as `within`, the lowest and the highest number. alias: a second name of the flag.
    group: "title: example", where a group of flags begins in --help; the example is flags alone.
    """
    metadata = {"help": text, "choices": choices, "kind": kind or type(default), "within": within,
                "alias": alias, "group": group}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; `{self.prog} --help` lists every flag")


def program_of(settings):
    """How the program of this settings dataclass is started: "python train.py", say."""
    name, main = settings.__module__, sys.modules["__main__"]
    if name == "__main__":
        name = main.__spec__.name if main.__spec__ else Path(sys.argv[0]).stem
    return f"python -m {name}" if "." in name else f"python {name}.py"


def nearest(got, known, otherwise=""):
    """The end of a message: which of `known` was probably meant by `got`."""
    near = difflib.get_close_matches(got, known, 1)
    return f"did you mean {near[0]}?" if near else otherwise


def number(value):
    """A bound as text: 1e-12, 1,000,000."""
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"


def check(settings, name_of=lambda field: "--" + field.replace("_", "-")):
    """Raise ValueError unless every field of `settings`, an instance of a settings dataclass, has a
    value that its flag can have. name_of: what the message calls a field.
    """
    for field in dataclasses.fields(settings):
        values, about = getattr(settings, field.name), field.metadata
        if values is None and field.default is None:
            continue
        kind = str if about["kind"] is list else about["kind"]
        kinds = (int, float) if kind is float else (kind,)          # of JSON; True is no 1
        low, high = about["within"] or (None, None)
        for value in values if field.default is dataclasses.MISSING else [values]:
            got = f"got {name_of(field.name)} {value!r:.60}; expected"
            if type(value) not in kinds:
                raise ValueError(f"{got} one value of the kind {kind.__name__}")
            if about["choices"] and value not in about["choices"]:
                raise ValueError(f"{got} one of {', '.join(about['choices'])}")
            if low is not None and not low <= value <= high:
                raise ValueError(f"{got} a number from {number(low)} to {number(high)}")


def parse(settings, argv, description, positional=None, notes="", hidden=()):
    """Read `argv` into an instance of the dataclass `settings`; `positional` names the field
    without dashes.

    A field whose default is a list is a flag that may be repeated, or as `positional` any number
    of words that stand together; one whose default is None stays None when it is left out. The
    attribute `given` of what is returned has the names of the fields that stand in argv. notes:
    shown at the end of --help. hidden: fields that --help does not name, for the caller refuses
    them. An unknown flag raises ValueError and names the flag that was probably meant.
    """
    parser = _OneLineParser(prog=program_of(settings), description=description, epilog=notes,
                            allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            argument_default=argparse.SUPPRESS)
    flags, place = [], parser
    for field in dataclasses.fields(settings):
        if field.metadata["group"]:
            title, example = field.metadata["group"].split(": ", 1)
            place = parser.add_argument_group(title, f"example: {parser.prog} {example}")
        kind, choices = field.metadata["kind"], field.metadata["choices"]
        repeated = field.default is dataclasses.MISSING
        plain = repeated or field.default in (None, "") or field.default is False
        notes_on = [" to ".join(map(number, field.metadata["within"] or ()))]
        notes_on += [] if plain else [f"default: {field.default}"]
        ends = "; ".join(filter(None, notes_on))
        about = {"help": argparse.SUPPRESS if field.name in hidden else
                 (field.metadata["help"] + (f" ({ends})" if ends else "")).replace("%", "%%")}
        if field.name == positional:
            place.add_argument(field.name, nargs="*" if repeated else "?", **about)
            continue
        names = ["--" + name.replace("_", "-") for name in (field.name, field.metadata["alias"])
                 if name]
        flags += names if field.name not in hidden else []
        place.add_argument(*names, dest=field.name, **about, **(
            {"action": "store_true"} if kind is bool else
            {"action": "append", "type": str if kind is list else kind} if repeated else
            {"type": kind, "choices": choices}))
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    for name, value in given.items():
        if isinstance(value, list) and (not value or [] in value):      # argparse's for "--"
            raise ValueError(f"got --{name.replace('_', '-')}=--; expected a value behind the =; "
                             f"`{parser.prog} --help` lists every flag")
    if unknown:
        near = (nearest(unknown[0].split("=")[0], flags) if unknown[0].startswith("-") else
                "a flag has to stand before it;")
        raise ValueError(f"unknown argument {unknown[0]!r}; {near}{' ' * bool(near)}"
                         f"`{parser.prog} --help` lists every flag")
    found = settings(**given)       # what was left out takes the dataclass's own default
    found.given = set(given)
    check(found)
    return found


def out_of_memory(error):
    """Whether `error` says so: Python's own, or PyTorch's, which has a message for each device."""
    words = "out of memory", "can't allocate memory", "not enough memory"
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


@contextlib.contextmanager
def signals_interrupt():
    """SIGTERM and a terminal that is closed raise KeyboardInterrupt(number), as Ctrl-C does,
    so that what is half done is put away. Under nohup the terminal stays without effect.
    """
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)
    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))
               and signal.getsignal(number) is signal.SIG_DFL]          # Windows has no SIGHUP
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def run_program(main, saving_flags="a smaller --batch-size", goes_on=False):
    """Call `main()` as a program, which ends with the status that it returns; None is 0.

    A user's mistake is one line on stderr and exit status 2; so is a lack of memory, with the flags
    that save some. Nothing is said where the reader of the output has gone. Anything else, as a
    mistake of our own or of a package, is one line too, with status 70 and how to see where it
    comes from. goes_on: the same command takes up what it had done when it was interrupted, which
    is said. Standard output is UTF-8, as every file is: another encoding may lack a letter of
    what is said after hours.
    """
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):        # a notebook's is not, and takes every text
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        with signals_interrupt():
            status = main()
        sys.stdout.flush()
        if status:
            sys.exit(status)
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        # Of all files only these have no name of their own in their errors.
        unnamed = isinstance(error, OSError) and error.errno and error.filename is None
        where = "standard input or output: " if unnamed else ""
        enough = isinstance(error, BrokenPipeError)     # says who reads our output, as `head`
        if not enough:
            print(f"error: {where}{' '.join(str(error).split())}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:         # Python would try it again at the very end, and change the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141 if enough else 2)      # 128 + SIGPIPE
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):              # the terminal may be gone
            again = "; run the same command again to go on" if goes_on else ""
            print(f"interrupted{again}", file=sys.stderr)
        sys.exit(128 + (error.args or (signal.SIGINT,))[0])
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:          # a panic of a package in Rust is no Exception
        if os.environ.get(TRACEBACK):
            raise
        package = error.name if isinstance(error, ModuleNotFoundError) else None
        if package and "." not in package:      # with a dot, a package's part or ours: a bug
            print(f"error: got no package {package}, expected it; `pip install {package}`",
                  file=sys.stderr)
            sys.exit(2)
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if out_of_memory(error):
            print(f"error: out of memory ({first}); try {saving_flags}", file=sys.stderr)
            sys.exit(2)
        print(f"error: got {type(error).__name__}: {first}, which this program did not expect; run "
              f"it again with {TRACEBACK}=1 to see where, and report that", file=sys.stderr)
        sys.exit(70)


def optional_module(name, flags):
    """The module `name` of a folder that may have been deleted; `flags` ask for it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"got {flags}, but there is no {name.split('.')[0]}/ here ({error}); "
                         "leave it out") from error


def run_child(words, **options):
    """Run another program to its end; it is stopped where this one is. Returns what it used, see
    os.wait4. options: as of subprocess.Popen. Raises ValueError where it fails, KeyboardInterrupt
    with the number of the signal where that ended it.
    """
    # In a session of its own: Ctrl-C at a terminal comes from here, once.
    process = subprocess.Popen(words, start_new_session=True, **options)
    try:
        try:
            _, status, used = os.wait4(process.pid, 0)
        except KeyboardInterrupt as stop:
            process.send_signal((stop.args or (signal.SIGINT,))[0])
            os.wait4(process.pid, 0)
            raise
    except BaseException:               # a second signal
        process.kill()
        raise
    status = process.returncode = os.waitstatus_to_exitcode(status)
    if status > 128 or -status in (signal.SIGINT, signal.SIGTERM):
        raise KeyboardInterrupt(status - 128 if status > 128 else -status)
    if status:
        raise ValueError(f"`{shlex.join(map(str, words))}` ended with {status}; its message stands "
                         "above; mend that, then give the same command again")
    return used


@contextlib.contextmanager
def stop_after_this_step():
    """Ctrl-C, a cluster's SIGTERM or a terminal that is closed fills the list that this gives with
    the number of the signal; the loop ends after its step.

    A second signal ends the program at once. Under nohup the terminal stays without effect.
    """
    signals, terminals = [], [number for number in (1, 2) if os.isatty(number)]

    def note(number, frame):
        if signals:
            raise KeyboardInterrupt(number)
        signals.append(number)
        if number == hangup:            # the terminals are gone: to write there would be an error
            for terminal in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

    numbers, hangup = [signal.SIGINT, signal.SIGTERM], getattr(signal, "SIGHUP", None)  # Windows
    if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
