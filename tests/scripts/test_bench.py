"""A comparison is fair only where all compute the same: the forms that bench.py times agree."""
import json

import pytest
import torch

from model import ExplicitAttention
from scripts import bench, bench_train


def test_what_is_timed_is_the_same_function():
    """Would catch: a form with its triangle in the wrong corner, fast and wrong."""
    torch.manual_seed(1)
    for B, H, T, S, P in ((3, 2, 5, 5, 4), (3, 2, 1, 9, 4)):
        q = torch.randn(B, H, T, 8, dtype=torch.float64)
        k, v = torch.randn(2, B, H, S, 8, dtype=torch.float64)
        pk, pv = torch.randn(2, 1, H, P, 8, dtype=torch.float64)
        key_mask, explicit = torch.ones(B, P + S, dtype=torch.bool), ExplicitAttention()
        expected = explicit(q, k, v, pk, pv, explicit.mask(key_mask, T, True))
        for form in bench.forms(torch.device("cpu"), torch.float64).values():
            out = form(q, k, v, pk, pv, form.mask(key_mask, T, True))
            assert (out - expected).abs().max() < 1e-10     # float64, in another order: 1e-15


def test_a_bench_that_is_stopped_keeps_what_it_has_measured(tmp_path, monkeypatch):
    """Would catch: figures that are written at the end only, after an hour."""
    monkeypatch.setattr(bench, "SHAPES", {"small": (2, 2, 4, 4, 3), "broken": (2, 2, -1, 4, 3)})
    out = tmp_path / "figures.jsonl"
    with pytest.raises(RuntimeError):
        bench.main(["attention", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    assert [json.loads(line)["what"] for line in out.read_text().splitlines()] == ["small"] * 3
    with pytest.raises(ValueError, match="got --device gpu, which PyTorch cannot use here"):
        bench.main(["attention", "--device", "gpu"])


def test_a_row_of_figures_for_each_form_and_shape(tmp_path, monkeypatch, capsys):
    """Would catch: a bench that fails after its minutes of work, a ratio upside down."""
    monkeypatch.setattr(bench, "SHAPES", {"small": (2, 2, 4, 4, 3)})
    out = tmp_path / "figures.jsonl"
    bench.main(["attention", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    rows = {row["form"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["explicit", "sdpa, no mask", "sdpa"]
    best = min(rows["sdpa"]["us"], rows["sdpa, no mask"]["us"])
    assert rows["explicit"]["over best other"]["us"] == rows["explicit"]["us"] / best
    assert rows["explicit"]["machine"] and "explicit" in capsys.readouterr().out


def test_the_decoders_that_are_timed_give_the_same_tokens(monkeypatch, tmp_path):
    """Would catch: a peft with another prefix, another end or other weights; a ratio upside down.
    """
    pytest.importorskip("peft", reason="ours is compared with it: pip install peft")
    pytest.importorskip("transformers", reason="ours is compared with it: pip install transformers")
    monkeypatch.setitem(bench_train.SIZES["gpt2"], "cpu", dict(
        vocab_size=211, n_positions=128, n_embd=24, n_layer=2, n_head=4))
    monkeypatch.setattr(bench, "NEW_TOKENS", 6)
    out = tmp_path / "figures.jsonl"
    bench.main(["decode", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["what"] for row in rows} == set(bench.DECODING["cpu"])
    for row in rows:
        best = max(r["tokens/s"] for r in rows if r["what"] == row["what"]
                   and r["form"].startswith("peft"))
        B, _ = bench.DECODING["cpu"][row["what"]]
        assert row["same tokens"] == f"{B}/{B}"
        assert row["over best peft"] == row["tokens/s"] / best
    assert {"ours", "peft, sdpa", "peft, eager"} <= {row["form"] for row in rows}
