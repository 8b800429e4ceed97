"""What all scripts that draw share: matplotlib, which is optional, and pictures written whole."""
import io
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


def render(name, draw, *args, form="png"):
    """The figure that `draw(*args)` returns, as the bytes of a picture; None, and a line on stderr
    about the picture `name`, where matplotlib is missing.
    """
    try:
        figure = draw(*args)
    except ImportError:
        print(f"no package matplotlib, so {name} is not drawn; `pip install matplotlib`",
              file=sys.stderr)
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=110)
    return buffer.getvalue()


def save_picture(path, draw, *args):
    """Write what `render` gives, as the ending of `path` says. Returns whether there is one."""
    picture = render(path, draw, *args, form=Path(path).suffix[1:])
    if picture:
        with atomic_write(path) as file:
            file.write(picture)
    return bool(picture)
