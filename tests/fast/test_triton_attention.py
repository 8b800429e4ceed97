"""The fused kernels are model.attend: output and every gradient, over unfriendly shapes.

With a GPU they are compiled and run there; without one they run under Triton's interpreter (set in
conftest.py) and are compiled for a GPU that is not there. What only a GPU can show is skipped.
"""
import subprocess
import sys

import pytest
import torch
from attention_cases import (
    DEVICE,
    EXPLICIT,
    GPU,
    MASKS,
    SHAPES,
    all_seen,
    answers,
    assert_a_query_that_sees_nothing_gets_zero,
    assert_as_good_as_the_explicit_form,
    call,
    ragged,
    tensors,
)
from conftest import ROOT, batch_of, loss_and_gradients, random_bart, random_gpt2

import train
from data.batches import Pair
from decoding.constraints import Constraints
from fast.checkpointing import checkpoint_blocks
from fast.forms import set_attention
from pretrained.architectures import new_prefix
from sample import generate

pytest.importorskip("triton", reason="the fused kernels are written in Triton: pip install triton")
from fast import triton_attention  # noqa: E402
from fast.triton_attention import TritonAttention  # noqa: E402

FUSED = TritonAttention(DEVICE, torch.float32)


# Under the interpreter the large ones take seconds each: there by default without padding only.
ALL = [pytest.param(shape, *mask, marks=pytest.mark.slow if mask[0] and SHAPES[shape][0] > 6 and
                    sum(SHAPES[shape][1:3]) > 30 else ()) for shape in SHAPES for mask in MASKS]


