"""Draws docs/real_data.png and writes the tables of docs/real_data.md, from a file of real_data.py.

    python -m scripts.draw_real_data

Reads the results file and nothing else; the verdicts are those of the page's protocol. What has not
been run yet is said to be so, and is no point in the picture. Needs matplotlib for the picture;
without it the tables are still written.
"""
import dataclasses
import statistics
from pathlib import Path

from scripts.drawing import new_figure, plain_panel, save_pictures, write_between
from scripts.real_data_plan import DECIDES, GROUPS, MAIN_STEPS, MORE_SEEDS
from scripts.results import read_rows
from utils.cli import flag, parse, run_program

HOLDS, IN_PART, FAILS, WAITING = "holds", "in part", "does not hold", "not run yet"
SIZES = 50, 100, 500
COLOURS = {"prefix words": "tab:orange", "prefix uniform": "tab:red", "finetune": "tab:blue"}
NAMES = {"prefix words": "prefix from words", "prefix uniform": "prefix from random numbers",
         "finetune": "fine-tuning"}
# The paper's GPT-2 medium (345 M parameters, five epochs, beams): BLEU on the test sets, of WebNLG
# on seen / unseen / all categories. First version of the paper, January 2021.
PAPER = {"e2e-prefix": "69.7", "e2e-finetune": "68.2", "e2e-finetune-top2": "68.1",
         "webnlg-prefix": "62.9 / 45.6 / 55.1", "webnlg-finetune": "64.2 / 27.7 / 46.5"}
QUOTED = ("untrained", "main", "webnlg", "scitldr", "full")     # groups whose first texts are shown
PARTS = {"webnlg": ("seen", "unseen", "all")}


class Results:
    """The rows of a results file, and by their names those of the protocol's runs.

    Where the protocol's own were not run, those of `real_data --full` take their place. Raises
    ValueError where two rows have one name.
    """

    def __init__(self, rows):
        self.all = rows
        names = [row["name"] for row in rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"got more than one row of {', '.join(twice)}; expected one of each "
                             "run; delete the others from the results file")
        full = {row["name"].removeprefix("full-"): row for row in rows if row["group"] == "full"}
        self.rows = full | {row["name"]: row for row in rows if row["group"] in GROUPS}

    def score(self, name, part="all", how="greedy", score="BLEU"):
        """A score of a run; KeyError where it was not run."""
        return self.rows[name][how][part][score]

    def gap(self, ours, other, part="all", how="greedy"):
        """How far a run is ahead of another in BLEU: the mean over the seeds, where both have all
        of them, else of the first.
        """
        more = [f"-seed-{seed}" for seed in MORE_SEEDS]
        if not all(name + seed in self.rows for name in (ours, other) for seed in more):
            more = []
        return statistics.mean(self.score(ours + seed, part, how) - self.score(
            other + seed, part, how) for seed in ("", *more))

    def low(self, size, method):
        """(mean, lowest, highest) BLEU of the two samples of `size` pairs."""
        found = [self.score(f"low-{size}-{part}-{method.replace(' ', '-')}") for part in (1, 2)]
        return statistics.mean(found), min(found), max(found)


# ---- verdicts, by the protocol

def more_than_one(gap):
    """1 where a gap of BLEU is an advantage, -1 where a disadvantage, 0 where it counts as none."""
    gap = round(gap, 2)                 # as the scores are: 1.00 is not more than 1
    return 0 if abs(gap) <= 1 else 1 if gap > 0 else -1


def level(r):
    gaps = [r.gap("e2e-prefix", "e2e-finetune", how="beams"),
            r.gap("webnlg-prefix", "webnlg-finetune")]
    near = [more_than_one(gap) >= 0 for gap in gaps]
    return (f"E2E, beams {gaps[0]:+.2f} (greedy {r.gap('e2e-prefix', 'e2e-finetune'):+.2f}); "
            f"WebNLG {gaps[1]:+.2f}",
            HOLDS if all(near) else IN_PART if any(near) else FAILS)


