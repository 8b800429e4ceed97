"""The other ways to take a step take the same step: compiled, or with less memory."""
import json
import shutil

import pytest
import torch
from conftest import gradients, random_bart, random_gpt2, shared_pairs, some_learner
from test_bart_train import some_pairs as bart_pairs
from test_bart_train import some_prefixes
from torch.profiler import ProfilerActivity, profile

import step
import train
from batches import batch_of
from data.sequence import Pair
from loss import target_nats
from train import Run, Settings


def nodes(function, seen):
    """The names of all steps of the way back."""
    if function is not None and function not in seen:
        seen.add(function)
        for before, _ in function.next_functions:
            nodes(before, seen)
    return {node.name() for node in seen}


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_a_layers_part_of_the_prefix_has_a_gradient_of_its_own_size(kind):
    """Would catch: `prefix[layer]` in each layer. Its gradient is a whole prefix, zeros but for one
    layer, and as many of them as there are layers are added up; of BART's memory it is gigabytes.
    """
    model = random_gpt2() if kind == "gpt2" else random_bart()
    learner = some_learner(model, 0) if kind == "gpt2" else some_prefixes(model, 0)
    batch = batch_of(model, shared_pairs() if kind == "gpt2" else bart_pairs())
    model.wte.weight.requires_grad_()       # no FrozenHead then: older PyTorch hides what is behind
    names = nodes(target_nats(model, learner(), batch).grad_fn, set())
    assert "UnbindBackward0" in names and "SelectBackward0" not in names


# ---- less memory

@pytest.mark.parametrize("mid_dim", [16, 0], ids=["MLP", "no MLP"])
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_what_is_computed_twice_is_the_same(kind, mid_dim):
    """Would catch: a prefix whose gradient is lost on the way through a block that is computed
    again, or comes twice; a block that sees another mask the second time.
    """
    model = random_gpt2() if kind == "gpt2" else random_bart()
    learner = some_learner(model, mid_dim) if kind == "gpt2" else some_prefixes(model, mid_dim)
    batch = batch_of(model, shared_pairs() if kind == "gpt2" else bart_pairs())
    wanted = gradients(model, learner, batch)
    step.checkpoint_blocks(model)
    for got, want in zip(gradients(model, learner, batch), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12 * want.abs().max())


def kept(make):
    """The bytes that are still held when `make()` is done and its result is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = make()
    assert result is not None
    return sum(event.self_cpu_memory_usage for event in seen.events())


def layers_cost(batch, prepare):
    """The bytes that each further layer of a GPT-2 keeps from the way there for the way back."""
    bytes_of = []
    for layers in (2, 3):
        model = random_gpt2(n_layer=layers)
        learner = some_learner(model, 0)
        prepare(model)
        prefix = learner()
        gradients(model, learner, batch)            # what is made once and kept is made here
        bytes_of.append(kept(lambda: target_nats(model, prefix, batch)))
    return bytes_of[1] - bytes_of[0]


def test_a_further_layer_keeps_one_hidden_state():
    """Would catch: checkpointing that is asked for and keeps all the same; for GPT-2 without it, a
    layer keeps more than ten times as much.
    """
    batch = batch_of(random_gpt2(), shared_pairs())
    B, T = batch.ids.shape
    hidden = B * T * 24 * 8                         # (B, T, C) in float64
    assert hidden <= layers_cost(batch, step.checkpoint_blocks) < hidden + 64       # bookkeeping
    assert layers_cost(batch, lambda model: None) > 10 * hidden


def test_every_block_of_a_bart_is_computed_again():
    """Would catch: an encoder that keeps all, a first block that is left out."""
    for model in (random_gpt2(), random_bart()):
        step.checkpoint_blocks(model)
        blocks = [module for module in model.modules()
                  if type(module).__name__ in ("Block", "EncoderLayer", "DecoderLayer")]
        assert blocks and all("forward" in vars(block) for block in blocks)
    found = {}
    for name, prepare in (("kept", lambda model: None), ("again", step.checkpoint_blocks)):
        model = random_bart()
        learner, batch = some_prefixes(model, 0), batch_of(model, bart_pairs())
        prepare(model)
        gradients(model, learner, batch)            # what is made once and kept is made here
        prefix = learner()
        found[name] = kept(lambda: target_nats(model, prefix, batch))
    assert 3 * found["again"] < found["kept"]


# ---- compiled

def test_a_batch_of_a_fixed_shape_has_the_same_loss_and_gradient():
    """Would catch: places that point into the wrong row once rows are longer, padding that is
    learned from, a row too many that is counted.
    """
    for model, learner, pairs in ((random_gpt2(), some_learner(random_gpt2()), shared_pairs()),
                                  (random_bart(), some_prefixes(random_bart()), bart_pairs())):
        batch = batch_of(model, pairs)
        same = step.fixed(batch, 16, 62)
        assert same.ids.shape == (16, 16) and len(same.place) == len(same.label) == 128
        assert step.fixed(batch, 16, 13).ids.shape == (16, 13)          # not longer than possible
        for got, want in zip(gradients(model, learner, same), gradients(model, learner, batch),
                             strict=True):
            assert torch.allclose(got, want, rtol=1e-10, atol=1e-10 * want.abs().max())


@pytest.fixture
def compiler():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler, which --compile needs")


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_the_compiled_step_is_the_step(kind, compiler):
    """Loss and what is learned, to the rounding of fp32; a compilation for each shape, no more.

    Would catch: a step compiled anew for each batch, or one that learns something else.
    """
    if kind == "gpt2":
        model, learner = random_gpt2(n_layer=1).float(), some_learner
        pairs, shapes = [*shared_pairs(), Pair(list(range(20)), 15)], {(5, 16, 40), (5, 32, 40)}
    else:
        model, pairs = random_bart(encoder_layers=1, decoder_layers=1).float(), bart_pairs(15)
        learner, shapes = (lambda bart: some_prefixes(bart).float()), {(5, 16, 40, 64)}
    batches, runs = [pairs[i:i + 4] for i in (0, 4, 8, 12)], []     # the last one is of 3 pairs
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        settings = Settings(lr=1e-2, steps=10, batch_size=5, out="unused", compile=compiled)
        nats = step.prepared(settings, model)
        runs.append(Run(settings, model, learner(model), nats=nats))
        if not compiled:
            plain = [runs[-1].update(batch).item() for batch in batches]
    losses = [runs[-1].update(batch).item() for batch in batches]
    assert losses == pytest.approx(plain, rel=1e-5)             # fp32, added in another order
    assert nats.shapes == shapes
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 + len(shapes)                            # 1: the trial
    for a, b in zip(*(run.learner.parameters() for run in runs), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)       # AdamW divides by tiny gradients


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: nothing is recorded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_step_is_the_step(dtype):
    """Two shapes in turns, so that each is compiled, recorded and replayed between the other's.

    Would catch: a replay that reads the last batch or the last prefix, a loss or a gradient that
    the next replay writes over.
    """
    pairs = [*shared_pairs(), Pair(list(range(20)), 15)]
    batches = [pairs[i:i + 4] for i in (0, 12)] * 5         # two shapes, five times each
    losses, learned = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = random_gpt2(n_layer=2).to("cuda", dtype)
        settings = Settings(lr=1e-2, steps=20, batch_size=5, out="unused", compile=compiled)
        learner = some_learner(model).float()
        run = Run(settings, model, learner, nats=step.prepared(settings, model))
        losses.append([run.update(batch).item() for batch in batches])
        learned.append(learner().detach())
    eps = torch.finfo(dtype).eps
    assert losses[1] == pytest.approx(losses[0], rel=4 * eps if dtype == torch.bfloat16 else 1e-5)
    far = (learned[1] - learned[0]).norm() / learned[0].norm()
    assert far < (1e-3 if dtype == torch.float32 else 0.05)     # 0.15 where a batch is one behind


def test_a_missing_compiler_is_told(monkeypatch):
    """Would catch: a traceback from deep inside PyTorch, minutes after the start."""
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "nowhere"))
    with pytest.raises(ValueError, match="got --compile, but nothing can be compiled here .*nowhere"
                                         ".*expected a C.. compiler.*leave it out"):
        step.Compiled(4, torch.device("cpu"))


# ---- as flags of train.py

@pytest.fixture
def task(tmp_path, monkeypatch, model_directory):
    """Arguments of a small run on ten sources with four targets each, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"source": f"n : {i}", "target": [f"{word} {i}" for word in "abcd"]})
             for i in range(10)]
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines))
    return ["--model", str(model_directory), "--data", "tiny.jsonl", "--device", "cpu", "--lr",
            "1e-2", "--steps", "10", "--batch-size", "5", "--dev-every", "2", "--mid-dim", "16"]


