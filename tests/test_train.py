"""The loop: its loss, batches, schedule, resuming, and what it refuses."""
import dataclasses
import itertools
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    batch_of,
    random_bart,
    random_gpt2,
    some_pairs,
    some_prefix,
    some_trainer,
)
from torch.nn import functional as F

import train
from data import causal, paper
from data.batches import count_labels
from data.example import Example
from data.pairs import dev_batches, encode_examples, load_examples, tokenized
from data.tokenizer import load_tokenizer
from model import ExplicitAttention
from prefix import target_loss
from pretrained.architectures import flags_of
from pretrained.load import load_model
from pretrained.run_directory import create, load_prefix, run_settings, starting_point
from train import Settings, Trainer
from utils.cli import parse, stop_after_this_step
from utils.files import temporary_name

# ---- loss and batches

def test_the_loss_is_that_of_the_target_and_its_end(model):
    """Would catch: a loss on the source or on padding, or shifted by one token."""
    prefix, pairs, expected = some_prefix(model)(), some_pairs(), 0.0
    for pair in pairs:
        hidden = model.hidden_states(torch.tensor([pair.ids]), prefix)
        logp = F.log_softmax(model.head(hidden), -1)[0]                         # (T, V)
        expected -= sum(logp[t - 1, pair.ids[t]] for t in range(pair.start, len(pair.ids)))
    assert torch.allclose(target_loss(model, prefix, batch_of(model, pairs)), expected, rtol=1e-12)


def test_long_targets_weigh_more(model):
    """Summed over a target, averaged over the batch. Would catch: a mean over tokens, as usual."""
    pairs, trainer = some_pairs(4), some_trainer(model, clip=1e9, mid_dim=0)
    table = trainer.learner.table.detach().clone().requires_grad_()
    kv = torch.func.functional_call(trainer.learner, {"table": table}, ())
    loss = target_loss(model, kv, batch_of(model, pairs)) / 4
    expected, = torch.autograd.grad(loss, table)
    found = []
    trainer.learner.table.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.clone()))
    trainer.train_step(pairs)
    assert torch.allclose(found[0], expected, rtol=1e-10)


def test_the_dev_loss_is_the_mean_over_all_target_tokens(model):
    """Would catch: a mean of means, or pairs that are left out at the end of a batch."""
    pairs = some_pairs(11)
    trainer = some_trainer(model, dev=dev_batches(pairs, 4, model))
    prefix = trainer.learner()
    total = sum(target_loss(model, prefix, batch_of(model, [pair])).item() for pair in pairs)
    assert trainer.dev_loss() == pytest.approx(total / count_labels(pairs), rel=1e-12)


def test_a_long_gradient_is_cut_to_its_length(model):
    """Would catch: clipping that is left out, or done after the step."""
    trainer, norms = some_trainer(model, clip=0.5), []
    trainer.optimizer.register_step_pre_hook(lambda *_: norms.append(torch.stack(
        [p.grad.norm() for p in trainer.learner.parameters()]).norm().item()))
    trainer.train_step(some_pairs(4))
    assert norms == [pytest.approx(0.5, rel=1e-5)]      # clip_grad_norm_ divides by norm + 1e-6


def test_the_optimiser_is_the_papers(model):
    """AdamW with the usual constants, and no decay unless it is asked for. Would catch: PyTorch's
    own default of 0.01, which would pull the prefix to zero.
    """
    for given, decay in (({}, 0), ({"weight_decay": 0.25}, 0.25)):
        optimizer = some_trainer(model, **given).optimizer
        group, = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, decay)


def test_the_learning_rate_reaches_the_optimiser(model):
    """Would catch: a schedule that is computed and never used."""
    trainer, rates = some_trainer(model, lr=8.0, steps=4), []
    trainer.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for _ in range(4):
        trainer.train_step(some_pairs(4))
    assert rates == [8, 6, 4, 2]


def test_the_attention_the_loss_and_the_batches_that_are_handed_in_are_used(model):
    """Would catch: --attention fused or --share-source without effect: the loss is the same."""
    calls = []

    class Counted(ExplicitAttention):
        def __call__(self, *inputs):
            calls.append("attention")
            return super().__call__(*inputs)

    def loss(*inputs):
        calls.append("loss")
        return target_loss(*inputs)

    def collate(pairs, model):
        calls.append("collate")
        return causal.collate(pairs, model)
    model.attention = Counted()
    trainer = some_trainer(model, dev=[causal.collate(some_pairs(2), model)], loss=loss,
                           collate=collate)
    trainer.train_step(some_pairs(4))
    assert calls == ["collate", "loss", *["attention"] * 3]     # three layers
    trainer.dev_loss()
    assert calls[5:] == ["loss", *["attention"] * 3]


