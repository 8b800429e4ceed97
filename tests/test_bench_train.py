"""A race is fair only where everybody learns the same from the same: a step beside peft's."""
import copy
import importlib.util
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import bench
import bench_train
from bench_train import added, kinds_of_batches, make_batch, multiplications, some_pairs, useful
from data.sequence import Pair
from model import GPT2Config
from prefix import Prefix

SPEC = importlib.util.spec_from_file_location("draw_speed", ROOT / "figures" / "draw_speed.py")
draw_speed = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw_speed)
SMALL = GPT2Config(211, 128, 24, 2, 4)


def rivals_or_skip():
    pytest.importorskip("peft", reason="the rival: pip install peft")
    pytest.importorskip("transformers", reason="the rival: pip install transformers")


def test_all_forms_have_the_same_loss_and_gradient():
    """Would catch: a rival that reads padding, another prefix or other weights, a loss on the
    source too; a trie whose targets see each other.
    """
    rivals_or_skip()
    model = bench_train.random_model(SMALL, torch.device("cpu"), torch.float32)
    for parameter in model.parameters():        # far from where all words are equally likely
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.manual_seed(3)
    start = Prefix(SMALL, bench_train.P, mid_dim=0)
    half = copy.deepcopy(model).to(torch.bfloat16)
    batches = kinds_of_batches(some_pairs("train", SMALL, ""), 8, 1, model)
    reference = bench_train.ours("reference", model, start)

    def off_of(frozen):
        fast = bench_train.laid_out(frozen)
        forms = bench_train.all_forms(model, frozen, fast, start, 8, compiled=False)
        return bench_train.differences(forms, reference, batches)
    off = off_of(model)
    assert {"ours, source shared", "peft, sdpa", "peft, eager, random"} <= off.keys()
    for name, (loss, gradient) in off.items():          # fp32's rounding over a few layers: 1e-6
        assert loss < 1e-5 and gradient < 1e-4, name
    off = off_of(half)
    assert {"ours", "peft, autocast", "peft, autocast, random"} <= off.keys()
    own = off["ours"]                           # bf16's rounding, as large as ours finds it
    for name, (loss, gradient) in off.items():
        assert loss < 10 * own[0] + 1e-3 and gradient < 3 * own[1], name


def test_the_tokens_of_a_batch_are_counted_without_padding(model):
    """Would catch: padding sold as speed; a shared source that counts as work done."""
    batch = make_batch([Pair([1, 2, 3, 4, 5], 3), Pair([1, 2, 3, 4], 3), Pair([7, 8], 1)], model)
    assert (batch.tokens, batch.read, batch.targets) == (11, 8, 4)
    # The two sources, 3 + 1, and of the targets all but each one's last: 1 + 0 + 0. The 4 behind
    # the first source is said twice.
    assert (batch.once, batch.said) == (5, 3)
    assert batch.ids.shape == (3, 5) and batch.real.sum() == 11
    assert batch.labels.tolist() == [[-100, -100, -100, 4, 5], [-100, -100, -100, 4, -100],
                                     [-100, 8, -100, -100, -100]]


def test_the_limit_does_exactly_the_useful_multiplications(model):
    """Would catch: a limit that is too low or too high, so that we seem nearer to it or farther.
    """
    from torch.utils.flop_counter import FlopCounterMode
    batch = make_batch([Pair([1, 2, 3, 4, 5], 3), Pair([1, 2, 3, 6], 3)], model)
    with FlopCounterMode(display=False) as counted:
        multiplications(model)(batch)
    assert counted.get_total_flops() == useful(model.config, batch.read, batch.targets)
    start = Prefix(model.config, 3, mid_dim=0).double()
    # One source that is read once, no padding: then only attention comes on top.
    pairs = [Pair([1, 2, 3, 4, 5, 6], 3), Pair([1, 2, 3, 4, 8, 7], 3)]
    form, batch = bench_train.ours("tries", model, start, share=True), make_batch(pairs, model)
    with FlopCounterMode(display=False) as counted:
        form.loss(batch).backward()
    config = model.config
    # q k^T and weights v: 2 T (P+S) C operations each, and backward each twice as many. In the
    # first layer nobody asks for the gradient of q.
    one = 2 * 6 * (3 + 6) * config.n_embd
    assert counted.get_total_flops() == useful(config, batch.once, batch.said) + one * (
        6 * config.n_layer - 1)


