"""The fused kernels are model.attend: output and every gradient, over unfriendly shapes.

With a GPU they are compiled and run there; without one they run under Triton's interpreter (set in
conftest.py) and are compiled for a GPU that is not there. What only a GPU can show is skipped.
"""
import functools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_bart, random_gpt2

import train
from batches import batch_of
from beam import Rules
from data.sequence import Pair
from loss import target_nats
from model import attend
from prefix import Prefix, Prefixes
from sample import find_attention, generate

pytest.importorskip("triton", reason="the fused kernels are written in Triton: pip install triton")
import fused  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ATOL = 1e-6     # fp32 sums of up to 100 numbers of order 1, in another order: some 1e-7


def tensors(T, S, P, D, rows=1, dtype=torch.float32, B=2, H=2):
    torch.manual_seed(1)
    shapes = (B, H, T, D), (B, H, S, D), (B, H, S, D), (rows, H, P, D), (rows, H, P, D)
    return [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


def ragged(B, K):
    """Which keys are real: some are missing, all at the front of row 0 and at the end of row 1."""
    real = torch.rand(B, K) < 0.8
    real[0, :(K + 1) // 2], real[1, K // 2:] = False, False
    return real.to(DEVICE)


def answers(attend, inputs, real, causal, g):
    """The output, and the gradient of each input for the output's gradient g."""
    out = attend(*inputs, real, causal)
    return out, *torch.autograd.grad(out, inputs, g.to(out.dtype), materialize_grads=True)


def assert_as_good_as_the_explicit_form(inputs, real, causal):
    """No further from the truth, which is float64, than twice what model.attend is in this dtype.

    Twice, because the interpreter cuts bf16 off where a GPU rounds it: double the error.
    """
    g = torch.randn(inputs[0].shape, device=DEVICE).to(inputs[0].dtype)
    exact = answers(attend, [x.detach().double().requires_grad_() for x in inputs], real, causal, g)
    ours, theirs = (answers(form, inputs, real, causal, g) for form in (fused.attend, attend))
    for name, x, y, truth in zip(("out", "q", "k", "v", "pk", "pv"), ours, theirs, exact):
        assert x.shape == truth.shape and x.dtype == inputs[0].dtype and x.isfinite().all(), name
        if truth.numel():
            error, allowed = ((z.double() - truth).square().mean().sqrt() for z in (x, y))
            assert error <= 2 * allowed + ATOL, f"{name}: {error:.1e}, explicit form {allowed:.1e}"


SHAPES = {  # T, S, P, D
    "no prefix": (5, 5, 0, 64),
    "no text": (4, 0, 7, 16),
    "one query": (1, 9, 20, 64),
    "a prefix longer than the text": (6, 6, 40, 64),
    "a prefix as long as the text": (16, 16, 16, 32),
    "no multiple of a tile": (35, 35, 5, 64),
    "keys read before": (20, 50, 3, 24),
    "more queries than keys": (23, 4, 2, 16),
    "a prefix of two tiles": (7, 7, 70, 80),
    "the last key alone in its tile": (32, 32, 33, 64),
    "a narrow head": (9, 9, 4, 6),
}


@pytest.mark.parametrize("padded, causal, rows",
                         [(False, True, 1), (True, False, 1), (True, True, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_attention_is_attention(shape, padded, causal, rows):
    """Would catch: a wrong corner, a tile that goes on behind the end, a lost prefix key."""
    T, S, P, D = SHAPES[shape]
    real = ragged(2, P + S) if padded else torch.ones(1, P + S, dtype=torch.bool, device=DEVICE)
    inputs = tensors(T, S, P, D, rows)
    assert_as_good_as_the_explicit_form(inputs, real, causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, S, P, D", [(1, 9, 20, 64), (35, 35, 5, 128), (20, 50, 3, 24)])
def test_half_precision_is_no_worse_than_the_explicit_form(T, S, P, D, dtype):
    """Would catch: a sum kept in bf16, a weight rounded before it should be."""
    inputs = tensors(T, S, P, D, dtype=dtype)
    assert_as_good_as_the_explicit_form(inputs, ragged(2, P + S), True)


def test_large_scores_do_not_overflow():
    """Would catch: an exp without the largest score taken off, or with the first tile's."""
    inputs = tensors(5, 40, 20, 16)
    with torch.no_grad():
        inputs[0].mul_(30)
        inputs[1][:, :, 35] *= 10       # the largest scores come in the last tile
    real = torch.ones(1, 60, dtype=torch.bool, device=DEVICE)
    out = fused.attend(*inputs, real, False)
    exact = attend(*(x.double() for x in inputs), real, False)
    assert exact.isfinite().all() and (out - exact).abs().max() < 1e-4  # fp32, scores near 1000


def test_a_query_that_may_look_nowhere_gets_zero():
    """Would catch: 0/0 at a padded query, which turns every later number of its row into NaN."""
    inputs, real = tensors(5, 5, 3, 16), torch.ones(2, 8, dtype=torch.bool, device=DEVICE)
    real[:, :5] = False                                     # no prefix, and the text begins late
    out = fused.attend(*inputs, real, True)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in grads)
    assert torch.equal(grads[0][:, :, :2], torch.zeros_like(out[:, :, :2]))
    assert not grads[3].any() and not grads[4].any()        # a prefix that nobody saw


@pytest.mark.parametrize("programs", [1, 6])
def test_the_prefix_is_summed_over_the_batch_however_it_is_split(programs, monkeypatch):
    """5 rows in one go, or 2, 2 and 1. Would catch: a row counted twice, or left out."""
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    inputs, real = tensors(7, 7, 12, 16, B=5), ragged(5, 19)
    assert_as_good_as_the_explicit_form(inputs, real, True)


def test_a_shared_prefix_is_read_where_it_lies():
    """Would catch: a prefix expanded to the batch, the copy that this kernel is there to avoid."""
    inputs, kept = tensors(4, 4, 7, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused.attend(*inputs, torch.ones(1, 11, dtype=torch.bool, device=DEVICE), True)
    assert {x.data_ptr() for x in inputs} <= {t.data_ptr() for t in kept}
    assert max(t.numel() for t in kept) == inputs[0].numel()    # no (B, H, P, D), no weights


def test_any_layout_in_memory_is_read_right():
    """Would catch: strides taken for granted: views of one projection, an expanded prefix."""
    q, k, v = torch.randn(2, 5, 3, 2, 16, device=DEVICE).permute(2, 0, 3, 1, 4)     # (B, H, T, D)
    pk, pv = torch.randn(2, 1, 2, 16, 3, device=DEVICE).transpose(3, 4).expand(2, 2, 2, 3, 16)
    real = (torch.rand(2, 16, device=DEVICE) < 0.7)[:, ::2]
    inputs = [x.detach().requires_grad_() for x in (q, k, v.contiguous(), pk, pv.clone())]
    assert inputs[0].stride() != inputs[0].contiguous().stride() and inputs[3].stride(0) == 0
    assert_as_good_as_the_explicit_form(inputs, real, True)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", [
    random_gpt2, functools.partial(random_bart, encoder_layers=1, decoder_layers=1)])
def test_a_model_with_fused_attention_is_that_model(kind, checkpointed):
    """Would catch: a model that hands attention something these tests did not think of: of BART
    keys of another text, sources padded behind, prefixes of three lengths; with
    --gradient-checkpointing saved tensors that are asked for twice, which PyTorch forbids there.
    """
    pairs, found = [Pair([3, 5, 7, 2, 16, 8], 2), Pair([4, 1, 9], 1)], []
    for form, dtype in ((fused.attend, torch.float32), (attend, torch.float64)):
        model = kind().to(DEVICE, dtype)
        torch.manual_seed(4)
        learner = (Prefix(model.config, 5, 0) if kind is random_gpt2 else
                   Prefixes(model.config, dict(encoder=3, decoder=4, cross=5), 0))
        learner = learner.to(DEVICE, dtype)
        if checkpointed:
            step = pytest.importorskip("step", reason="step.py, a side door, is not here")
            step.checkpoint_blocks(model)
        loss = target_nats(model, learner(), batch_of(model, pairs), form)
        gradients = torch.autograd.grad(loss, list(learner.parameters()))
        found.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < 1e-4                 # fp32 through some layers with weights of order 1


def test_decoding_with_fused_attention_says_the_same():
    """Would catch: one query against a cache of many, with prompts padded in front, gone wrong."""
    model, prompts = random_gpt2().float().to(DEVICE), [[3, 5, 7, 9, 2], [8, 1]]
    prefix = torch.randn(3, 2, 1, 4, 5, 6, device=DEVICE)
    said = generate(model, prompts, Rules(256, 3), prefix, attend=attend)
    assert said == generate(model, prompts, Rules(256, 3), prefix, attend=fused.attend)


def test_the_kernels_compile_for_a_gpu_that_is_not_here():
    """Would catch: what the interpreter forgives and the compiler does not; spilled registers."""
    ended = subprocess.run([sys.executable, "tests/compile_kernels.py", "bf16:64", "fp16:80",
                            "fp32:128"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    header, *rows = (line.split() for line in ended.stdout.splitlines())
    assert [row[0] for row in rows] == ["forward_kernel", "queries_kernel", "keys_kernel"] * 3
    for row in rows:
        told = dict(zip(header, row))
        assert told["stack"] == "?" or int(told["stack"]) <= 16, told
        assert int(told["shared"]) <= 227 * 1024 // 2, told     # room for two at once
        tensor_cores = int(told["mma"]) + int(told["wgmma"]) > 0
        assert tensor_cores == (told["type"] != "fp32"), told


def test_where_it_cannot_run_the_error_says_what_to_do(monkeypatch):
    """Would catch: a silent fall-back, a traceback, rubbish in a dtype that is not known."""
    half = tensors(4, 4, 3, 16, dtype=torch.float64)
    real = torch.ones(1, 7, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="float64; expected fp32, bf16 or fp16; .*explicit"):
        fused.attend(*half, real, True)
    with pytest.raises(ValueError, match="size 300; expected at most 256"):
        fused.attend(*tensors(2, 2, 5, 300), real, True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="device cpu; expected a CUDA GPU.*--attention explicit"):
        find_attention("fused", random_gpt2().float())
    monkeypatch.setitem(sys.modules, "triton", None)        # as if it were not installed
    monkeypatch.delitem(sys.modules, "fused")
    with pytest.raises(ValueError, match="triton is not installed; `pip install triton`"):
        find_attention("fused", random_gpt2().float())


def test_train_refuses_before_it_begins(model_directory, tmp_path, monkeypatch):
    """Would catch: a run directory left behind by a run that never could begin."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="got fused attention on the device cpu"):
        train.main(["--model", str(model_directory), "--device", "cpu", "--attention", "fused",
                    "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not GPU, reason="no CUDA GPU here: the compiled kernels cannot be run")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, S, P, D", [(96, 96, 200, 64), (1, 1024, 200, 64), (1024, 1024, 10, 64),
                                        (60, 60, 5, 128), (300, 300, 300, 64), (33, 97, 17, 256)])
def test_the_compiled_kernels_are_attention_at_full_size(T, S, P, D, dtype):
    """Would catch: races, spilled tiles and layouts that only the real machine has."""
    for rows, causal in ((1, True), (8, False)):
        inputs = tensors(T, S, P, D, rows, dtype, B=8, H=4)
        assert_as_good_as_the_explicit_form(inputs, ragged(8, P + S), causal)


@pytest.mark.skipif(not GPU, reason="no CUDA GPU here: the compiled kernels cannot be run")
def test_the_compiled_kernels_give_the_same_bits_twice():
    """Would catch: two programs that add to one number, whichever happens to come first."""
    inputs = tensors(96, 96, 200, 64, B=32, H=16, dtype=torch.bfloat16)
    real = ragged(32, 296)
    g = torch.randn_like(inputs[0])
    for x, y in zip(*(answers(fused.attend, inputs, real, True, g) for _ in range(2))):
        assert torch.equal(x, y)
