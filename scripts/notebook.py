"""A page of docs/ whose Python blocks run in order, and the notebook that is made of it.

    python -m scripts.notebook docs/walkthrough.md              writes walkthrough.ipynb here
    python -m scripts.notebook docs/walkthrough.md --refresh    runs it, writes its outputs anew

The notebook goes into the top folder of the clone, where `import model` finds the project. It is
not in the repository, for it is made in a second. tests/test_walkthrough.py runs the page.
"""
import contextlib
import dataclasses
import io
import json
import os
import re
from pathlib import Path

from utils.cli import flag, parse, run_program

# A block of code, and the block of what it prints behind it.
BLOCK = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```\n", re.S)


def run_page(text):
    """Run the blocks of a page in order, in one namespace. Yields (code, printed before, now)."""
    names = {"__name__": "walkthrough"}
    for number, block in enumerate(BLOCK.finditer(text)):
        code, printed = block.groups()
        with contextlib.redirect_stdout(io.StringIO()) as now:
            exec(compile(code, f"<block {number}>", "exec"), names)
        yield code, printed, now.getvalue()


def refreshed(text):
    """The page with what its blocks print now."""
    outputs = iter([now for _, _, now in run_page(text)])
    return BLOCK.sub(lambda block: block[0].removesuffix(f"{block[2]}```\n") + next(outputs)
                     + "```\n", text)


def notebook(text, folder="docs"):
    """A page of `folder` as a Jupyter notebook for the folder above (nbformat 4.5), a dictionary.
    """
    text = re.sub(r"\]\((?!\w+:)([^)]+)", lambda link: "](" + os.path.normpath(
        os.path.join(folder, link[1])), text)
    cells, pieces = [], BLOCK.split(text)           # text, code, printed, text, code, printed, ...
    for n, piece in enumerate(pieces):
        cell = {"id": f"cell-{len(cells)}", "metadata": {}, "source": piece.strip()}
        if n % 3 == 0:
            cells.append(cell | {"cell_type": "markdown"})
        elif n % 3 == 1:
            output = {"output_type": "stream", "name": "stdout", "text": pieces[n + 1]}
            cells.append(cell | {"cell_type": "code", "execution_count": None,
                                 "outputs": [output]})
    python = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": python}, "cells": cells}


@dataclasses.dataclass
class Settings:
    page: str = flag("", "a page with blocks of Python, as docs/walkthrough.md")
    refresh: bool = flag(False, "write the page's outputs anew")


def main(argv=None):
    settings = parse(Settings, argv, "Make a notebook of a page.", "page")
    if not settings.page:
        raise ValueError("got no page; expected one; `python -m scripts.notebook "
                         "docs/walkthrough.md`")
    page = Path(settings.page)
    text = page.read_text("utf-8")
    if settings.refresh:
        page.write_text(refreshed(text), "utf-8")
        return
    out = Path(page.with_suffix(".ipynb").name)
    out.write_text(json.dumps(notebook(text), indent=1, ensure_ascii=False), "utf-8")
    print(f"wrote {out}; open it with Jupyter from this folder")


if __name__ == "__main__":
    run_program(main)
