"""What scripts that draw share: matplotlib, which is optional; pictures and pages written whole."""
import io
import re
import sys
from pathlib import Path

from utils.files import atomic_write


def new_figure(width, height):
    """An empty figure, in inches. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def plain_panel(panel, title):
    """A title on the left, and axes on two sides only."""
    panel.set_title(title, fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def render(draw, *args, form="png"):
    """The figure that `draw(*args)` returns, as the bytes of a picture; None without matplotlib."""
    try:
        figure = draw(*args)
    except ImportError:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=110)
    return buffer.getvalue()


def save_pictures(figures):
    """Write what `render` gives for every {path: (draw, *args)}, as the ending of `path` says.

    Returns whether it could; without matplotlib one line on stderr says what is missing.
    """
    for path, (draw, *args) in figures.items():
        picture = render(draw, *args, form=Path(path).suffix[1:])
        if picture is None:
            names = ", ".join(map(str, figures))
            print(f"no package matplotlib, so no picture is drawn ({names}); `pip install "
                  "matplotlib`", file=sys.stderr)
            return False
        with atomic_write(path) as file:
            file.write(picture)
    return True


def write_between(page, name, text):
    """Put `text` into the page in the place of what stands between the marks of that name."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    new = f"{marks[0]}\n{text}\n{marks[1]}"
    whole, found = re.subn(f"{marks[0]}.*{marks[1]}", lambda _: new, page.read_text("utf-8"),
                           flags=re.DOTALL)
    if not found:
        raise ValueError(f"got {page}, which has no place for its tables; expected {marks[0]} "
                         f"{marks[1]}; add them")
    with atomic_write(page, "w") as file:
        file.write(whole)
