"""Flags of train.py and sample.py reach the forms of fast/, and what is learned stays the same."""
import dataclasses
import json
import re

import pytest
import torch
from conftest import (
    ROOT,
    batch_of,
    loss_and_gradients,
    random_bart,
    random_gpt2,
    shared_pairs,
    some_trainer,
)

import sample
import train
from baselines.finetune import FineTune
from data import pairs as plain
from decoding.constraints import Constraints
from fast import forms, packed, tries
from fast.frozen_head import frozen_target_loss
from fast.packed import Packed
from fast.sdpa_attention import SDPAAttention
from model import ExplicitAttention
from prefix import target_loss
from train import Settings

FLAGS = {"fast": dict(fast=True), "sdpa": dict(attention="sdpa"),
         "fast, sdpa": dict(fast=True, attention="sdpa"),
         "fast, checkpointed": dict(fast=True, gradient_checkpointing=True)}


@pytest.fixture
def pack_all(monkeypatch):
    """As on a CPU with AVX-512, and for a large model; the kernels run on any CPU in fp32."""
    if packed.why_not_packable(random_gpt2().float()):
        pytest.skip(packed.why_not_packable(random_gpt2().float()))
    monkeypatch.setattr(packed, "LARGE", 1)
    monkeypatch.setattr(packed, "has_avx512", lambda: True)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_fast_forms_learn_the_same_from_the_same_batches(kind, flags, pack_all):
    """Losses of three steps, what has been learned, and the dev losses around them.

    Would catch: a form that is not the same function, or changes what the next step sees.
    """
    pairs, results = shared_pairs(), []
    for settings in (Settings(), Settings(**FLAGS[flags])):
        model = kind().float()
        found = train.find_forms(settings)
        make = found.training_forms if found else train.plain_forms
        loss, collate, dev = make(dataclasses.replace(settings, batch_size=4), model, pairs, 16)
        trainer = some_trainer(model, dev=dev, loss=loss, collate=collate)
        values = [trainer.dev_loss()]
        values += [trainer.train_step(pairs[i:i + 4]).item() for i in (0, 4, 8)]
        values.append(trainer.dev_loss())
        results.append((values, trainer.learner().detach() if kind is random_gpt2 else
                        torch.cat([part.flatten() for part in trainer.learner()]).detach()))
    (values, learned), (fast_values, fast_learned) = results
    assert fast_values == pytest.approx(values, rel=1e-4)       # fp32, added in another order
    assert (fast_learned - learned).norm() < 1e-3 * learned.norm()      # AdamW divides by gradients
    assert values[0] > values[-1]


def test_fast_takes_what_helps_and_nothing_else(monkeypatch, capsys):
    """Would catch: a flag without effect, which no loss would tell; tries where nothing is shared;
    weights packed on a CPU where that is slower.
    """
    def found(pairs, **flags):
        model = random_gpt2().float()
        loss, collate, dev = forms.training_forms(Settings(batch_size=4, **flags), model, pairs, 16)
        return (loss is frozen_target_loss, isinstance(model.h[0].mlp.c_fc, Packed),
                collate is tries.collate, any("tree" in batch.inputs for batch in dev))
    pairs, alone = shared_pairs(), shared_pairs()[:1]
    monkeypatch.setattr(packed, "has_avx512", lambda: False)
    assert found(pairs) == (False, False, False, False)
    assert found(pairs, fast=True) == (True, False, False, True)
    assert "--fast: frozen head, dev set in tries" in capsys.readouterr().err
    assert found(alone, fast=True) == (True, False, False, False)
    assert found(pairs, fast=True, attention="sdpa") == (True, False, False, True)
    assert found(pairs, share_source=8) == (False, False, True, False)
    monkeypatch.setattr(packed, "has_avx512", lambda: True)
    assert found(pairs, fast=True)[1] is False                          # too small
    monkeypatch.setattr(packed, "LARGE", 1)
    if not packed.why_not_packable(random_gpt2().float()):
        assert found(pairs, fast=True) == (True, True, False, True)


def test_weights_that_learn_get_their_whole_gradient():
    """The word embedding is the head too. Would catch: a fine-tuned model whose head is frozen, or
    whose weights are packed out of the optimiser's sight.
    """
    model, pairs = random_gpt2(), shared_pairs()
    learner = FineTune(model)
    loss, _, dev = forms.training_forms(Settings(fast=True, batch_size=4), model, pairs, 16)
    assert loss is target_loss and isinstance(model.h[0].mlp.c_fc, torch.nn.Linear)
    assert all("tree" in batch.inputs for batch in dev)
    for got, want in zip(loss_and_gradients(model, learner, batch_of(model, pairs), loss),
                         loss_and_gradients(model, learner, batch_of(model, pairs)), strict=True):
        assert torch.equal(got, want)


def test_attention_that_knows_no_tries_gets_none(model):
    """As the fused kernel. Would catch: a dev loss that ends with an error, or is another."""
    class NoTree(ExplicitAttention):
        supports_tree = False

        @staticmethod
        def mask(key_mask, T, causal, tree=None):
            assert tree is None
            return ExplicitAttention.mask(key_mask, T, causal)
    model.attention, pairs = NoTree(), shared_pairs()
    loss, _, dev = forms.training_forms(Settings(fast=True), model, pairs, 3)
    found = some_trainer(model, loss=loss, dev=dev).dev_loss()
    expected = some_trainer(model, dev=plain.dev_batches(pairs, 3, model)).dev_loss()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("fused, other", [(True, "share_source"), (True, "compile"),
                                          (False, "share_source"),
                                          (False, "gradient_checkpointing")])
