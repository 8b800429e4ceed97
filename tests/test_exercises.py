"""docs/exercises.md cannot rot: each change applies, and the test that it names turns red."""
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "exercises.md"
EXERCISE = re.compile(r"^## (\d)\..*?^\*Turns red:\* `([^`]+)`.*?^```diff\n--- (\S+)\n(.*?)^```",
                      re.S | re.M)


def exercises():
    """(test, file, old lines, new lines) of each exercise, a list."""
    page = PAGE.read_text("utf-8") if PAGE.exists() else ""     # docs/ need not be taken home
    found = []
    for number, test, file, diff in EXERCISE.findall(page):
        old, new = ("".join(line[1:] for line in diff.splitlines(True) if line[0] == sign)
                    for sign in "-+")
        found.append(pytest.param(test, file, old, new, id=number))
    return found


@pytest.mark.parametrize("test, file, old, new", exercises())
def test_the_change_fits_the_code_of_today(test, file, old, new):
    """Would catch: an exercise about a line that has gone, or that stands there twice."""
    assert (ROOT / file).read_text("utf-8").count(old) == 1 and new


def status(copy, *tests):
    """How pytest ends in the copy: 0 if the tests pass, 1 if some fail."""
    words = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(words, cwd=copy, capture_output=True).returncode


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project in which all the named tests are green."""
    copy = tmp_path_factory.mktemp("exercises") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "out", "docs", "weights", "prefixes", "downloads"))
    assert status(copy, *(param.values[0] for param in exercises())) == 0
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("test, file, old, new", exercises())
def test_the_named_test_turns_red(copy, test, file, old, new):
    """Would catch: a test that has stopped seeing the bug that it was written for."""
    whole = (copy / file).read_text("utf-8")
    (copy / file).write_text(whole.replace(old, new), "utf-8")
    try:
        assert status(copy, test) == 1
    finally:
        (copy / file).write_text(whole, "utf-8")


def test_there_are_eight():
    """Would catch: an exercise that is not written as the others are, and is tested by nobody."""
    assert len(exercises()) == 8 or not PAGE.exists()