def low_data(r, rival, both):
    """Words against `rival` with 50 and 100 pairs; both: in part only if nowhere behind."""
    gaps = [statistics.mean(r.gap(f"low-{size}-{part}-prefix-words", f"low-{size}-{part}-{rival}")
                            for part in (1, 2)) for size in (50, 100)]
    signs = [more_than_one(gap) for gap in gaps]
    in_part = max(signs) > 0 and (min(signs) >= 0 or not both)
    return (f"50 pairs {gaps[0]:+.2f}; 100 pairs {gaps[1]:+.2f}",
            HOLDS if min(signs) > 0 else IN_PART if in_part else FAILS)


def unseen(r):
    seen, new = (r.gap("webnlg-prefix", "webnlg-finetune", part) for part in ("seen", "unseen"))
    loses_less = more_than_one(new - seen) > 0
    return (f"unseen {new:+.2f}; seen {seen:+.2f}",
            HOLDS if more_than_one(new) > 0 else IN_PART if loses_less else FAILS)


def length(r):
    gap = r.gap("layers-30", "length-1")
    return (f"10 against 1 {gap:+.2f}; 100 against 10 {r.gap('length-100', 'layers-30'):+.2f}",
            HOLDS if more_than_one(gap) > 0 else FAILS)


def upper_layers(r):
    gap = r.gap("layers-20", "layers-30")
    return f"{gap:+.2f}", HOLDS if more_than_one(gap) >= 0 else FAILS


CLAIMS = (("0.1 % of the parameters is level with fine-tuning", level),
          ("ahead of fine-tuning when data are scarce", lambda r: low_data(r, "finetune", True)),
          ("carries over to unseen topics (prefix, fine-tuning)", unseen),
          ("real words are the better start when data are scarce",
           lambda r: low_data(r, "prefix-uniform", False)),
          ("better with length up to a point", length),
          ("the upper 20 of 30 layers are nearly enough (not the paper's)", upper_layers))


def verdicts(results):
    """(claim, difference of BLEU, verdict) for each claim."""
    for claim, judge in CLAIMS:
        try:
            yield claim, *judge(results)
        except KeyError:
            yield claim, "", WAITING


# ---- the page

def run_line(row):
    """One run as a row of the table of all runs."""
    cells, score = [], DECIDES.get(row["data"], "BLEU")
    for how in ("greedy", "beams"):
        parts = row.get(how) or {}         # "beams" is false where none was asked for
        cells.append(" / ".join(f"{score} " * (score != "BLEU") + f"{parts[part][score]:.1f}"
                                for part in PARTS.get(row["data"], ("all",)) if part in parts))
    said = (row.get("greedy") or {}).get("said", {})
    near = f"{said['near']:.0f} %" if said else ""
    dev = f"{row['best_dev_loss']:.3f}" if "best_dev_loss" in row else ""
    rate = f"{row['lr']:g}" if "lr" in row else ""
    minutes = f"{row['train_seconds'] / 60:.0f}" if "train_seconds" in row else ""
    paper = PAPER.get(row["name"].removeprefix("full-"), "")
    return (f"| {row['name']} | {rate} | {row.get('steps', '')} | {dev} | {' | '.join(cells)} | "
            f"{near} | {minutes} | {row.get('peak_MB', '')} | {paper} |")


def quoted(row):
    """The first texts of a run's test set, as they came."""
    lines = [f"**{row['name']}**, greedy, the first {len(row['texts'])} of the test set"
             + (" (unseen categories)" if row["data"] == "webnlg" else "") + ", not picked:", ""]
    for source, text in row["texts"]:
        source = source if len(source) < 400 else source[:400] + " ..."
        lines += [f"- `{source.strip()}`<br>{text.strip() or '(nothing)'}"]
    return [*lines, ""]