def test_what_does_not_go_together_is_told(model, fused, other):
    """Would catch: a flag that is dropped without a word, a traceback from the middle of a step."""
    flags = dict(attention="fused") if fused else dict(compile=True)
    name = "--attention fused" if fused else "--compile"
    with pytest.raises(ValueError, match=f"got {name} with --{other.replace('_', '-')}; expected "
                                         "one of them: .*; leave one out"):
        train.find_forms(Settings(batch_size=4, **flags | {other: True}))
    assert type(model.attention) is ExplicitAttention


# ---- decoding

def test_beams_of_the_kernel_are_refused(model):
    """Would catch: an error in the middle of a search, after the prompts have been read."""
    settings = sample.Settings(attention="fused", num_beams=5)
    with pytest.raises(ValueError, match="got --attention fused and 5 beams; expected --num-beams 1"
                                         ": the kernel knows no tree of texts; or use --attention "
                                         "explicit"):
        forms.decoding_form(settings, model, Constraints(256), None)


def test_fast_decoding_packs_where_it_helps_and_generates_the_same(model_directory, pack_all,
                                                                   monkeypatch):
    """Would catch: a flag without effect, memory spent on a small model that gains nothing."""
    def generator(**flags):
        return sample.Generator(sample.Settings(model=str(model_directory), device="cpu",
                                                max_new_tokens=8, **flags))
    plain_one, fast_one = generator(), generator(fast=True, attention="sdpa")
    assert not isinstance(plain_one.model.h[0].mlp.c_fc, Packed)
    assert isinstance(fast_one.model.h[0].mlp.c_fc, Packed)
    assert isinstance(fast_one.model.attention, SDPAAttention)
    assert fast_one.generate(["a name", "b"]) == plain_one.generate(["a name", "b"])
    monkeypatch.setattr(packed, "LARGE", 2 ** 24)
    assert not isinstance(generator(fast=True).model.h[0].mlp.c_fc, Packed)


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
    flags = ["--share-source", "4", "--gradient-checkpointing"]
    train.main([*task, *flags, "--out", "whole"])
    train.main([*task, *flags, "--out", "parts", "--stop-at", "5"])
    train.main(["--resume", "parts", "--device", "cpu"])
    train.main([*task, "--out", "unshared"])
    assert log_of("whole")[:-2] == log_of("parts")[:-2]     # the last mean is over fewer steps
    assert log_of("whole")[-1] == log_of("parts")[-1]
    assert log_of("unshared")[0] == log_of("whole")[0] and log_of("unshared") != log_of("whole")


def test_a_fast_run_resumes_bit_for_bit_and_learns_what_a_plain_one_learns(task, pack_all):
    """Would catch: a form that is lost on the way through config.json, numbers of the model that
    are counted after they were packed away.
    """
    train.main([*task, "--out", "plain"])
    train.main([*task, "--fast", "--out", "whole"])
    train.main([*task, "--fast", "--out", "parts", "--stop-at", "5"])
    train.main(["--resume", "parts", "--device", "cpu"])
    assert log_of("whole")[:-2] == log_of("parts")[:-2]     # the last mean is over fewer steps
    assert log_of("whole")[-1] == log_of("parts")[-1]
    states = [torch.load(f"{run}/resume.pt", weights_only=True)["learner"]
              for run in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert log_of("whole") == pytest.approx(log_of("plain"), rel=1e-3)  # fp32 through ten steps
    about = [json.load(open(f"{run}/config.json", encoding="utf-8"))["parameters"]
             for run in ("plain", "whole")]
    assert about[0] == about[1]


def test_the_flags_reach_the_loop_and_a_resumed_run(task, monkeypatch):
    """Would catch: a flag without effect, which no loss would tell."""
    calls = []

    class Counted:
        def __init__(self, rows, device):
            calls.append("compiled")

        def __call__(self, *inputs):
            calls.append("a step of it" if torch.is_grad_enabled() else "a dev batch")
            return target_loss(*inputs)
    monkeypatch.setattr(forms, "checkpoint_blocks", lambda model: calls.append("checkpointed"))
    monkeypatch.setattr(forms, "CompiledLoss", Counted)
    for flag in ("--gradient-checkpointing", "--compile"):
        train.main([*task, flag, "--stop-at", "5", "--out", flag.strip("-")])
        train.main(["--resume", flag.strip("-"), "--device", "cpu"])
    counts = [calls.count(what) for what in ("checkpointed", "compiled", "a step of it")]
    assert counts == [2, 2, 10]


def test_the_table_of_the_forms_is_true():
    """Would catch: line counts of last month, a form without a proof."""
    table = re.findall(r"`(\w+\.py)` \| (\d+) \|.*`(tests/fast/\w+\.py)` \|",
                       (ROOT / "fast" / "README.md").read_text("utf-8"))
    assert {name for name, _, _ in table} == {
        path.name for path in ROOT.glob("fast/*.py")} - {"__init__.py", "forms.py"}
    for name, lines, test in table:
        assert len((ROOT / "fast" / name).read_text("utf-8").splitlines()) == int(lines), name
        assert (ROOT / test).exists(), test