def log_of(run):
    """The losses that a run has written, in order."""
    lines = [json.loads(line) for line in open(f"{run}/log.jsonl", encoding="utf-8")]
    return [line.get("loss", line.get("dev_loss")) for line in lines]


def test_a_resumed_run_shares_the_same_sources(task):
    """Would catch: flags that are lost, another order of the data after resuming."""
    flags = ["--share-source", "--gradient-checkpointing"]
    train.main([*task, *flags, "--out", "whole"])
    train.main([*task, *flags, "--out", "parts", "--stop-at", "5"])
    train.main(["--resume", "parts", "--device", "cpu"])
    train.main([*task, "--out", "unshared"])
    assert log_of("whole")[:-2] == log_of("parts")[:-2]     # the last mean is over fewer steps
    assert log_of("whole")[-1] == log_of("parts")[-1]
    assert log_of("unshared")[0] == log_of("whole")[0] and log_of("unshared") != log_of("whole")


def test_the_flags_reach_the_loop_and_a_resumed_run(task, monkeypatch):
    """Would catch: a flag without effect, which no loss would tell."""
    calls = []

    class Counted:
        def __init__(self, rows, device):
            calls.append("compiled")

        def __call__(self, *inputs):
            calls.append("a step of it")
            return target_nats(*inputs)
    monkeypatch.setattr(step, "checkpoint_blocks", lambda model: calls.append("checkpointed"))
    monkeypatch.setattr(step, "Compiled", Counted)
    for flag in ("--gradient-checkpointing", "--compile"):
        train.main([*task, flag, "--stop-at", "5", "--out", flag.strip("-")])
        train.main(["--resume", flag.strip("-"), "--device", "cpu"])
    counts = [calls.count(what) for what in ("checkpointed", "compiled", "a step of it")]
    assert counts == [2, 2, 10]


@pytest.mark.parametrize("flags, words", [
    (["--share-source", "--compile"], "got --compile with --share-source"),
    (["--gradient-checkpointing", "--compile"], "got --compile with --gradient-checkpointing"),
])
def test_what_does_not_go_together_is_told(task, flags, words):
    """Would catch: a flag that is dropped without a word."""
    with pytest.raises(ValueError, match=f"{words}.*; expected.*; leave"):
        train.main([*task, *flags])


def test_what_the_kernel_cannot_do_is_told(model):
    """Would catch: a traceback from the middle of a step."""
    for name, flag in (("share_source", "--share-source"), ("compile", "--compile")):
        with pytest.raises(ValueError, match=f"got --attention fused with {flag}; expected one"):
            step.prepared(Settings(attention="fused", **{name: True}), model)