def page_text(results):
    """The verdicts, every run, and what the runs say, in Markdown."""
    lines = ["| claim | difference of BLEU | verdict |", "|---|---|---|"]
    lines += [f"| {number}. {claim} | {found} | **{verdict}** |"
              for number, (claim, found, verdict) in enumerate(verdicts(results), 1)]
    lines += ["", "WebNLG: seen / unseen / all. The last column is the paper's GPT-2 medium, five "
              "epochs. Minutes are those of training on the machine below, which had other work "
              "too: they are no measurement of speed.", "",
              "| run | rate | steps | dev loss | BLEU, greedy | BLEU, 5 beams | says what is near, "
              "greedy | minutes | MB | paper |", "|---|---|---|---|---|---|---|---|---|---|"]
    lines += map(run_line, results.all)
    machines = sorted({f"{row['machine']}, PyTorch {row['torch']}, {row['date']}"
                       for row in results.all})
    lines += ["", f"Machines and days: {'; '.join(machines)}. Commits: see the file.", ""]
    for row in results.all:
        if row["group"] in QUOTED and "texts" in row:
            lines += quoted(row)
    return "\n".join(lines).rstrip()


# ---- the picture

def draw(results):
    """BLEU on E2E against the number of pairs that were learned from."""
    figure = new_figure(7, 4.5)
    panel = figure.subplots()
    for method, colour in COLOURS.items():
        points = []
        for size in SIZES:
            if all(f"low-{size}-{part}-{method.replace(' ', '-')}" in results.rows
                   for part in (1, 2)):
                points.append((size, *results.low(size, method)))
        if points:
            sizes, means, lows, highs = zip(*points)
            panel.errorbar(sizes, means, [[m - low for m, low in zip(means, lows)],
                                          [high - m for m, high in zip(means, highs)]],
                           color=colour, marker="o", capsize=3, label=NAMES[method])
    for method, colour in (("prefix", "tab:orange"), ("finetune", "tab:blue")):
        if f"e2e-{method}" in results.rows:
            panel.plot([12 * MAIN_STEPS], [results.score(f"e2e-{method}")], marker="D", ls="",
                       color=colour,
                       label=f"{NAMES.get(method, 'prefix')}, {MAIN_STEPS} steps of 12")
        panel.plot([42_061], [float(PAPER[f"e2e-{method}"])], marker="*", ls="", ms=10,
                   color=colour, label=f"paper, GPT-2 medium: {NAMES.get(method, 'prefix')}")
    if "template-e2e" in results.rows:
        panel.axhline(results.score("template-e2e"), color="grey", ls=":", label="template by hand")
    panel.set_xscale("log")
    panel.set_xlabel("pairs that were learned from")
    panel.set_ylabel("BLEU on E2E's test set")
    plain_panel(panel, f"{results.all[0]['model']}, greedy; bars: two samples; stars: 5 beams")
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)
    return figure


@dataclasses.dataclass
class Settings:
    results: str = flag("docs/results/real-data.jsonl", "the results file of real_data.py")
    model: str = flag("smollm2", "of which model's runs")
    page: str = flag("docs/real_data.md", "where to write the tables, between two marks")
    picture: str = flag("docs/real_data.png", "where to draw")


def main(argv=None):
    settings = parse(Settings, argv, "Draw the claims on real data, and write their tables.")
    rows = [row for row in read_rows(settings.results, ("name", "model", "limit"))
            if (row["model"], row["limit"]) == (settings.model, 0)]
    if not rows:
        raise ValueError(f"got {settings.results} without runs of {settings.model} on whole test "
                         "sets; expected some; run `python -m scripts.real_data` first")
    results = Results(rows)
    write_between(Path(settings.page), "results", page_text(results))
    for claim, found, verdict in verdicts(results):
        print(f"{claim}: {found} {verdict}")
    save_pictures({settings.picture: (draw, results)})


if __name__ == "__main__":
    run_program(main)