def test_what_a_recording_reads_lives_as_long_as_it(model, monkeypatch):
    """As on a GPU. Would catch: the limit replayed over memory that is somebody else's by now."""
    alive = []

    def randn(*size, **options):
        alive.append(weakref.ref(made := torch.zeros(*size, dtype=torch.float64)))
        return made
    monkeypatch.setattr("graphs.replay_of", lambda once, device: once() or (lambda: None))
    batch = make_batch([Pair([1, 2, 3, 4, 5], 3)], model)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", randn)
        replay = bench_train.replayed(multiplications(model), [batch], SimpleNamespace(type="cuda"))
    assert replay(batch) is None and alive and all(buffer() is not None for buffer in alive)


def test_the_memory_of_a_step_is_its_fullest_moment():
    """Would catch: a sum over all tensors, or what is left at the end, in place of the peak."""
    def once():
        first = torch.ones(1000)
        second = torch.ones(2000)
        del first
        return second + torch.ones(500)[0]
    # Fullest: second (8000 bytes), the result (8000) and the 500 ones.
    assert added(once, torch.device("cpu")) == 4 * (2000 + 2000 + 500)


def test_a_row_of_figures_for_each_form_of_a_step(monkeypatch, tmp_path, capsys):
    """Would catch: a bench that fails after its minutes of work, a ratio upside down."""
    rivals_or_skip()
    monkeypatch.setattr(bench_train, "SIZES", {"cpu": SMALL})
    monkeypatch.setattr(bench_train, "CASES", {"cpu": {"4 pairs": (4, 1, None)}})
    out = tmp_path / "figures.jsonl"
    bench.main(["train", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    copied, *rows, limit = [json.loads(line) for line in out.read_text().splitlines()]
    assert copied["GB/s"] > 0 and limit["GFLOP/s"] > 0 and copied["texts"].startswith("drawn")
    rates = {row["form"]: row["tokens/s"] for row in rows}
    best = max(rate for name, rate in rates.items() if name.startswith("peft"))
    assert {"ours", "ours, checkpointed", "peft, sdpa", "peft, eager, random"} <= rates.keys()
    assert all(row["over best peft"] == row["tokens/s"] / best for row in rows)
    assert all(row["MB"] > 0 and row["loss off"] < 1e-5 for row in rows)
    assert "ours, source shared" in capsys.readouterr().out


def test_the_dev_set_scores_the_same_with_each_source_read_once(monkeypatch, tmp_path):
    """Would catch: a comparison of a figure with another figure; a rival that reads padding."""
    rivals_or_skip()
    monkeypatch.setattr(bench_train, "SIZES", {"cpu": SMALL})
    monkeypatch.setattr(bench_train, "TABLES", {"dev": 2})
    out = tmp_path / "figures.jsonl"
    bench.main(["dev", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    once, apart, *rivals = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["form"] for row in rivals] == ["peft, sdpa", "peft, eager"]
    for row in (apart, *rivals):
        assert abs(once["loss"] - row["loss"]) < 1e-5           # fp32, in another order
        assert row["ours over it"] == once["tokens/s"] / row["tokens/s"]
    # There are 8 references for each table.
    assert once["by multiplications"] == 1 < apart["by multiplications"] < 8


def test_the_picture_tells_the_ratios_of_the_figures():
    """Would catch: a bar over the wrong rival, sizes of batch mixed up, a limit upside down."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="it draws: pip install matplotlib")
    rows = [{"measure": "train", "dtype": "fp32", "what": what, "form": form, "tokens/s": rate,
             "of the limit": part, "MB": 10 * rate}
            for what, form, rate, part in (
                ("8 pairs", "ours", 300, 0.75), ("8 pairs", "peft, sdpa", 200, 0.5),
                ("40 pairs", "ours", 500, 0.8), ("40 pairs", "peft, sdpa", 250, 0.4))]
    rows += [{"measure": "decode", "dtype": "bf16", "what": "greedy", "form": form,
              "tokens/s": rate} for form, rate in (("ours", 60), ("peft, sdpa", 20),
                                                   ("peft, eager", 40))]
    figure = draw_speed.draw(rows)
    rates, memory, decoding = [[text.get_text().strip() for text in panel.texts]
                               for panel in figure.axes]
    pyplot.close(figure)
    assert rates[:4] == ["1.50 ×, 75%", "1.00 ×, 50%", "2.00 ×, 80%", "1.00 ×, 40%"]
    assert memory[:4] == ["3,000 MB", "2,000 MB", "5,000 MB", "2,500 MB"]
    assert decoding[0] == "1.50 ×\nbf16"


def test_a_flag_that_would_do_nothing_is_refused():
    """Would catch: figures of something else than what was asked for."""
    for given in (["decode", "--compile"], ["attention", "--data-dir", "x"], ["dev", "--compile"]):
        with pytest.raises(ValueError, match=f"got {given[0]} with --compile or --data-dir; expec"):
            bench.main(given)
