"""Draws docs/layers.png and the tables of docs/layers.md: a prefix in the upper layers only.

    python -m scripts.draw_layers

The scores are those of real_data.py's runs (SmolLM2 on E2E) and of claims.py's (the toy world), the
cost of a step is that of `python -m scripts.bench layers`, for both models' shapes. Reads these
files and nothing else. Needs matplotlib for the picture; without it the tables are still written.
"""
import dataclasses
from pathlib import Path

from scripts.draw_claims import KEYS, SCORES, SMALL, SPLITS, UPPER, Results, of_the_plan
from scripts.drawing import new_figure, plain_panel, save_pictures, write_between
from scripts.results import read_rows
from utils.cli import flag, parse, run_program

NUMBERS = {"llama": 2 * 10 * 3 * 64, "toy": 2 * 9 * 128}      # that a prefix stores for each layer
LAYERS = 30, 20, 15, 10, 5                                      # of SmolLM2's runs
METHODS = {4: SMALL} | {n: method for method, n in UPPER.items()}           # of the toy's runs
COLOURS = {"near": "tab:orange", "hard": "tab:purple"}


def which(n, total):
    return f"all {total}" if n == total else f"upper {n}"


def cost_cells(cost, n):
    """What a step takes with a prefix in n layers, beside one in all, as cells of a table."""
    if n not in cost:
        return ""
    row = cost[n]
    return (f"{row['s/step']:.3g} ({row['s/step over all']:.0%}) | "
            f"{row['MB']:.0f} ({row['MB over all']:.0%})").replace("%", " %")


def e2e_table(runs, cost):
    """runs: layers -> row of real_data.py; cost: layers -> row of the bench."""
    lines = ["| layers with a prefix | numbers stored | dev loss | BLEU, greedy | "
             "says what is near | seconds a step | MB |", "|---|---|---|---|---|---|---|"]
    for n, row in runs.items():
        lines.append(f"| {which(n, 30)} | {NUMBERS['llama'] * n:,} | {row['best_dev_loss']:.3f} | "
                     f"{row['greedy']['all']['BLEU']:.1f} | {row['greedy']['said']['near']:.0f} % "
                     f"| {cost_cells(cost, n) or ' | '} |")
    return "\n".join(lines)


def toy_table(results, cost):
    lines = ["| style | layers with a prefix | numbers stored | slots seen / unseen | exact seen / "
             "unseen | BLEU seen / unseen | seconds a step | MB |",
             "|---|---|---|---|---|---|---|---|"]
    for style in COLOURS:
        for n, method in METHODS.items():
            cells = (" / ".join("{:.1f} ± {:.1f}".format(
                *results.best(style, 2000, method, split, score)) for split in SPLITS)
                for score in SCORES)
            lines.append(f"| {style} | {which(n, 4)} | {NUMBERS['toy'] * n:,} | "
                         f"{' | '.join(cells)} | {cost_cells(cost, n) or ' | '} |")
    return "\n".join(lines)


def draw(runs, results, costs):
    """Above: what is said; below: what a step takes. Left: SmolLM2 on E2E; right: the toy world."""
    figure = new_figure(10, 6)
    (left, right), below = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2))
    left.plot(list(runs), [row["greedy"]["all"]["BLEU"] for row in runs.values()], marker="o",
              color=COLOURS["near"])
    left.set_ylim(0, 70)
    left.set_ylabel("BLEU on E2E's test set")
    plain_panel(left, "SmolLM2-135M, 240 steps of 12 pairs, one seed")
    for style, score in (("near", "exact"), ("hard", "slots")):
        for split, line in zip(SPLITS, ("-", "--")):
            means, deviations, _ = zip(*(results.best(style, 2000, method, split, score)
                                         for method in METHODS.values()))
            right.errorbar(list(METHODS), means, deviations, marker="o", capsize=3, ls=line,
                           color=COLOURS[style],
                           label=f"{style} style, {SCORES[score]}, {SPLITS[split]}")
    right.set_ylim(0, 103)
    right.set_ylabel("% of 200 tables")
    right.legend(fontsize=7)
    plain_panel(right, "the toy world: means of 3 seeds, bars one standard deviation")
    for panel, cost in zip(below, costs):
        for column, name, line in (("s/step over all", "time of a step", "-"),
                                   ("MB over all", "memory of a step", "--")):
            panel.plot(list(cost), [100 * row[column] for row in cost.values()], marker="o",
                       color="tab:grey", ls=line, label=name)
        panel.set_ylim(0, 105)
        panel.set_ylabel("% of a prefix in all layers")
        panel.set_xlabel(f"upper layers, of {max(cost)}, that have a prefix")
        panel.set_xticks(sorted(cost))
        panel.legend(fontsize=7)
        plain_panel(panel, "")
    for panel in (left, right, *below):
        panel.grid(alpha=0.3)
    return figure


@dataclasses.dataclass
class Settings:
    real: str = flag("docs/results/real-data.jsonl", "the results file of real_data.py")
    toy: str = flag("docs/results/claims.jsonl", "the results file of claims.py")
    llama_cost: str = flag("docs/results/layers-llama.jsonl", "of `bench layers --model llama`")
    toy_cost: str = flag("docs/results/layers-toy.jsonl", "of `bench layers --model toy`")
    page: str = flag("docs/layers.md", "where to write the tables, between two marks")
    picture: str = flag("docs/layers.png", "where to draw")


def main(argv=None):
    settings = parse(Settings, argv, "Draw what a prefix in the upper layers only loses and saves.")
    runs = {int(row["name"].removeprefix("layers-")): row
            for row in read_rows(settings.real, ("name", "group", "model", "limit"))
            if (row["group"], row["model"], row["limit"]) == ("layers", "smollm2", 0)}
    runs = dict(sorted(runs.items(), reverse=True))
    results = Results(of_the_plan(read_rows(settings.toy, KEYS)))
    costs = [{row["layers"]: row for row in read_rows(path, ("layers", "s/step", "MB"))}
             for path in (settings.llama_cost, settings.toy_cost)]
    toy = [n for n, method in METHODS.items() if all(
        len(results.runs(style, 2000, method, lr)) == 3
        for style in COLOURS for lr in results.rates(style, 2000, method) or [None])]
    for path, wanted, there, command in (
            (settings.real, LAYERS, runs, "real_data --only layers"),
            (settings.toy, METHODS, toy, "claims --sizes 2000"),
            (settings.llama_cost, LAYERS, costs[0], "bench layers --model llama --out FILE"),
            (settings.toy_cost, METHODS, costs[1], "bench layers --model toy --out FILE")):
        missing = [str(n) for n in wanted if n not in there]
        if missing:
            raise ValueError(f"got {path} without all runs of {', '.join(missing)} upper layers; "
                             f"expected the whole curve; run `python -m scripts.{command}` first")
    write_between(Path(settings.page), "e2e", e2e_table(runs, costs[0]))
    write_between(Path(settings.page), "toy", toy_table(results, costs[1]))
    save_pictures({settings.picture: (draw, runs, results, costs)})


if __name__ == "__main__":
    run_program(main)
