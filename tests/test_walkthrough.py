"""The pages that teach run: every block in order, with the output that stands below it."""
import codeop
import importlib
import inspect
import json
import re
import tempfile

import pytest
import torch
from conftest import ROOT

notebook = pytest.importorskip("scripts.notebook", reason="the folder scripts/ is not here")
PAGE = ROOT / "docs" / "walkthrough.md"


@pytest.fixture
def as_it_was(tmp_path, monkeypatch):
    """The page sets how PyTorch counts and prints, and writes a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_printoptions(profile="default")


@pytest.mark.parametrize("name, number", [("walkthrough", 12), ("another_model", 4)])
def test_every_block_prints_what_stands_below_it(as_it_was, name, number):
    """Would catch: a page that teaches what the code no longer does. Where the code is right and
    the page is old: python -m scripts.notebook docs/NAME.md --refresh
    """
    if name == "another_model":
        pytest.importorskip("llama.model", reason="the folder llama/ is not here")
    text = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
    blocks = list(notebook.run_page(text))
    for code, printed, now in blocks:
        assert now == printed, code
        assert len([line for line in code.splitlines() if line]) <= 15, code
    assert len(blocks) == text.count("```python") == number


@pytest.mark.parametrize("path", ["README.md", "docs/walkthrough.md", "docs/another_model.md"])
def test_blocks_can_be_pasted_line_by_line(path):
    """Would catch: no blank line behind an indented body, which Python's prompt waits for."""
    for code in re.findall(r"```python\n(.*?)```", (ROOT / path).read_text("utf-8"), re.S):
        typed = []
        for line in [*code.splitlines(), ""]:
            typed.append(line)
            if codeop.compile_command("\n".join(typed), symbol="single"):
                typed = []
        assert not "".join(typed), code


@pytest.mark.slow
def test_readme_from_python_runs(tmp_path, monkeypatch, capsys):
    """Would catch: the first lines that someone types in a notebook, and an error, or one where
    they are run again.
    """
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text("utf-8")
    for _ in range(2):
        exec(re.search(r"```python\n(import os.*?)```", readme, re.S)[1], {})
        assert (tmp_path / "out/mine/prefix.pt").exists()
        assert capsys.readouterr().out.splitlines()[-1].startswith("Belora is a ship which ")


def test_the_lines_that_it_points_to_are_there():
    """Would catch: "in the code" about a function or a line that has moved."""
    quotes = re.findall(r"`([\w.]+)` in \[([\w./]+)\]\(\.\./([\w./]+)\): `([^`]+)`",
                        PAGE.read_text("utf-8"))
    assert len(quotes) >= 12
    for name, shown, file, line in quotes:
        assert shown == file
        there = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            there = getattr(there, part)
        assert line in inspect.getsource(there), name


def test_the_notebook_is_the_page():
    """Would catch: a cell or an output that is lost, a link that leads nowhere from the top."""
    text = PAGE.read_text("utf-8")
    made = json.loads(json.dumps(notebook.notebook(text)))
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [cell["source"] for cell in code] == [block[1].strip() for block
                                                 in notebook.BLOCK.finditer(text)]
    assert all(cell["outputs"][0]["text"] for cell in code)
    prose = "".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", prose) if "://" not in link]
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)