@pytest.mark.parametrize("shape, padded, causal, rows", ALL)
def test_fused_attention_is_attention(shape, padded, causal, rows):
    """Would catch: a wrong corner, a tile that goes on behind the end, a lost prefix key."""
    T, S, P, D = SHAPES[shape]
    key_mask = ragged(2, P + S) if padded else all_seen(P + S)
    assert_as_good_as_the_explicit_form(FUSED, tensors(T, S, P, D, rows), key_mask, causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, S, P, D", [(1, 9, 20, 64), (35, 35, 5, 128), (20, 50, 3, 24)])
def test_half_precision_is_no_worse_than_the_explicit_form(T, S, P, D, dtype):
    """Would catch: a sum kept in bf16, a weight rounded before it should be."""
    inputs = tensors(T, S, P, D, dtype=dtype)
    assert_as_good_as_the_explicit_form(FUSED, inputs, ragged(2, P + S), True)


def test_large_scores_do_not_overflow():
    """Would catch: an exp without the largest score taken off, or with the first tile's."""
    inputs = tensors(5, 40, 20, 16)
    with torch.no_grad():
        inputs[0].mul_(30)
        inputs[1][:, :, 35] *= 10       # the largest scores come in the last tile
    out = call(FUSED, inputs, all_seen(60), False)
    exact = call(EXPLICIT, [x.double() for x in inputs], all_seen(60), False)
    assert exact.isfinite().all() and (out - exact).abs().max() < 1e-4  # fp32, scores near 1000


def test_a_query_that_sees_nothing_gets_zero_of_the_kernel():
    """Would catch: 0/0 at a padded query, which turns every later number of its row into NaN."""
    assert_a_query_that_sees_nothing_gets_zero(FUSED)


def test_the_kernel_knows_no_tree():
    """Would catch: beams that see each other's tokens, without a word."""
    tree = torch.ones(1, 2, 4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="texts that branch.*the kernel knows no tree; use --att"):
        FUSED.mask(all_seen(7), 2, True, tree)


@pytest.mark.parametrize("programs", [1, 6])
def test_the_prefix_is_summed_over_the_batch_however_it_is_split(programs, monkeypatch):
    """5 rows in one go, or 2, 2 and 1. Would catch: a row counted twice, or left out."""
    monkeypatch.setattr(triton_attention, "PROGRAMS", programs)
    assert_as_good_as_the_explicit_form(FUSED, tensors(7, 7, 12, 16, B=5), ragged(5, 19), True)


def test_a_shared_prefix_is_read_where_it_lies():
    """Would catch: a prefix expanded to the batch, the copy that this kernel is there to avoid."""
    inputs, saved = tensors(4, 4, 7, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(FUSED, inputs, all_seen(11), True)
    assert {x.data_ptr() for x in inputs} <= {t.data_ptr() for t in saved}
    assert max(t.numel() for t in saved) == inputs[0].numel()   # no (B, H, P, D), no weights


def test_any_layout_in_memory_is_read_right():
    """Would catch: strides taken for granted: views of one projection, an expanded prefix."""
    q, k, v = torch.randn(2, 5, 3, 2, 16, device=DEVICE).permute(2, 0, 3, 1, 4)     # (B, H, T, D)
    pk, pv = torch.randn(2, 1, 2, 16, 3, device=DEVICE).transpose(3, 4).expand(2, 2, 2, 3, 16)
    key_mask = (torch.rand(2, 16, device=DEVICE) < 0.7)[:, ::2]
    inputs = [x.detach().requires_grad_() for x in (q, k, v.contiguous(), pk, pv.clone())]
    assert inputs[0].stride() != inputs[0].contiguous().stride() and inputs[3].stride(0) == 0
    assert_as_good_as_the_explicit_form(FUSED, inputs, key_mask, True)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_a_model_with_fused_attention_is_that_model(kind, checkpointed):
    """Would catch: a model that hands attention something these tests did not think of: of BART
    keys of another text, sources padded behind, prefixes of three lengths; with
    --gradient-checkpointing saved tensors that are asked for twice, which PyTorch forbids there.
    """
    pairs, found = [Pair([3, 5, 7, 2, 16, 8], 2), Pair([4, 1, 9], 1)], []
    for fused, dtype in ((True, torch.float32), (False, torch.float64)):
        model = (random_gpt2(n_layer=2) if kind == "gpt2" else
                 random_bart(encoder_layers=1, decoder_layers=1)).to(DEVICE, dtype)
        torch.manual_seed(4)
        places = "" if kind == "gpt2" else "encoder=3,decoder=4,cross=5"
        learner = new_prefix(model, 5, 0, places=places).to(dtype)
        if fused:
            model.attention = FUSED
        if checkpointed:
            checkpoint_blocks(model)
        _, *gradients = loss_and_gradients(model, learner, batch_of(model, pairs))
        found.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < 1e-4                 # fp32 through some layers with weights of order 1


def test_decoding_with_fused_attention_gives_the_same_tokens():
    """Would catch: one query against a cache of many, with prompts padded in front, gone wrong."""
    model, prompts = random_gpt2().float().to(DEVICE), [[3, 5, 7, 9, 2], [8, 1]]
    prefix = torch.randn(3, 2, 1, 4, 5, 6, device=DEVICE)
    expected = generate(model, prompts, Constraints(256, 3), prefix)
    model.attention = FUSED
    assert generate(model, prompts, Constraints(256, 3), prefix) == expected


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here():
    """Would catch: what the interpreter forgives and the compiler does not; spilled registers."""
    ended = subprocess.run([sys.executable, "tests/fast/compile_kernels.py", "bf16:64",
                            "fp16:80", "fp32:128"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    header, *rows = (line.split() for line in ended.stdout.splitlines())
    assert [row[0] for row in rows] == ["forward_kernel", "queries_kernel", "keys_kernel"] * 3
    for row in rows:
        row = dict(zip(header, row))
        assert row["stack"] == "?" or int(row["stack"]) <= 16, row
        assert int(row["shared"]) <= 227 * 1024 // 2, row       # room for two at once
        tensor_cores = int(row["mma"]) + int(row["wgmma"]) > 0
        assert tensor_cores == (row["type"] != "fp32"), row


def test_where_it_cannot_run_the_error_says_what_to_do(monkeypatch):
    """Would catch: a silent fall-back, a traceback, rubbish in a dtype that is not known."""
    with pytest.raises(ValueError, match="float64; expected fp32, bf16 or fp16; .*explicit"):
        set_attention("fused", random_gpt2())
    with pytest.raises(ValueError, match="size 300; expected at most 256"):
        call(FUSED, tensors(2, 2, 5, 300), all_seen(7), True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="device cpu; expected a CUDA GPU.*--attention explicit"):
        set_attention("fused", random_gpt2().float())
    monkeypatch.setitem(sys.modules, "triton", None)        # as if it were not installed
    monkeypatch.delitem(sys.modules, "fast.triton_attention")
    with pytest.raises(ValueError, match="triton is not installed; `pip install triton`"):
        set_attention("fused", random_gpt2().float())


def test_train_refuses_before_it_begins(model_directory, tmp_path, monkeypatch):
    """Would catch: a run directory left behind by a run that never could begin."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    data = tmp_path / "tiny.jsonl"
    data.write_text('{"source": "a", "target": "b"}\n{"source": "c", "target": "d"}\n')
    with pytest.raises(ValueError, match="got fused attention on the device cpu"):
        train.main(["--model", str(model_directory), "--data", str(data), "--device", "cpu",
                    "--attention", "fused", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not GPU, reason="no CUDA GPU here: the compiled kernels cannot be run")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, S, P, D", [(96, 96, 200, 64), (1, 1024, 200, 64), (1024, 1024, 10, 64),
                                        (60, 60, 5, 128), (300, 300, 300, 64), (33, 97, 17, 256)])
def test_the_compiled_kernels_are_attention_at_full_size(T, S, P, D, dtype):
    """Would catch: races, spilled tiles and layouts that only the real machine has."""
    for rows, causal in ((1, True), (8, False)):
        inputs = tensors(T, S, P, D, rows, dtype, B=8, H=4)
        assert_as_good_as_the_explicit_form(FUSED, inputs, ragged(8, P + S), causal)


@pytest.mark.skipif(not GPU, reason="no CUDA GPU here: the compiled kernels cannot be run")
def test_the_compiled_kernels_give_the_same_bits_twice():
    """Would catch: two programs that add to one number, whichever happens to come first."""
    inputs = tensors(96, 96, 200, 64, B=32, H=16, dtype=torch.bfloat16)
    key_mask = ragged(32, 296)
    g = torch.randn_like(inputs[0])
    for x, y in zip(*(answers(FUSED, inputs, key_mask, True, g) for _ in range(2))):
        assert torch.equal(x, y)
