"""Packed weights are the same weights: another order in memory, the same logits."""
import json

import pytest
import torch
from conftest import random_bart, random_gpt2

import packed
import sample
import train
from batches import batch_of
from checkpoint import load
from data.sequence import Pair
from loss import target_nats
from model import Places
from prefix import parts

if packed.possible(random_gpt2().float()):
    pytest.skip(packed.possible(random_gpt2().float()), allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_weights_change_no_logit(dtype):
    """Would catch: a bias or a transpose lost, a layer left out; with batches of several sizes."""
    plain, fast = random_gpt2().to(dtype), random_gpt2().to(dtype)
    packed.pack(fast)
    assert not [m for m in fast.modules() if isinstance(m, torch.nn.Linear)]
    exact = random_gpt2().to(dtype).double()            # the same rounded weights, exactly added
    for B, T in ((1, 1), (3, 1), (4, 1), (1, 17), (9, 30)):
        torch.manual_seed(B)
        ids = torch.randint(256, (B, T))                                        # (B, T)
        wanted = exact.head(exact(ids))                                         # (B, T, V)
        errors = [(m.head(m(ids)).double() - wanted).abs().max() for m in (plain, fast)]
        # As good as the plain form: twice its own rounding error, and 1e-6 of the range for fp32.
        assert errors[1] <= 2 * errors[0] + 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [random_gpt2, random_bart], ids=["gpt2", "bart"])
@pytest.mark.parametrize("pairs", [[Pair([5, 6, 7, 8, 9, 10], 2), Pair([5, 6, 7, 11], 3)],
                                   [Pair([5, 6, 7], 2)]], ids=["two pairs", "a single token"])
def test_packed_weights_change_no_gradient(kind, dtype, pairs):
    """Would catch: a way back through the wrong transpose, a bias in it, a layer without one; rows
    too few for the kernel whose gradient is lost, or comes several times.
    """
    plain, fast, exact = kind().to(dtype), kind().to(dtype), kind().to(dtype).double()
    packed.pack(fast, learning=True)
    batch = batch_of(plain, pairs)
    torch.manual_seed(3)
    start = [torch.randn(*part.shape[:4], 4, part.size(5)).to(dtype)
             for part in parts(plain.no_prefix())]
    gradients = []
    for model in (plain, fast, exact):
        prefix = [part.to(model.wte.weight.dtype).requires_grad_() for part in start]
        whole = Places(*prefix) if kind is random_bart else prefix[0]
        gradients.append(torch.autograd.grad(target_nats(model, whole, batch), prefix))
    for a, b, wanted in zip(*gradients, strict=True):
        errors = [(x.double() - wanted).norm() for x in (a, b)]
        # As good as the plain form: twice its own rounding error, and 1e-6 of the size for fp32.
        assert errors[1] <= 2 * errors[0] + 1e-6 * wanted.norm()


def test_a_run_packs_where_it_can_and_keeps_what_it_kept(model_directory, tmp_path, monkeypatch):
    """Would catch: numbers of the model that are counted after they were packed away; --pack that
    does nothing, or moves weights that learn out of the optimiser's sight.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.jsonl").write_text("".join(
        json.dumps({"source": f"n : {i}", "target": f"it is {i}"}) + "\n" for i in range(40)))
    task = ["--model", str(model_directory), "--data", "tiny.jsonl", "--device", "cpu", "--steps",
            "3", "--batch-size", "4"]
    logs, told, packs, pack = {}, {}, [], packed.pack
    monkeypatch.setattr(packed, "LARGE", 1)
    monkeypatch.setattr(packed, "pack", lambda *given: (packs.append(given[1:]), pack(*given)))
    for word in ("no", "auto"):
        train.main([*task, "--lr", "1e-2", "--pack", word, "--out", word])
        logs[word] = [json.loads(line) for line in open(f"{word}/log.jsonl", encoding="utf-8")]
        told[word] = json.load(open(f"{word}/config.json", encoding="utf-8"))["counts"]
    assert packs == [(True,)] and told["auto"] == told["no"]
    assert f"{sum(p.numel() for p in random_gpt2().parameters()):,}" in told["no"]
    dev = {word: [line["dev_loss"] for line in log if "dev_loss" in line]
           for word, log in logs.items()}
    assert dev["auto"] == pytest.approx(dev["no"], rel=1e-4)
    for more in (["--compile"], ["--method", "finetune"]):
        with pytest.raises(ValueError, match="got --pack yes with --compile or with a --method"):
            train.main([*task, "--pack", "yes", *more])


def test_pack_is_done_or_refused_aloud(model_directory, monkeypatch):
    """Would catch: --pack yes that does nothing, float64 that is packed and fails later, memory
    spent on a small model that gains nothing.
    """
    def speaker(pack, dtype):
        return sample.Speaker(sample.Settings(model=str(model_directory), device="cpu",
                                              pack=pack, dtype=dtype))
    for pack, dtype, large, expected in (
            ("auto", "fp32", 1, True), ("no", "fp32", 1, False), ("auto", "fp64", 1, False),
            ("auto", "fp32", packed.LARGE, False), ("yes", "bf16", packed.LARGE, True)):
        monkeypatch.setattr(packed, "LARGE", large)
        layer = speaker(pack, dtype).model.h[0].mlp.c_fc
        assert isinstance(layer, packed.Packed) == expected
    with pytest.raises(ValueError, match="got --pack yes, but its weights are torch.float64"):
        speaker("yes", "fp64")
    assert load(model_directory).h[0].mlp.c_fc.weight.shape == (96, 24)