def test_the_loss_that_is_logged_is_the_mean_over_tokens(model, tmp_path):
    """Would catch: a mean over batches or pairs, or one that is not begun anew."""
    pairs = some_pairs(40)
    trainer = some_trainer(model, mid_dim=0, pairs=pairs, dev=dev_batches(pairs, 8, model),
                           lr=1e-12, steps=20, out=str(tmp_path / "run"))
    create(trainer.settings, "", model)
    train.train(trainer)
    logged = [x["loss"] for x in lines(tmp_path / "run/log.jsonl") if "loss" in x]
    mean = trainer.dev_loss()
    assert logged == pytest.approx([mean, mean], rel=1e-6)      # two epochs, and nothing is learned


def test_the_seed_decides_where_it_starts_and_in_what_order(model, tmp_path):
    """Would catch: three seeds that are one and the same run."""
    orders, starts = [], []
    for seed in (1, 2, 1):
        pairs = some_pairs(12)
        trainer = some_trainer(model, pairs=pairs, dev=dev_batches(pairs[:2], 2, model), seed=seed,
                               steps=3, out=str(tmp_path / "r"))
        create(trainer.settings, "", model)
        orders.append(batches := [])
        trainer.collate = lambda pairs, model, batches=batches: (
            batches.append([pair.ids for pair in pairs]) or causal.collate(pairs, model))
        train.train(trainer)
        shutil.rmtree(tmp_path / "r")
        settings = Settings(seed=seed, prefix_len=4, mid_dim=8)
        starts.append(train.make_learner(settings, model)())
    assert orders[0] == orders[2] != orders[1]
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])


def test_few_examples_are_drawn_by_the_seed_and_dev_pairs_are_not(task, model_directory):
    """Would catch: the first lines of a sorted file for a sample; a dev set that changes with the
    seed, on which runs could not be compared.
    """
    model, tokenizer = load_model(str(model_directory), "cpu", "fp32")

    def sources(split, *flags):
        settings = paper.resolve_training(parse(Settings, [*task, *flags, "--out", "o"], ""))
        pairs = encode_examples(*load_examples(settings), settings, model, tokenizer)[split]
        return [tokenizer.text_of(pair.ids[:pair.start]) for pair in pairs]
    every, one, other = (sources(0), sources(0, "--examples", "9"),
                         sources(0, "--examples", "9", "--seed", "1"))
    assert one != other and one != every[:9] and len(set(one)) == 9 and {*one, *other} <= {*every}
    with open("tiny.dev.jsonl", "w") as file:
        file.writelines(json.dumps({"source": f"{i}", "target": "x"}) + "\n" for i in range(30))
    few, again, all_of_them = (sources(1, "--dev-pairs", n, "--seed", seed)
                               for n, seed in (("6", "1"), ("6", "2"), ("0", "1")))
    assert few == again and len(few) == 6 and few != all_of_them[:6] and len(all_of_them) == 30


def test_an_epoch_sees_the_last_pairs_too(task):
    """36 pairs in batches of 5 are 8 steps. Would catch: an incomplete batch left out."""
    del task[task.index("--steps"):task.index("--steps") + 2]
    task[task.index("--batch-size") + 1] = "5"
    train.main([*task, "--epochs", "2", "--out", "run"])
    assert torch.load("run/resume.pt", weights_only=True)["step"] == 16


def test_words_are_what_a_run_from_words_starts_as(model_directory):
    """With a blank in front, as in the official code. Would catch: other words, a start at random.
    """
    model, tokenizer = load_model(str(model_directory), "cpu", "fp32")
    settings = Settings(init="words", init_text="sum up:", mid_dim=0)
    start = starting_point(settings, model, tokenizer)
    settings = dataclasses.replace(settings, **flags_of(start, model, settings))
    expected = model.prefix_from_tokens(tokenizer.encode(" sum up:"))
    assert torch.equal(train.make_learner(settings, model, start)(), expected)


