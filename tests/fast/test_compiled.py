"""The compiled step is the step."""
import shutil

import pytest
import torch
from conftest import (
    batch_of,
    loss_and_gradients,
    random_bart,
    random_gpt2,
    random_llama,
    shared_pairs,
    some_pairs,
    some_prefix,
    some_trainer,
)

from data.batches import Pair
from fast.compiled import CompiledLoss, fixed
from prefix import target_loss


@pytest.mark.parametrize("kind", [random_gpt2, random_bart, random_llama])
def test_a_batch_of_a_fixed_shape_has_the_same_loss_and_gradient(kind):
    """Would catch: positions that point into the wrong row once rows are longer, padding that is
    learned from, a row too many that is counted.
    """
    model = kind()
    learner, batch = some_prefix(model), batch_of(model, shared_pairs())
    same = fixed(batch, 16, 62)
    assert same.inputs["ids"].shape == (16, 16)
    assert len(same.label_positions) == len(same.labels) == len(same.label_weights) == 128
    if "source" in same.inputs:
        assert same.inputs["source"].shape == same.inputs["source_mask"].shape == (16, 62)
    assert fixed(batch, 16, 13).inputs["ids"].shape == (16, 13)         # not longer than possible
    for got, want in zip(loss_and_gradients(model, learner, same),
                         loss_and_gradients(model, learner, batch), strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10 * want.abs().max())


@pytest.fixture
def compiler():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler, which --compile needs")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart"])
def test_the_compiled_step_is_the_step(kind, compiler):
    """Loss and what is learned, to the rounding of fp32; a compilation for each shape, no more.

    Would catch: a step compiled anew for each batch, or one that learns something else; a dev loss
    that is compiled as well.
    """
    if kind != "bart":
        model = {"gpt2": random_gpt2, "llama": random_llama}[kind](n_layer=1).float()
        pairs, shapes = [*shared_pairs(), Pair(list(range(20)), 15)], {((5, 16), 40), ((5, 32), 40)}
    else:
        model = random_bart(encoder_layers=1, decoder_layers=1).float()
        pairs, shapes = some_pairs(15), {((5, 16), (5, 64), (5, 64), 40)}
    batches, trainers = [pairs[i:i + 4] for i in (0, 4, 8, 12)], []     # the last is of 3 pairs
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = CompiledLoss(5, torch.device("cpu"))
    dev, losses = [batch_of(model, some_pairs(7))], []
    for loss in (target_loss, compiled):
        trainers.append(some_trainer(model, dev=dev, loss=loss, batch_size=5))
        losses.append([trainers[-1].train_step(batch).item() for batch in batches])
        losses[-1].append(trainers[-1].dev_loss())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)      # fp32, added in another order
    assert compiled.shapes == shapes
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 + len(shapes)                            # 1: the trial
    for a, b in zip(*(trainer.learner.parameters() for trainer in trainers), strict=True):
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
        loss = CompiledLoss(5, model.device) if compiled else target_loss
        trainer = some_trainer(model, loss=loss, steps=20, batch_size=5)
        trainer.learner.float()
        losses.append([trainer.train_step(batch).item() for batch in batches])
        learned.append(trainer.learner().detach())
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
        CompiledLoss(4, torch.device("cpu"))
