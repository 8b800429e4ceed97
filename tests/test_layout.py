"""The house rules that a machine can check: rooms, imports, lengths, what README says of them."""
import ast
import inspect
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import model

TOP = ["model.py", "prefix.py", "train.py", "sample.py"]
# Who may import whom: rooms on lower floors only. A room is one of the four files, or a folder.
FLOORS = {
    "model": set(), "utils": set(),
    "prefix": {"model"},
    "bart": {"model", "prefix"},
    "llama": {"model"},
    "data": {"model", "utils"},
    "decoding": {"model"},
    "pretrained": {"model", "prefix", "bart", "llama", "data", "utils"},
    "baselines": {"model", "prefix"},
    "fast": {"model", "prefix", "data", "decoding"},
    "sample": {"prefix", "data", "decoding", "pretrained", "utils", "fast"},
    "train": {"prefix", "data", "decoding", "pretrained", "utils", "sample", "baselines", "fast"},
    "scripts": {"model", "prefix", "bart", "data", "decoding", "pretrained", "baselines", "utils",
                "sample", "train", "fast"},
}
# What can be deleted: whoever is not in it imports it inside a function, where it is asked for.
OPTIONAL = {"bart", "llama", "baselines", "fast", "scripts"}
GONE = {name for name in OPTIONAL if not (ROOT / name).exists()}
PACKAGES = {"torch", "numpy", "tiktoken", "tqdm"}


def sources():
    """Every program file of the project."""
    return sorted(path for path in ROOT.rglob("*.py")
                  if path.relative_to(ROOT).parts[0] in {*TOP, *FLOORS})


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """(module with dots, whether it stands at the top level) for every import of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    top = {id(inner) for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))
           for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, id(node) in top) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{name.name}", id(node) in top) for name in node.names)


def by_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(), ids=by_name)
def test_imports_go_down(path):
    """Would catch: a room that cannot be read on its own, an optional package made needed."""
    own = room(path)
    for module, at_top in imports(path):
        name = module.split(".")[0]
        if name in FLOORS and name != own:
            assert name in FLOORS[own], f"{path.name} imports {name}"
            late = at_top and name in OPTIONAL and own not in OPTIONAL
            assert not late, f"{path.name} needs {name}, which may be deleted"
        elif name not in FLOORS and at_top and own not in OPTIONAL:
            assert name in PACKAGES | set(sys.stdlib_module_names), f"{path.name} needs {name}"


def test_no_file_imports_itself_in_a_circle():
    """Imports inside functions count, too. Would catch: two files that need each other."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources()}
    arrows = {name: {module for module, _ in imports(path) if module in names}
              for name, path in names.items()}

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name in arrows:
            for other in sorted(arrows[name]):
                visit(other, [*trail, name])
            del arrows[name]            # nothing below it leads back
    for name in sorted(names):
        visit(name, [])


def test_only_the_four_files_lie_on_top():
    """Would catch: a file that should have a room."""
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(TOP)


@pytest.mark.slow
def test_the_demo_runs_without_the_optional_rooms(tmp_path):
    """Would catch: a core that cannot be taken home alone; tests of it that import more."""
    gone = shutil.ignore_patterns(*OPTIONAL, "out", "docs", "tiny-bart", "__pycache__", ".*",
                                  "downloads")
    house = tmp_path / "house"
    shutil.copytree(ROOT, house, ignore=gone)

    def ended(*words):
        return subprocess.run([sys.executable, *words], cwd=house, capture_output=True, text=True)
    for flag in ("--fast", "--attention=sdpa"):
        missing = ended("train.py", flag, "--device", "cpu")
        assert missing.returncode == 2 and "there is no fast/ here" in missing.stderr
    learned = ended("train.py", "--steps", "2", "--dev-pairs", "10", "--device", "cpu", "--out",
                    "run")
    output = ended("sample.py", "--run", "run", "--device", "cpu", "name : Rudibis")
    assert learned.returncode == output.returncode == 0, learned.stderr + output.stderr
    assert "dev loss" in learned.stdout and output.stdout.strip()
    found = ended("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests")
    assert found.returncode == 0, found.stdout


def test_files_functions_and_lines_stay_short():
    """Under 350 lines for each of the four files, 450 for others, 60 a function, 100 columns.

    For the reader's sake.
    """
    for path in [*sources(), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text("utf-8")
        wide = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100]
        assert not wide, f"{path.name}: lines {wide} are wider than 100 columns"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                most = 90 if path.name == "triton_attention.py" else 60     # kernels may take 90
                assert length <= most, f"{path.name}: {node.name} has {length} lines"
    for path in sources():
        lines = len(path.read_text("utf-8").splitlines())
        assert lines <= (349 if path.name in TOP and path.parent == ROOT else 450), path.name


@pytest.mark.parametrize("path", sources(), ids=by_name)
def test_every_file_says_what_it_is(path):
    """In a header of at most 15 lines. Would catch: a file that the reader has to guess about."""
    header = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert header and len(header.splitlines()) <= 15
    assert "Called by" not in header, "a list of callers rots"


def test_readme_is_short_and_tells_the_truth_about_lengths():
    """Would catch: a tree whose line counts are last month's, a page that nobody reads."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.encode()) <= 10_000
    counts = dict(re.findall(r"([\w/]+\.py) +(\d+) lines", text))
    assert set(counts) >= set(TOP)
    for name, lines in counts.items():
        assert len((ROOT / name).read_text("utf-8").splitlines()) == int(lines), name


def test_readme_shows_attention_as_it_is():
    """Would catch: an equation in README that the code has left behind."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    real = inspect.getsource(model.attend)
    for line in block.splitlines():
        assert line.split("  #")[0].strip() in real, line


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"),
                                  *ROOT.glob("fast/*.md")], ids=by_name)
def test_every_link_leads_somewhere(page):
    """Would catch: a page or a picture that has moved."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        path = (page.parent / target).resolve()
        if "://" not in target and path.relative_to(ROOT).parts[0] not in GONE:
            assert path.exists(), target


def test_every_test_that_a_page_names_is_there():
    """`tests/FILE.py::NAME`. Would catch: a proof that has another name by now."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    named = {name for page in pages
             for name in re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", page.read_text("utf-8"))}
    for file, name in sorted(named):
        if file.split("/")[1] not in GONE:
            assert f"def {name}(" in (ROOT / file).read_text("utf-8"), f"{file}::{name}"


def test_no_large_file_is_kept():
    """8 MB at most. Would catch: data or weights on their way into the repository."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no git checkout, so what is kept in it cannot be told")
    for name in filter(None, tracked.stdout.split("\0")):
        assert not (ROOT / name).exists() or (ROOT / name).stat().st_size <= 8 * 2 ** 20, name


@pytest.mark.parametrize("name", ["train.py", "sample.py", "utils/before_torch.py"])
def test_an_old_python_can_read_what_tells_that_it_is_too_old(name):
    """Would catch: a SyntaxError in the place of the sentence about the version."""
    ast.parse((ROOT / name).read_text("utf-8"), feature_version=(3, 6))
