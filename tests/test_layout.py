"""The house rules that a machine can hold: imports, lengths, and what README says of them."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

CORE = ["model.py", "prefix.py", "train.py", "sample.py", "batches.py", "loss.py", "reader.py",
        "beam.py", "checkpoint.py", "opening.py", "settings.py", "plumbing.py"]
# Who may import whom. plumbing knows nobody; everything else points down this list.
MAY_IMPORT = {
    "plumbing": set(),
    "fused": set(),
    "packed": {"model"},
    "graphs": {"model", "reader"},
    "rivals": {"model"},
    "bench_train": {"model", "data", "batches", "loss", "prefix", "rivals", "fused", "packed",
                    "step"},
    "bench": {"plumbing", "model", "opening", "beam", "reader", "sample", "fused", "packed",
              "rivals", "bench_train"},
    "model": set(),
    "checkpoint": {"plumbing", "model"},
    "data": {"plumbing", "data"},
    "prefix": {"plumbing", "model", "checkpoint"},
    "opening": {"plumbing", "model", "checkpoint", "prefix", "data"},
    "settings": {"plumbing", "opening", "data"},
    "batches": {"data"},
    "loss": {"model", "batches"},
    "step": {"model", "batches", "loss"},
    "reader": {"model"},
    "baselines": {"checkpoint"},
    "claims": {"plumbing", "data", "opening", "beam", "sample"},
    "evaluate": {"plumbing", "data", "opening", "prefix", "sample"},
    "beam": set(),
    "sample": {"plumbing", "model", "prefix", "data", "opening", "beam", "reader"},
    "train": {"plumbing", "model", "checkpoint", "prefix", "data", "opening", "settings", "beam",
              "batches", "loss", "sample"},
    "convert": {"plumbing", "model", "checkpoint"},
    "peft_format": {"plumbing", "checkpoint", "prefix", "opening"},
    "pretrain": {"plumbing", "model", "checkpoint", "data", "sample"},
    "denoise": {"model", "data", "batches", "loss"},
}
# Imports inside a function: a side door that is opened where it is needed.
MAY_IMPORT_LATE = {"opening": {"convert", "fused", "graphs", "packed", "step"},
                   "train": {"baselines"}, "bench": {"graphs"}, "bench_train": {"graphs"},
                   "convert": {"peft_format"}, "pretrain": {"denoise"}}
PACKAGES = {"torch", "numpy", "tiktoken", "tqdm"}


def sources():
    """Every program file of the project: the top level and data/."""
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])


def room(path):
    return "data" if path.parent.name == "data" else path.stem


def imports(path):
    """(first name, whether it stands at the top level) for every import of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name.split(".")[0], id(node) in top) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], id(node) in top


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """Would catch: a room that cannot be read on its own, an optional package made needed."""
    ours = {room(p) for p in sources()}
    for name, at_top in imports(path):
        if name in ours:
            late = set() if at_top else MAY_IMPORT_LATE.get(room(path), set())
            assert name in MAY_IMPORT[room(path)] | late, f"{path.name} imports {name}"
        elif at_top:
            assert name in PACKAGES | set(sys.stdlib_module_names), f"{path.name} needs {name}"


def test_the_core_runs_without_the_side_doors(tmp_path):
    """Would catch: a core that cannot be taken home alone; tests of it that import more."""
    for path in [*(ROOT / name for name in CORE), *ROOT.glob("data/*.py"),
                 *ROOT.glob("tests/*.py"), *ROOT.glob("weights/tiny-gpt2/*.*")]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(path.read_bytes())

    def ended(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True,
                              text=True)
    missing = ended("train.py", "--model", "gpt2")
    assert missing.returncode == 2 and missing.stderr.startswith("error: got the model 'gpt2'")
    learned = ended("train.py", "--steps", "2", "--dev-pairs", "10", "--device", "cpu", "--out",
                    "run")
    said = ended("sample.py", "--run", "run", "--device", "cpu", "name : Rudibis")
    assert learned.returncode == said.returncode == 0, learned.stderr + said.stderr
    assert "dev loss" in learned.stdout and said.stdout.strip()
    found = ended("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests")
    assert found.returncode == 0, found.stdout


def test_files_functions_and_lines_stay_short():
    """450 lines a file, 60 a function, 100 columns; model, prefix, train and sample together 1,300.

    For the reader's sake.
    """
    for path in [*sources(), *ROOT.glob("tests/*.py")]:
        text = path.read_text("utf-8")
        wide = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100]
        assert not wide, f"{path.name}: lines {wide} are wider than 100 columns"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                most = 90 if path.name == "fused.py" else 60        # kernels may take 90
                assert length <= most, f"{path.name}: {node.name} has {length} lines"
        assert "TODO" not in text.replace('"TODO"', "")
    for path in sources():
        assert len(path.read_text("utf-8").splitlines()) <= 450, path.name
    assert sum(len((ROOT / name).read_text("utf-8").splitlines()) for name in CORE[:4]) <= 1300


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    """A header of at most 15 lines. Would catch: a file that the reader has to guess about."""
    header = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert header and len(header.splitlines()) <= 15


def test_readme_tells_the_truth_about_lengths():
    """Would catch: a reading order whose line counts are last month's."""
    told = re.findall(r"`([\w/]+\.py)` +\((\d+) lines\)", (ROOT / "README.md").read_text("utf-8"))
    assert {name for name, _ in told} >= set(CORE)
    for name, lines in told:
        assert len((ROOT / name).read_text("utf-8").splitlines()) == int(lines), name


def test_no_large_file_is_kept():
    """8 MB at most. Would catch: data or weights on their way into the repository."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no git checkout, so what is kept in it cannot be told")
    for name in filter(None, tracked.stdout.split("\0")):
        assert not (ROOT / name).exists() or (ROOT / name).stat().st_size <= 8 * 2 ** 20, name
