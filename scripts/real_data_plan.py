"""Which runs docs/real_data.md's protocol has: their flags, seeds and rates, and the score that
decides. Not here: how one is carried out (real_data.py), the verdicts (draw_real_data.py).
"""
import typing

RATES = {"prefix": (5e-4, 1e-3, 2e-3), "finetune": (3e-5, 1e-4, 3e-4),
         "finetune-top2": (1e-4, 3e-4, 1e-3)}
SHARED = ("--batch-size", "12", "--share-source", "3", "--warmup", "20", "--dev-pairs", "100")
LOW_METHODS = "prefix words", "prefix uniform", "finetune"
LOW = {50: 100, 100: 100, 500: 200}             # pairs to learn from -> steps of 10
MAIN_STEPS = 720                                # of 12 pairs each, on E2E
MORE_SEEDS = 102, 103       # beside train.py's 101, where a verdict hangs on it
DECIDES = {"scitldr": "R-L"}                    # else BLEU
GROUPS = ("untrained", "grid", "low-grid", "layers", "low", "main", "length", "webnlg", "scitldr",
          "seeds")


class Run(typing.NamedTuple):
    group: str
    name: str
    data: str
    flags: tuple = ()       # of train.py; (): nothing is trained
    beams: bool = False     # decode with the paper's beams, too


def best_rate(rows, group, method):
    """The rate with the lowest dev loss in the grid of a method; None while one is missing."""
    losses = {row["lr"]: row["best_dev_loss"] for row in rows
              if row["group"] == group and row["method"] == method}
    rates = RATES[method.split()[0]]
    return min(rates, key=losses.get) if {*rates} <= losses.keys() else None


def incomplete_grids(rows):
    """The groups of rates that some runs still wait for."""
    return [group for group, methods in (("grid", RATES), ("low-grid", LOW_METHODS))
            if not all(best_rate(rows, group, method) for method in methods)]


def method_flags(method, lr, length=10):
    """The flags of a method: "prefix words" starts from the paper's "table-to-text:", "prefix
    uniform" at random, both with the length of those words, 6.
    """
    kind, *init = method.split()
    flags = ["--method", kind, "--lr", str(lr)]
    if init:
        flags += ["--init", *init]
    if kind == "prefix" and init != ["words"]:
        flags += ["--prefix-len", "6" if init else str(length)]
    if kind == "prefix":
        flags += ["--mid-dim", "512"]       # for summaries train.py would take 800
    return tuple(flags)


def train_runs(group, name, data, method, rates, *flags, beams=False, length=10):
    """One run for each of `rates`; no run where the grid has not decided yet (None)."""
    return [Run(group, f"{name}-{lr:g}" if "grid" in group else name, data,
                (*method_flags(method, lr, length), *flags), beams) for lr in rates if lr]


def plan(rows):
    """Every run whose rate is known from the rows so far, by docs/real_data.md."""
    runs = [Run("untrained", f"{what}-{data}", data) for what in ("template", "chat")
            for data in ("e2e", "webnlg")] + [Run("untrained", "chat-scitldr", "scitldr")]
    for method, rates in RATES.items():
        runs += train_runs("grid", f"grid-{method}", "e2e", method, rates, *SHARED, "--steps",
                           "60", "--dev-every", "20")
    for method in LOW_METHODS:
        name = method.replace(" ", "-")
        runs += train_runs("low-grid", f"low-grid-{name}", "low-100-1", method,
                           RATES[method.split()[0]], *low_flags(100))
        for size in LOW:
            for part in (1, 2):
                runs += train_runs("low", f"low-{size}-{part}-{name}", f"low-{size}-{part}",
                                   method, [best_rate(rows, "low-grid", method)],
                                   *low_flags(size))
    best = {method: [best_rate(rows, "grid", method)] for method in RATES}
    for first in (0, 10, 15, 20, 25):
        runs += train_runs("layers", f"layers-{30 - first}", "e2e", "prefix", best["prefix"],
                           *SHARED, "--steps", "240", "--prefix-layers", f"{first}-29")
    for method in RATES:
        runs += train_runs("main", f"e2e-{method}", "e2e", method, best[method], *SHARED,
                           "--steps", str(MAIN_STEPS), beams=True)
    for length in (1, 100):
        runs += train_runs("length", f"length-{length}", "e2e", "prefix", best["prefix"], *SHARED,
                           "--steps", "240", length=length)
    # With the rate of the grid WebNLG's prefix diverged (docs/real_data.md), so it has half of it.
    half = {"webnlg": {"prefix": [rate and rate / 2 for rate in best["prefix"]]}}
    for data, steps in (("webnlg", "500"), ("scitldr", "240")):
        for method in ("prefix", "finetune"):
            rates = half.get(data, best).get(method, best[method])
            runs += train_runs(data, f"{data}-{method}", data, method, rates, *SHARED,
                               "--steps", steps)
    return runs


def low_flags(size):
    """The flags of train.py for little data; all of its dev set is used, as it is small."""
    steps = LOW[size]
    return ("--batch-size", "10", "--steps", str(steps), "--warmup", "20", "--dev-every",
            str(steps // 10), "--dev-pairs", "0")


def repeats(runs, names):
    """The runs of these names with two more seeds. A group of their own: nothing counts twice.

    Raises ValueError for a name that `runs` does not have, or that no seed changes.
    """
    able = {run.name: run for run in runs if run.flags and "grid" not in run.group}
    unknown = {*names} - {*able}
    if unknown:
        raise ValueError(f"got --again {sorted(unknown)}; expected runs that learn and are planned "
                         f"so far: {', '.join(able) or 'none'}; a run is planned when its grid is "
                         "complete")
    return [able[name]._replace(group="seeds", name=f"{name}-seed-{seed}",
                                flags=(*able[name].flags, "--seed", str(seed)))
            for name in dict.fromkeys(names) for seed in MORE_SEEDS]


def full_plan():
    """The paper's own runs: no flag but the method, so every setting is that of its table 6."""
    return [Run("full", f"full-{data}-{method}", data, ("--method", method), True)
            for data in ("e2e", "webnlg", "dart") for method in RATES]