def test_the_first_signal_waits_for_the_step_and_the_second_does_not():
    """Would catch: a cluster's SIGTERM that loses the run, a second Ctrl-C without effect."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        with stop_after_this_step() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("data, lr, epochs, batch_size, prefix_len", [
    ("e2e", 8e-5, 5, 10, 5), ("webnlg", 5e-5, 5, 5, 5), ("dart", 5e-5, 10, 5, 10)])
def test_what_is_left_out_is_what_the_paper_did(data, lr, epochs, batch_size, prefix_len, tmp_path):
    """Table 6 of the paper. Would catch: a default that drifts away from it."""
    s = paper.resolve_training(Settings(data=data, out=str(tmp_path / "new")))
    assert (s.lr, s.epochs, s.batch_size, s.prefix_len) == (lr, epochs, batch_size, prefix_len)
    assert (s.steps, s.mid_dim, s.clip, s.weight_decay, s.warmup) == (None, 512, 1, 0, 0)
    assert s.seed == 101                                # the official code's
    s = paper.resolve_training(Settings(data="world", epochs=3, out=str(tmp_path / "new")))
    assert (s.epochs, s.steps) == (3, None)             # asked for: the world's own steps give way


def test_the_learning_rate_rises_and_falls_in_lines(model):
    """Would catch: a rate that starts or ends a step off. It is 0 after the last step only."""
    def rates(**settings):
        trainer = some_trainer(model, lr=8.0, steps=8, **settings)
        for trainer.step in range(9):
            yield trainer.learning_rate()
    assert [*rates()] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [*rates(warmup=4)] == [2, 4, 6, 8, 8, 6, 4, 2, 0]


def test_frozen_weights_may_be_bf16_while_the_prefix_is_fp32(model):
    """Would catch: a prefix that is rounded to bf16 between steps, and so stops learning."""
    trainer = some_trainer(model.bfloat16(), lr=1e-5, steps=1000)
    trainer.learner.float()
    before = trainer.learner.table.detach().clone()
    losses = [trainer.train_step(some_pairs(4)).item() for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(p.dtype == torch.float32 for p in trainer.learner.parameters())
    moved = (trainer.learner.table - before).abs()
    assert 0 < moved.max() < 1e-4   # steps of 1e-5: bf16 would have rounded them away


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_accumulated_batches_are_one_large_batch(kind):
    """Losses and steps, also of a last batch that is smaller. Would catch: a mean of means, a loss
    per batch, a clip or a step of the optimiser for each part.
    """
    if kind == "bart":
        pytest.importorskip("bart.model", reason="the folder bart/ is not here")
    pairs, found = some_pairs(12), []
    for settings in (dict(batch_size=6), dict(batch_size=2, accumulate=3)):
        trainer = some_trainer({"gpt2": random_gpt2, "bart": random_bart}[kind](), clip=0.5,
                               **settings)
        losses = [trainer.train_step(part).item() for part in (pairs[:6], pairs[6:11], pairs[11:])]
        found.append([*losses, *(weight.detach() for weight in trainer.learner.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.as_tensor(one - other).abs().max() < 1e-9          # float64, added otherwise


def test_a_run_of_accumulated_batches_has_the_steps_of_a_large_batch_and_resumes(task, tmp_path):
    """Would catch: pairs that meet otherwise, an epoch that is as long as if nothing were
    accumulated, a run that goes on elsewhere in the epoch.
    """
    task[task.index("--steps"):task.index("--steps") + 2] = ["--epochs", "2"]
    train.main([*task, "--out", "large", "--batch-size", "8"])
    parts = [*task, "--batch-size", "4", "--accumulate", "2"]
    train.main([*parts, "--out", "whole"])
    train.main([*parts, "--out", "parts", "--stop-at", "7"])
    train.main(["--resume", "parts", "--device", "cpu"])
    same_run(tmp_path / "whole", tmp_path / "parts")
    large, whole = ([x["dev_loss"] for x in lines(tmp_path / run / "log.jsonl") if "dev_loss" in x]
                    for run in ("large", "whole"))
    assert len(large) > 3 and whole == pytest.approx(large, rel=1e-4)   # fp32, steps of 1e-2


def test_fp16_keeps_small_gradients_by_a_loss_scale_and_drops_a_step_that_overflows():
    """Would catch: gradients below 6e-8 that become 0, a scaled gradient that reaches the clip or
    AdamW, a step of infinite gradients.
    """
    gradients = {}
    for dtype, scaled in ((torch.float32, False), (torch.float16, False), (torch.float16, True)):
        trainer = some_trainer(random_gpt2().to(dtype), clip=1e30, mid_dim=0)
        trainer.learner.float()

        def tiny(model, prefix, batch):
            return 1e-6 * target_loss(model, prefix, batch)
        trainer.loss = tiny
        if not scaled:
            trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)
        trainer.optimizer.zero_grad = lambda: None
        trainer.train_step(some_pairs(4))
        gradients[dtype, scaled] = trainer.learner.table.grad
    exact = gradients[torch.float32, False].norm()
    errors = {key: (gradient - gradients[torch.float32, False]).norm() / exact
              for key, gradient in gradients.items()}
    assert errors[torch.float16, True] < 0.02 < 0.2 < errors[torch.float16, False]
    trainer.loss = lambda *inputs: 1e6 * target_loss(*inputs)   # times 2^16: infinite
    before = trainer.learner.table.detach().clone()
    trainer.train_step(some_pairs(4))
    assert torch.equal(trainer.learner.table, before) and trainer.scaler.get_scale() < 2 ** 16


# ---- runs on disk

def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def task(tmp_path, monkeypatch, model_directory):
    """Arguments of a small training run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    with open("tiny.jsonl", "w") as file:
        for i in range(40):
            file.write(json.dumps({"source": f"n : {i}", "target": f"it is {i}"}) + "\n")
    return ["--model", str(model_directory), "--data", "tiny.jsonl", "--device", "cpu",
            "--lr", "1e-2", "--steps", "10", "--batch-size", "4", "--dev-every", "2",
            "--mid-dim", "16"]


