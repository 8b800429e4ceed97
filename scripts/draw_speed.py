"""Draws docs/speed.png from the JSON lines of scripts/bench.py train and decode.

    python -m scripts.draw_speed docs/results/*-fp32.jsonl docs/results/*-bf16.jsonl

Reads these files and nothing else; all have to be of one machine. Needs matplotlib.
"""
import dataclasses
import sys

from scripts.drawing import new_figure, plain_panel, save_pictures
from scripts.results import read_rows
from utils.cli import flag, parse, run_program

# peft's usual way, which counts as 1, by dtype.
USUAL = {"fp32": "peft, sdpa", "bf16": "peft, autocast"}


def colour(form):
    return ("tab:red" if "shared" in form else "tab:orange" if form.startswith("ours") else
            "lightsteelblue" if "random" in form else "tab:blue")


def places(rows):
    """(height, row) of each bar, from the top; a gap between two sizes of batch."""
    height, before = 0, None
    for row in rows:
        height -= 1 if row["what"] == before else 2.1
        before = row["what"]
        yield height, row


def name_bars(panel, bars):
    """The forms beside their bars, and above the first of each size of batch, that size."""
    panel.set_yticks([height for height, _ in bars], [row["form"] for _, row in bars], fontsize=8)
    panel.tick_params(axis="y", length=0)
    for title in dict.fromkeys(row["what"] for _, row in bars):
        top = next(height for height, row in bars if row["what"] == title)
        panel.text(0.01, top + 0.6, f"batches of {title}", fontsize=8, style="italic",
                   transform=panel.get_yaxis_transform())
    panel.set_ylim(bars[-1][0] - 0.7, bars[0][0] + 1.5)


def draw_rates(panel, rows, dtype):
    """Rates as multiples of peft's; behind each bar the rate that the multiplications allow."""
    bars = list(places(rows))
    usual = {row["what"]: row["tokens/s"] for row in rows if row["form"] == USUAL[dtype]}
    for height, row in bars:
        ratio = row["tokens/s"] / usual[row["what"]]
        limit = ratio / row["of the limit"]
        panel.barh(height, limit, color="0.93")
        panel.barh(height, ratio, color=colour(row["form"]))
        panel.plot([limit, limit], [height - 0.4, height + 0.4], color="0.3", lw=1.5)
        panel.text(limit, height, f"  {ratio:.2f} ×, {row['of the limit']:.0%}", va="center",
                   fontsize=8)
    name_bars(panel, bars)
    panel.set_xlim(0, 1.25 * max(row["tokens/s"] / usual[row["what"]] / row["of the limit"]
                                 for row in rows))
    plain_panel(panel, f"a step of training, {dtype}: real tokens a second, {USUAL[dtype]} = 1\n"
                 "mark: the multiplications alone; %: how near to it")


def draw_memory(panel, rows, dtype):
    """What a step adds to the memory, in megabytes."""
    bars = list(places(rows))
    for height, row in bars:
        panel.barh(height, row["MB"], color=colour(row["form"]))
        panel.text(row["MB"], height, f"  {row['MB']:,.0f} MB", va="center", fontsize=8)
    name_bars(panel, bars)
    panel.set_xlim(0, 1.2 * max(row["MB"] for row in rows))
    plain_panel(panel, f"memory that a step adds, {dtype}")


def draw_decoding(panel, by_dtype):
    """Rates of decoding as multiples of the faster of peft's two."""
    titles = list(dict.fromkeys(row["what"] for rows in by_dtype.values() for row in rows))
    for shift, (dtype, rows) in enumerate(by_dtype.items()):
        for place, title in enumerate(titles):
            rate = {row["form"]: row["tokens/s"] for row in rows if row["what"] == title}
            ratio = rate["ours"] / max(rate["peft, sdpa"], rate["peft, eager"])
            x = place + 0.38 * (shift - (len(by_dtype) - 1) / 2)
            panel.bar(x, ratio, 0.36, color="tab:orange", alpha=1 if dtype == "fp32" else 0.6)
            panel.text(x, ratio + 0.03, f"{ratio:.2f} ×\n{dtype}", ha="center", fontsize=8)
    panel.axhline(1, color="tab:blue", lw=1.5)
    panel.set_xlim(-0.6, len(titles) - 0.3)
    panel.text(len(titles) - 0.52, 1.03, "peft", color="tab:blue", fontsize=8)
    panel.set_xticks(range(len(titles)), titles, fontsize=8)
    panel.set_ylim(0, 1.2 * panel.get_ylim()[1])
    plain_panel(panel, "decoding: tokens a second, the faster of peft's = 1")


def draw(rows):
    """The whole picture: a column for each dtype of training, a row for decoding."""
    training = [row for row in rows if "of the limit" in row]
    decoding = {dtype: own for dtype in USUAL if (own := [
        row for row in rows if row["measure"] == "decode" and row["dtype"] == dtype])}
    heights = [4, 4, 2.5] if decoding else [4, 4]
    figure = new_figure(12, sum(heights))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for column, dtype in enumerate(USUAL):
        own = [row for row in training if row["dtype"] == dtype]
        if own:
            draw_rates(figure.add_subplot(grid[0, column]), own, dtype)
            draw_memory(figure.add_subplot(grid[1, column]), own, dtype)
    if decoding:
        draw_decoding(figure.add_subplot(grid[2, :]), decoding)
    return figure


@dataclasses.dataclass
class Settings:
    results: list = flag([], "files that bench train and decode have written")
    picture: str = flag("docs/speed.png", "where to draw")


def main(argv=None):
    settings = parse(Settings, argv, "Draw speed and memory beside peft's.", "results")
    rows = [row for path in settings.results
            for row in read_rows(path, ("machine", "measure", "dtype", "what"))]
    if len({row["machine"] for row in rows}) != 1:
        raise ValueError("got no rows, or those of several machines; expected files that "
                         "scripts.bench train and decode wrote on one machine; name them, or "
                         "measure again")
    if not save_pictures({settings.picture: (draw, rows)}):
        sys.exit(2)


if __name__ == "__main__":
    run_program(main)
