"""The page of layers: every figure beside its own number of layers."""
import pytest

from scripts import draw_layers
from scripts.draw_layers import METHODS, main
from scripts.results import write_rows


@pytest.fixture
def words(tmp_path):
    """The flags of a call whose results files are made up: every figure tells where it is from."""
    names = "real", "toy", "llama-cost", "toy-cost"
    files = {name: tmp_path / f"{name}.jsonl" for name in names}
    real = {"group": "layers", "model": "smollm2", "limit": 0}
    write_rows(files["real"], [
        {"name": f"layers-{n}", **real, "best_dev_loss": 2 - n / 100,
         "greedy": {"all": {"BLEU": 30 + n}, "said": {"near": 50 + n}}}
        for n in (20, 30, 5, 15, 10)] + [
        {"name": "layers-10", **real, "limit": 9}, {"name": "e2e-prefix", **real, "group": "x"}])
    toy = {"model": "tiny-gpt2", "references": "varied", "test_seed": 1, "tables": 200, "lr": 0.1,
           "size": 2000}
    def row(style, n, seed, **about):
        scores = [{"slots": 10 * n + seed, "exact": 20 * n, "bleu": 1} for _ in range(3)]
        return toy | {"style": style, "method": METHODS[n], "seed": seed} | dict(
            zip(("dev-kinds", "test-seen", "test-unseen"), scores)) | about
    write_rows(files["toy"], [row(style, n, seed) for style in ("near", "hard") for n in METHODS
                              for seed in (1, 2, 3)]
               + [row("near", 4, 7, references="one"), row("near", 4, 7, size=500)])
    for name, layers in (("llama-cost", (30, 20, 15, 10, 5)), ("toy-cost", (4, 3, 2, 1))):
        write_rows(files[name], [{"layers": n, "s/step": n / 10, "MB": n, "s/step over all":
                                  n / layers[0], "MB over all": n / layers[0]} for n in layers])
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- e2e -->\n<!-- end of e2e -->\nb\n<!-- toy -->\n<!-- end of toy -->\n")
    return [word for name, path in files.items() for word in (f"--{name}", str(path))] + [
        "--page", str(page), "--picture", str(tmp_path / "layers.png")]


def test_each_line_has_the_figures_of_its_layers(words, tmp_path):
    """Would catch: figures of another number of layers, of other tables, of a part of the tests."""
    main(words)
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(("| all 30", "| upper"))] == [
        "| all 30 | 115,200 | 1.700 | 60.0 | 80 % | 3 (100 %) | 30 (100 %) |",
        "| upper 20 | 76,800 | 1.800 | 50.0 | 70 % | 2 (67 %) | 20 (67 %) |",
        "| upper 15 | 57,600 | 1.850 | 45.0 | 65 % | 1.5 (50 %) | 15 (50 %) |",
        "| upper 10 | 38,400 | 1.900 | 40.0 | 60 % | 1 (33 %) | 10 (33 %) |",
        "| upper 5 | 19,200 | 1.950 | 35.0 | 55 % | 0.5 (17 %) | 5 (17 %) |"]
    toy = [line for line in lines if line.startswith(("| near |", "| hard |"))]
    assert len(toy) == 8
    assert toy[0] == ("| near | all 4 | 9,216 | 42.0 ± 1.0 / 42.0 ± 1.0 | 80.0 ± 0.0 / 80.0 ± 0.0 "
                      "| 1.0 ± 0.0 / 1.0 ± 0.0 | 0.4 (100 %) | 4 (100 %) |")
    assert toy[6].startswith("| hard | upper 2 | 4,608 | 22.0 ± 1.0 / ")
    assert toy[6].endswith(" | 0.2 (50 %) | 2 (50 %) |")


def test_the_picture_has_a_point_for_each_number_of_layers(words, monkeypatch):
    """Would catch: a curve over the wrong layers, or one that does not begin at 0."""
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    drawn = []
    monkeypatch.setattr(draw_layers, "save_pictures", lambda figures: drawn.extend(
        draw(*args) for draw, *args in figures.values()))
    main(words)
    quality, toy, cost, toy_cost = drawn[0].axes
    (line,), bars = quality.lines, toy.containers
    assert list(line.get_xdata()) == [30, 20, 15, 10, 5]
    assert list(line.get_ydata()) == [60, 50, 45, 40, 35]
    assert [list(bar.lines[0].get_ydata()) for bar in bars] == [[80, 60, 40, 20]] * 2 + [
        [42, 32, 22, 12]] * 2
    assert [list(line.get_xdata()) for line in cost.lines] == [[30, 20, 15, 10, 5]] * 2
    assert [list(line.get_ydata()) for line in toy_cost.lines] == [[100, 75, 50, 25]] * 2
    assert all(panel.get_ylim()[0] == 0 for panel in drawn[0].axes)


@pytest.mark.parametrize("name, gone, program", [
    ("real", '"layers-15"', "15 upper layers; .* -m scripts.real_data --only layers"),
    ("toy", '"hard", "method": "prefix 1 %, upper 2 of 4 layers", "seed": 3', "2 .*claims"),
    ("llama-cost", '"layers": 30', "30 upper layers; .*bench layers --model llama --out FILE"),
    ("toy-cost", '"layers"', "4, 3, 2, 1 upper layers; .*bench layers --model toy --out FILE")])
def test_a_curve_with_a_hole_is_refused(words, tmp_path, name, gone, program):
    """Would catch: a curve that leaves a point out, or a mean of two seeds, without a word."""
    path = tmp_path / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if gone not in line))
    assert len(path.read_text().splitlines()) < len(lines)
    with pytest.raises(ValueError, match=f"got {path} without all runs of {program}"):
        main(words)