def same_state(a, b):
    a, b = (torch.load(path / "resume.pt", weights_only=True) for path in (a, b))
    assert a["step"] == b["step"] and a["best"] == b["best"]
    for name, tensor in a["learner"].items():
        assert torch.equal(tensor, b["learner"][name]), name
    for i, state in a["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, b["optimizer"]["state"][i][name]), name


def same_run(a, b):
    """Two runs ended in the same state, and logged the same dev losses."""
    same_state(a, b)
    a, b = ([x for x in lines(run / "log.jsonl") if "dev_loss" in x] for run in (a, b))
    assert a == b


def test_five_and_five_steps_are_ten(task, tmp_path):
    """Would catch: a resumed run with another order of data, learning rate or optimiser state."""
    train.main([*task, "--out", "whole"])
    assert train.main([*task, "--out", "parts", "--stop-at", "5"]) == 0
    assert torch.load("parts/resume.pt", weights_only=True)["step"] == 5
    train.main(["--resume", "parts", "--device", "cpu"])
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert torch.equal(*(torch.load(tmp_path / run / "prefix.pt", weights_only=True)["prefix"]
                         for run in ("whole", "parts")))


@pytest.mark.parametrize("write", [6, 7])   # a prefix.pt and a resume.pt in the middle
def test_a_kill_in_the_middle_of_a_write_loses_nothing(task, tmp_path, monkeypatch, write):
    """The directory as it lies on the disk when a file is written and not renamed yet: that is what
    a kill leaves. Would catch: half a file under the name of a whole one, or a log that tells a
    step twice.
    """
    replace, count = os.replace, itertools.count(1)

    def copy_and_go_on(*paths):
        if next(count) == write:
            shutil.copytree("whole", "killed")
        replace(*paths)
    monkeypatch.setattr(os, "replace", copy_and_go_on)
    train.main([*task, "--out", "whole"])
    assert len(list((tmp_path / "killed").glob("*.tmp"))) == 1
    assert 0 < torch.load("killed/resume.pt", weights_only=True)["step"] < 10
    train.main(["--resume", "killed", "--device", "cpu"])
    same_run(tmp_path / "whole", tmp_path / "killed")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import train
real, left = os.replace, [int(sys.argv[2])]
def replace(*paths):                    # everything is written, nothing is renamed yet
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)
os.replace = replace
train.main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("write", [6, 7])
def test_a_real_kill_in_the_middle_of_a_write_loses_nothing(task, tmp_path, write):
    """The same with a process that dies. Would catch: what a copy of the directory does not show.
    """
    train.main([*task, "--out", "whole"])
    died = subprocess.run([sys.executable, "-c", KILLED, ROOT, str(write), *task,
                           "--out", "killed"], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert 0 < torch.load("killed/resume.pt", weights_only=True)["step"] < 10
    train.main(["--resume", "killed", "--device", "cpu"])
    same_run(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_ends_the_step_saves_and_prints_how_to_resume(task, tmp_path, monkeypatch, capsys):
    """Would catch: a step lost or done by half when the user is in a hurry."""
    train.main([*task, "--out", "whole"])

    train_step = Trainer.train_step

    def interrupted(trainer, pairs):
        if trainer.step == 2:                           # two are done, this is the third
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(trainer, pairs)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
        assert train.main([*task, "--out", "long"]) == 128 + signal.SIGINT      # the exit status
    assert torch.load("long/resume.pt", weights_only=True)["step"] == 3
    assert ("stopped after step 3; go on with: python train.py --resume long"
            in capsys.readouterr().out)
    train.main(["--resume", "long", "--device", "cpu"])
    same_run(tmp_path / "whole", tmp_path / "long")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_is_the_programs_status(task, tmp_path, name):
    """The same with a process of its own. Would catch: a handler that the program does not set,
    status 0, after which `&& python -m scripts.evaluate` scores half a prefix.
    """
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"this system has no {name}")
    task[task.index("--steps") + 1] = "100000"
    before = signal.signal(number, signal.SIG_DFL)      # a process inherits what nohup ignores
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *task, "--out", "long"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    signal.signal(number, before)
    log, deadline = tmp_path / "long/log.jsonl", time.monotonic() + 60
    while not (log.exists() and '"loss"' in log.read_text()):
        assert time.monotonic() < deadline and run.poll() is None, "the run never started"
        time.sleep(0.05)
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    step = torch.load("long/resume.pt", weights_only=True)["step"]
    assert run.returncode == 128 + number and f"stopped after step {step}" in out
    assert "go on with: python train.py --resume long" in out
    train.main(["--resume", "long", "--stop-at", str(step + 3), "--device", "cpu"])
    assert torch.load("long/resume.pt", weights_only=True)["step"] == step + 3


def test_the_best_prefix_is_kept_and_the_run_describes_itself(task, tmp_path, capsys):
    """Would catch: the last prefix kept in place of the best, settings that are lost."""
    train.main([*task, "--out", "run", "--steps", "40"])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["settings"]["lr"] == 1e-2 and config["settings"]["prefix_len"] == 5
    dev = [x["dev_loss"] for x in lines(tmp_path / "run/log.jsonl") if "dev_loss" in x]
    assert len(dev) == 21 and min(dev) < dev[0]
    out = capsys.readouterr().out
    assert f"dev loss {dev[0]:.3f} -> {min(dev):.3f}" in out and "no prefix" in out
    state = torch.load("run/resume.pt", weights_only=True)
    assert state["best"] == min(dev)


def test_a_prefix_that_gets_worse_is_not_kept(task, tmp_path, monkeypatch):
    """Would catch: the last prefix in place of the best."""
    train_step = Trainer.train_step

    def spoil(trainer, pairs):
        loss = train_step(trainer, pairs)
        for weight in trainer.learner.parameters():
            weight.data *= -30 if trainer.step > 7 else 1
        return loss
    monkeypatch.setattr(Trainer, "train_step", spoil)
    train.main([*task, "--out", "run"])
    dev = [x["dev_loss"] for x in lines(tmp_path / "run/log.jsonl") if "dev_loss" in x]
    assert min(dev) < min(dev[-1], dev[0]), "it was to become better, then worse"
    model, tokenizer = load_model(task[1], "cpu", "fp32")
    settings = Settings(**run_settings("run"))
    _, pairs = encode_examples(*load_examples(settings), settings, model, tokenizer)
    prefix = load_prefix("run/prefix.pt", model)
    total = sum(target_loss(model, prefix, batch_of(model, [pair])).item() for pair in pairs)
    assert total / count_labels(pairs) == pytest.approx(min(dev), rel=1e-5)     # fp32


def test_a_resumed_run_knows_how_good_it_was(task, tmp_path):
    """Would catch: a worse prefix over the best one after resuming; half a line left in the log."""
    train.main([*task, "--out", "run", "--stop-at", "5"])
    state = torch.load("run/resume.pt", weights_only=True)
    torch.save(state | {"best": 1e-3}, "run/resume.pt")
    before = (tmp_path / "run/prefix.pt").read_bytes()
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    train.main(["--resume", "run", "--device", "cpu"])
    assert (tmp_path / "run/prefix.pt").read_bytes() == before
    assert lines(tmp_path / "run/log.jsonl")[-1]["step"] == 10


def test_a_run_is_not_resumed_with_other_weights(task):
    """Would catch: a run that goes on in front of another model, whose optimiser knows nothing."""
    train.main([*task, "--out", "run", "--stop-at", "2"])
    state = torch.load("run/resume.pt", weights_only=True)
    torch.save(state | {"fingerprint": "another"}, "run/resume.pt")
    with pytest.raises(ValueError, match="it was trained with other weights of the model"):
        train.main(["--resume", "run", "--device", "cpu"])


def test_what_is_shown_last_is_generated_without_and_with_the_prefix(task, monkeypatch):
    """Would catch: the prefix's text shown as the frozen model's."""
    original, calls = train.generate, []

    def generate(model, prompts, constraints, prefix):
        calls.append((prefix, constraints.banned_tokens))
        return original(model, prompts, constraints, prefix)
    monkeypatch.setattr(train, "generate", generate)
    train.main([*task, "--out", "run"])
    (without, _), (prefix, _) = calls
    assert without is None and prefix.size(4) == 5
    assert [banned for _, banned in calls] == [(), ()]      # only tables' texts have one line


def test_a_run_from_words_is_resumed_too(task, tmp_path):
    """Would catch: a second fit of the words, or a prefix of another length after resuming."""
    words = ["--init", "words", "--init-text", "table-to-text:"]
    train.main([*task, *words, "--out", "whole"])
    train.main([*task, *words, "--out", "parts", "--stop-at", "5"])
    train.main(["--resume", "parts", "--stop-at", "3", "--device", "cpu"])     # passed already
    assert torch.load("parts/resume.pt", weights_only=True)["step"] == 5
    train.main(["--resume", "parts", "--device", "cpu"])
    same_state(tmp_path / "whole", tmp_path / "parts")
    assert torch.load("whole/prefix.pt", weights_only=True)["prefix"].size(4) == 15     # bytes


def test_a_resumed_run_takes_no_new_settings(task, tmp_path):
    """Not even such as are the default: a flag that is given and ignored would be a lie.

    Would catch: a flag without effect; gigabytes that a kill has left, or a file of somebody else's
    that is removed with them.
    """
    train.main([*task, "--out", "run", "--seed", "7", "--stop-at", "4"])
    for flags in (["--seed", "101"], ["--model", "tiny-gpt2"], ["--clip", "1.0"]):
        with pytest.raises(ValueError, match=f"got {flags[0]} with --resume"):
            train.main(["--resume", "run", *flags])
    (tmp_path / "run" / "model").mkdir()
    for name in ("model/" + temporary_name("model.pt"), temporary_name("resume.pt"), "notes.tmp",
                 "resume.pt.mine.tmp"):
        (tmp_path / "run" / name).touch()
    train.main(["--resume", "run", "--device", "cpu"])
    left = sorted(path.name for path in (tmp_path / "run").rglob("*.tmp"))
    assert left == ["notes.tmp", "resume.pt.mine.tmp"]


def test_a_run_is_not_resumed_with_other_data(task):
    """Would catch: a run that goes on with another order of other pairs as if nothing were."""
    train.main([*task, "--out", "run", "--stop-at", "4"])
    with open("tiny.jsonl", "a") as file:
        file.write('{"source": "new", "target": "pair"}\n')
    with pytest.raises(ValueError, match="the data or its tokens have changed"):
        train.main(["--resume", "run", "--device", "cpu"])


def test_a_loss_that_is_not_finite_stops_the_run(task, tmp_path):
    """Would catch: hours of training on NaN, and a good prefix overwritten by it."""
    with pytest.raises(ValueError, match="got a loss of nan at step .*good prefix.*lower --lr"):
        train.main([*task, "--out", "run", "--lr", "1e20", "--mid-dim", "0", "--clip", "1e30"])
    saved = torch.load("run/prefix.pt", weights_only=True)
    assert saved["prefix"].isfinite().all()


@pytest.mark.parametrize("more", [["--mid-dim", "0"], ["--method", "finetune"]])
def test_a_run_that_is_stopped_after_a_runaway_step_saves_nothing(task, more):
    """Would catch: a state that is lost, saved over the last good one; the loss of a step is that
    before its update.
    """
    if "finetune" in more:
        pytest.importorskip("baselines", reason="there is no baselines/ here")
    with pytest.raises(ValueError, match="got a loss of nan at step 1,"):
        train.main([*task[:-2], *more, "--out", "run", "--lr", "1e20", "--stop-at", "1"])
    assert torch.load("run/resume.pt", weights_only=True)["step"] == 0


@pytest.mark.parametrize("arguments, words", [
    (["--data", "e2f"], "got the data 'e2f'.*did you mean e2e"),
    (["--model", "tiny-gpt3"], "got the model 'tiny-gpt3'.*did you mean tiny-gpt2"),
    (["--method", "prefx"], "invalid choice: 'prefx'"),
    (["--prefxi-len", "3"], "unknown argument '--prefxi-len'; did you mean --prefix-len"),
    (["--batch-size", "many"], "invalid int value: 'many'"),
    (["--lr", "-1"], "got --lr -1.0; expected a number from"),
    (["--prefix-len", "60"], "too long for 4 tokens"),
    (["--prefix-len", "70"], "got a prefix of 70; expected less than the model's 64 positions"),
    (["--steps", "0"], "got --steps 0; expected a number from 1"),
    (["--epochs", "2"], "got --steps and --epochs"),
    (["--max-target", "30"], "got --prefixes, --max-source or --max-target with .*; expected a B"),
    (["--init-text", "summarise:"], "got --init-text with --init random; expected it with"),
    (["--init", "words", "--prefix-len", "3"], "got --prefix-len with --init words"),
    (["--device", "gpu"], "got --device gpu, which PyTorch cannot use here"),
    (["--examples", "1000"], "got --examples 1000; expected at most 36"),
    (["--out", "."], "got --out ., which exists"),
    (["--resume", "."], "which is no run"),
    (["--resume", "run", "--lr", "3"], "which is no run"),
])
def test_a_mistake_is_told_in_one_sentence(task, arguments, words):
    """Would catch: a traceback, or a run that begins with something else than was asked for."""
    with pytest.raises(ValueError, match=words):
        train.main([*task, *arguments] if "--resume" not in arguments else arguments)
    assert sorted(os.listdir()) == ["tiny.jsonl"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_gpu_is_reported(task):
    """Would catch: an assertion from deep inside PyTorch."""
    with pytest.raises(ValueError, match="PyTorch cannot use here .it sees 0 CUDA devices"):
        train.main([*task, "--device", "cuda"])


def test_a_mistake_ends_the_program_with_status_2(task, monkeypatch, capsys):
    """Would catch: status 0 or 1, or more than one line on standard error."""
    monkeypatch.setattr(sys, "argv", ["train.py", *task, "--out", "."])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("error: got --out .")


# In a process of its own: the limit holds for all of its files, standard output among them.
FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, train
from utils.cli import run_program
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # then a write beyond the limit is an error
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
run_program(lambda: train.main(sys.argv[2:]))
"""


def test_a_full_disk_is_reported_and_costs_nothing(task):
    """No file may grow beyond 12 kB: enough for prefix.pt, not for resume.pt.

    Would catch: a traceback, half a file, or temporary files left behind.
    """
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, ROOT, *task, "--out", "run"],
                           capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "could not write run/resume.pt" in ended.stderr.splitlines()[-1]
    assert sorted(os.listdir("run")) == [".lock", "config.json", "log.jsonl", "prefix.pt"]
    load_prefix("run/prefix.pt", load_model(task[1], "cpu", "fp32")[0])


def test_a_pair_that_is_too_long_is_cut_or_refused_aloud(task, capsys):
    """Would catch: pairs dropped in silence, or a target cut so that its end is never learned."""
    tokenizer = load_tokenizer(task[1])
    examples = [Example("a" * 10, ("b" * 5,)), Example("c" * 30, ("d" * 5, "e" * 40))]
    pairs, note = causal.encode(tokenized(examples, tokenizer), limit=32)
    assert [len(p.ids) for p in pairs] == [21, 32]
    assert tokenizer.decode(pairs[1].ids) == " " + "c" * 22 + "<|endoftext|> ddddd <|endoftext|>"
    assert pairs[1].ids[:pairs[1].start] == tokenizer.source_ids("c" * 22)[:23] + [256]
    assert note.startswith("1 of 3 pairs had the end of their source cut to fit 32 tokens, 1 were")
    train.main([*task, "--prefix-len", "46", "--steps", "1", "--out", "run"])
    assert "train: " in capsys.readouterr().out
