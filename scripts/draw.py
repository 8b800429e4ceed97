"""Pictures of a run: the loss curve, where the attention goes, and one page with everything.

    python -m scripts.draw out/NAME                 writes loss.png, lambda.png and page.html there
    python -m scripts.draw prefixes/smollm2-e2e --data-dir DIR --out pictures

The page needs no network and no script. Without matplotlib it has no pictures, but the same
figures as tables. Not here: how lambda is measured (attention_shares.py), the scores (evaluate.py).
"""
import base64
import dataclasses
import html
from pathlib import Path
from types import SimpleNamespace

import torch

import sample
from data import own, tasks
from data.pairs import pairs_of, tokenized
from prefix import tensors_of
from scripts.attention_shares import attention_shares
from scripts.drawing import new_figure, plain_panel, render, save_pictures
from scripts.results import read_rows
from train import Trainer
from utils.cli import flag, parse, run_program
from utils.files import atomic_write, read_json, read_json_object

CSS = """
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif;
       color: #222; background: #fff }
img { max-width: 100% } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-size: 14px }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ccc; text-align: left;
         vertical-align: top; overflow-wrap: anywhere }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclasses.dataclass
class Settings:
    run: str = flag("", "directory of a training run, out/NAME")
    out: str = flag("", "directory to write to; left out: that of the run")
    data: str = flag("", "another data set than the one of the run, by name or .jsonl")
    data_dir: str = flag("", "read the data set from here; left out: as the run did")
    examples: int = flag(8, "of the dev set, spread over it: read and decoded", within=(1, 10 ** 9))
    max_new_tokens: int = flag(None, "as in sample.py", kind=int, within=(1, 100_000))
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")


# ---- the figures

def learning_rates(settings):
    """The learning rate of every step of a run with these settings, by train.py's own rule."""
    s = SimpleNamespace(**settings)
    return [Trainer.learning_rate(SimpleNamespace(settings=s, step=n)) for n in range(s.steps)]


