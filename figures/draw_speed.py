"""Draws figures/speed.png from the JSON lines of bench.py train and decode.

    python figures/draw_speed.py figures/results/*-fp32.jsonl figures/results/*-bf16.jsonl

Reads these files and nothing else; all have to be of one machine. Needs matplotlib.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
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
    panel.spines[["top", "right"]].set_visible(False)


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
    panel.set_title(f"a step of training, {dtype}: real tokens a second, {USUAL[dtype]} = 1\n"
                    "mark: the multiplications alone; %: how near to it",
                    fontsize=9, loc="left")


def draw_memory(panel, rows, dtype):
    """What a step adds to the memory, in megabytes."""
    bars = list(places(rows))
    for height, row in bars:
        panel.barh(height, row["MB"], color=colour(row["form"]))
        panel.text(row["MB"], height, f"  {row['MB']:,.0f} MB", va="center", fontsize=8)
    name_bars(panel, bars)
    panel.set_xlim(0, 1.2 * max(row["MB"] for row in rows))
    panel.set_title(f"memory that a step adds, {dtype}", fontsize=9, loc="left")


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
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title("decoding: tokens a second, the faster of peft's = 1", fontsize=9, loc="left")


def draw(lines):
    """The whole picture: a column for each dtype of training, a row for decoding."""
    from matplotlib import pyplot
    training = [line for line in lines if "of the limit" in line]
    decoding = {dtype: rows for dtype in USUAL if (rows := [
        line for line in lines if line["measure"] == "decode" and line["dtype"] == dtype])}
    heights = [4, 4, 2.5] if decoding else [4, 4]
    figure = pyplot.figure(figsize=(12, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for column, dtype in enumerate(USUAL):
        rows = [line for line in training if line["dtype"] == dtype]
        if rows:
            draw_rates(figure.add_subplot(grid[0, column]), rows, dtype)
            draw_memory(figure.add_subplot(grid[1, column]), rows, dtype)
    if decoding:
        draw_decoding(figure.add_subplot(grid[2, :]), decoding)
    return figure


def main(*paths):
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    if len({line["machine"] for line in lines}) != 1:
        raise SystemExit("got no figures, or those of several machines; expected files that "
                         "bench.py train and decode wrote on one machine; measure again")
    try:
        draw(lines).savefig(HERE / "speed.png", dpi=110)
    except ImportError:
        raise SystemExit("got no package matplotlib; expected it, to draw with; `pip install "
                         "matplotlib`")


if __name__ == "__main__":
    main(*sys.argv[1:])