def losses_of(log, name):
    """(steps, values) of the lines of log.jsonl that have `name`."""
    rows = [row for row in log if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def draw_losses(log, settings):
    """The losses, in training and on the dev set, and below them the learning rate."""
    figure = new_figure(8, 4.5)
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    losses.plot(*losses_of(log, "loss"), color="tab:blue", lw=1, label="train, mean of 10 steps")
    steps, dev = losses_of(log, "dev_loss")
    losses.plot(steps, dev, color="tab:orange", marker="o", ms=4,
                label=f"dev, best {min(dev):.3f}" if dev else "dev")
    losses.set_ylabel("nats per target token")
    losses.set_ylim(bottom=0)
    losses.legend(frameon=False, fontsize=9)
    plain_panel(losses, "loss")
    rates.plot(learning_rates(settings), color="0.4", lw=1)
    rates.ticklabel_format(axis="y", scilimits=(-2, 2))
    rates.set_ylim(bottom=0)
    rates.set_xlabel("step")
    plain_panel(rates, "learning rate")
    return figure


def heat_map(panel, values, title, numbers=False):
    """values (L, columns) from 0 to 1 as colours, layer 0 at the bottom. Returns the image."""
    image = panel.imshow(values.numpy(), aspect="auto", origin="lower", vmin=0, vmax=1)
    if numbers:
        for layer, row in enumerate(values.tolist()):
            for column, value in enumerate(row):
                panel.text(column, layer, f"{value:.2f}", ha="center", va="center", fontsize=6,
                           color="white" if value < 0.6 else "black")
    panel.set_ylabel("layer")
    panel.set_yticks(range(0, len(values), 1 + len(values) // 16))
    panel.set_title(title, fontsize=9, loc="left")
    return image


def draw_shares(shares, tokens):
    """A row for each place of a prefix: lambda by layer and head, and along the first text.

    shares: {place: [(L, H, T) of each text]}. tokens: {place: [words of the first text]}.
    """
    columns = max(3, min(13, 0.13 * max(map(len, tokens.values()))))            # in inches
    sizes = [0.34 * next(iter(shares.values()))[0].size(1) + 0.6, columns]
    heights = [max(2.2, 0.18 * len(texts[0])) for texts in shares.values()]
    figure = new_figure(sum(sizes) + 1.2, sum(heights) + len(shares) + 0.3)
    panels = figure.subplots(len(shares), 2, squeeze=False, width_ratios=sizes,
                             height_ratios=heights)
    for (heads, text), (place, texts) in zip(panels, shares.items()):
        heat_map(heads, torch.cat(texts, 2).mean(2), f"{place}: mean of {len(texts)} texts", True)
        heads.set_xticks(range(texts[0].size(1)))
        heads.set_xlabel("head")
        image = heat_map(text, texts[0].mean(1), f"{place}: along one text, mean of the heads")
        text.set_xlabel("token that attends (■: no text)")
        if len(tokens[place]) <= 100:
            text.set_xticks(range(len(tokens[place])), tokens[place], rotation=90, fontsize=7,
                            parse_math=False)
    figure.colorbar(image, ax=panels, shrink=min(1, 4 / sum(heights)), aspect=20)
    figure.suptitle("λ: the share of the attention that goes to the prefix, 0 to 1", fontsize=10)
    return figure


# ---- what is measured

def spread(examples, n):
    """n of the examples, or all, evenly spread: files are sorted by name."""
    return examples[::max(1, len(examples) // n)][:n]


def shares_of(generator, prefix, examples, limits):
    """Lambda on each example with its first reference, as `draw_shares` takes it: (shares, tokens);
    places without a prefix are left out. limits: of source and target, as in train.py.
    """
    model, tokenizer, kind = generator.model, generator.tokenizer, pairs_of(generator.model)
    n_prefix = max(part.size(4) for part in tensors_of(prefix))
    first = [dataclasses.replace(e, targets=e.targets[:1]) for e in examples]
    pairs, _ = kind.encode(tokenized(first, tokenizer), kind.token_limit(model, n_prefix, *limits))
    names = prefix._fields if isinstance(prefix, tuple) else ("prefix",)
    used = [name for name, part in zip(names, tensors_of(prefix)) if part.size(4)]
    read = [attention_shares(model, prefix, pair) for pair in pairs]
    tokens = {place: [(tokenizer.decode([i]) if i != tokenizer.eos_token_id else "").replace(
        "\n", "↵") or "■" for i in read[0][place][0]] for place in used}
    return {place: [own[place][1] for own in read] for place in used}, tokens


def outputs_of(generator, method, examples):
    """{column: [text of each example]}, greedy: before, where a prefix learned, and after."""
    sources = [e.source for e in examples]
    after, usual = generator.generate(sources), generator.prefixes
    columns = {"source": sources}
    if method == "prefix":
        generator.prefixes = {run: generator.model.empty_prefix() for run in usual}
        columns["without the prefix"] = generator.generate(sources)
        generator.prefixes = usual
    return columns | {f"with {method}": after, "first reference": [e.targets[0] for e in examples]}


# ---- the page

def table(caption, header, rows):
    def line(kind, cells):
        return "<tr>" + "".join(f"<{kind}>{html.escape(str(c))}</{kind}>" for c in cells) + "</tr>"
    return "\n".join([f"<p>{html.escape(caption)}</p>\n<table>", line("th", header),
                      *(line("td", row) for row in rows), "</table>"])


def image(name, draw, *args):
    """A figure inside the page, as SVG; nothing without matplotlib."""
    picture = render(draw, *args, form="svg")
    return picture and (f'<p><img alt="{html.escape(name)}" src="data:image/svg+xml;base64,'
                        f'{base64.b64encode(picture).decode()}"></p>')


def loss_table(log):
    steps, values = losses_of(log, "dev_loss")
    _, speeds = losses_of(log, "tokens_per_second")
    speed = f"; {sorted(speeds)[len(speeds) // 2]:,} tokens a second (median)" if speeds else ""
    return table(f"dev loss, nats per target token{speed}", ["step", "dev loss"],
                 [(step, f"{value:.3f}") for step, value in zip(steps, values)])


def share_table(place, texts):
    """Lambda of each layer, over the tokens of all texts."""
    heads = torch.cat(texts, 2).mean(2)                                         # (L, H)
    lowest, highest = heads.min(1), heads.max(1)
    return table(
        f"λ of the {place}, mean over the tokens of {len(texts)} texts: {heads.mean():.3f} in all",
        ["layer", "mean of the heads", "lowest", "head", "highest", "head"],
        [(n, f"{heads[n].mean():.3f}", f"{lowest[0][n]:.3f}", lowest[1][n].item(),
          f"{highest[0][n]:.3f}", highest[1][n].item()) for n in range(len(heads))])


def score_table(path):
    found = read_json_object(path)
    names = list(dict.fromkeys(name for part in found["scores"].values() for name in part))
    about = ", ".join(f"{key} {value}" for key, value in found.items() if key != "scores")
    return table(f"{path.name}: {about}", ["", *names], [
        (part, *(round(numbers[name], 2) if name in numbers else "-" for name in names))
        for part, numbers in found["scores"].items()])


def page(run, about, log, shares, tokens, outputs):
    """The whole page as text."""
    settings = about["settings"]
    names = ("method", "prefix_len", "lr", "steps", "batch_size", "seed")
    main = ", ".join(f"{name} {settings[name]}" for name in names if name in settings)
    parts = [f"<p>{html.escape(main)}<br>{html.escape(about.get('parameters', ''))}</p>"]
    if log:
        parts += ["<h2>Loss</h2>", image("loss curve", draw_losses, log, settings), loss_table(log)]
    if shares:
        parts += ["<h2>Attention to the prefix</h2>",
                  "<p>λ is the share of a head's attention that goes to the prefix: its output is "
                  "(1 - λ) times what the text alone gives plus λ times the prefix's part.</p>",
                  image("lambda by layer, head and token", draw_shares, shares, tokens),
                  *(share_table(place, texts) for place, texts in shares.items())]
    parts += ["<h2>Outputs</h2>", table("greedy, dev set", outputs, zip(*outputs.values()))]
    scores = sorted(Path(run).glob("*scores.json"))
    parts += ["<h2>Scores</h2>"] * bool(scores) + [score_table(path) for path in scores]
    versions = {"fingerprint": about["fingerprint"], "commit": about.get("commit")}
    versions |= about.get("environment") or about.get("versions", {})
    parts += ["<h2>Settings</h2>",
              table("config.json", ["name", "value"], (settings | versions).items())]
    title = f"{settings['model']}, {settings['data']}: {Path(run).resolve().name}"
    return PAGE.format(title=html.escape(title), css=CSS, body="\n".join(filter(None, parts)))


def main(argv=None):
    s = parse(Settings, argv, "Draw a run of train.py, and make one page of it.", "run")
    if not s.run:
        raise ValueError("got no run; expected its directory; `python -m scripts.draw out/NAME`")
    generator = sample.Generator(sample.Settings(run=[s.run], num_beams=1, device=s.device,
                                                 max_new_tokens=s.max_new_tokens))
    about = read_json(Path(s.run) / "config.json")
    settings, log = about["settings"], read_rows(Path(s.run) / "log.jsonl")
    examples = spread(tasks.load(s.data or settings["data"], "dev", s.data_dir
                                 or settings["data_dir"] or None, keys=own.keys_of(settings)),
                      s.examples)
    prefix, = generator.prefixes.values()
    shares, tokens = shares_of(generator, prefix, examples,
                               (settings.get("max_source"), settings.get("max_target")))
    outputs, out = outputs_of(generator, settings["method"], examples), Path(s.out or s.run)
    figures = {}
    if log:                                     # a prefix of peft's has none
        figures[out / "loss.png"] = draw_losses, log, settings
    if shares:                                  # fine-tuning has no prefix
        figures[out / "lambda.png"] = draw_shares, shares, tokens
    save_pictures(figures)
    with atomic_write(out / "page.html", "w") as file:
        file.write(page(s.run, about, log, shares, tokens, outputs))
    print(out / "page.html")


if __name__ == "__main__":
    run_program(main)
