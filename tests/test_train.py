"""Only the prefix learns; the loop's loss, batches, schedule, resuming, and what it refuses."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_gpt2
from torch.nn import functional as F

import train
from batches import collate
from data.sequence import Pair
from data.tasks import Example
from loss import dev_loss, target_nats
from model import attend
from opening import run_settings
from prefix import Prefix, keys_and_values, load_prefix
from train import Run, Settings


def some_pairs(n=12):
    torch.manual_seed(2)
    lengths = [(3 + i % 4, 2 + i % 5) for i in range(n)]
    return [Pair(torch.randint(257, (s + t,)).tolist(), s) for s, t in lengths]


def some_run(model, mid_dim=16, **settings):
    torch.manual_seed(3)
    settings = Settings(**{"lr": 1e-2, "steps": 10, "batch_size": 4, "out": "unused"} | settings)
    return Run(settings, model, Prefix(model.config, 5, mid_dim).to(model.wte.weight.dtype))


# ---- only the prefix learns

def test_only_the_prefix_learns(model):
    """Every frozen weight is bit-identical after training, has no gradient and no optimiser state.

    Would catch: a weight left trainable, an optimiser that decays frozen weights, a buffer.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = some_run(model, weight_decay=0.1)
    theta = {name: tensor.clone() for name, tensor in run.learner.named_parameters()}
    for _ in range(5):
        run.update(some_pairs(4))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    learned = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in learned} == {id(p) for p in run.learner.parameters()}
    assert all(any(p is q for q in learned) for p in run.optimizer.state)
    for name, tensor in run.learner.named_parameters():
        assert not torch.equal(tensor, theta[name]), f"{name} has learned nothing"


def test_the_gradient_of_the_prefix_is_the_slope_of_the_loss():
    """Finite differences, in float64, through the whole model, to theta and its MLP.

    Would catch: a prefix detached in one layer, a gradient summed over the wrong dimension.
    """
    model = random_gpt2(vocab_size=17, n_positions=16, n_embd=4, n_layer=2, n_head=2)
    pairs = [Pair([3, 5, 7, 2, 16], 2), Pair([1, 16, 4], 1)]
    prefix = Prefix(model.config, 2, mid_dim=3).double()
    names, theta = zip(*prefix.named_parameters())

    def loss(*theta):
        kv = torch.func.functional_call(prefix, dict(zip(names, theta)))
        return target_nats(model, kv, collate(pairs, "cpu"))

    assert torch.autograd.gradcheck(loss, theta)            # its own tolerances: 1e-6 and 1e-3


def saved_for_backward(model, step):
    """The names of the linear layers whose input autograd keeps while `step` runs."""
    inputs, saved = {}, []          # the tensors themselves, so that no address is used twice
    def head(hidden):               # no module: its weight is the word embedding
        inputs["head"] = hidden
        return type(model).head(model, hidden)

    model.head = head
    hooks = [layer.register_forward_pre_hook(
                 lambda layer, args, name=name: inputs.update({name: args[0]}))
             for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        step()
    for hook in hooks:
        hook.remove()
    del model.head
    kept = {t.data_ptr() for t in saved}
    return {name for name, tensor in inputs.items() if tensor.data_ptr() in kept}


def test_nothing_is_kept_that_only_a_weight_gradient_needs(model):
    """Only the gradient of its weight needs a linear layer's input; a frozen one keeps none.

    Would catch: activations stored for weights that do not learn.
    """
    prefix, batch = Prefix(model.config, 5, 16).double(), collate(some_pairs(4), "cpu")
    assert saved_for_backward(model, lambda: target_nats(model, prefix(), batch)) == set()
    model.requires_grad_(True)      # the control: fine-tuning keeps all 12 inputs, and the head's
    assert len(saved_for_backward(model, lambda: target_nats(model, prefix(), batch))) == 13


def test_the_mlp_runs_once_per_step(model):
    """Would catch: a prefix computed for every row of the batch, as other implementations do."""
    run, shapes = some_run(model), []
    run.learner.mlp.register_forward_hook(lambda mlp, args, out: shapes.append(tuple(out.shape)))
    run.update(some_pairs(4))
    assert shapes == [(5, 2 * 3 * 24)]


# ---- loss and batches

def test_the_loss_is_that_of_the_target_and_its_end(model):
    """Would catch: a loss on the source or on padding, or shifted by one token."""
    prefix, pairs, expected = Prefix(model.config, 5, 16).double()(), some_pairs(), 0.0
    for pair in pairs:
        logp = F.log_softmax(model.head(model(torch.tensor([pair.ids]), prefix)), -1)[0]
        expected -= sum(logp[t - 1, pair.ids[t]] for t in range(pair.start, len(pair.ids)))
    assert torch.allclose(target_nats(model, prefix, collate(pairs, "cpu")), expected, rtol=1e-12)


def test_long_targets_weigh_more(model):
    """Summed over a target, averaged over the batch. Would catch: a mean over tokens, as usual."""
    pairs, run = some_pairs(4), some_run(model, clip=1e9, mid_dim=0)
    table = run.learner.table.detach().clone().requires_grad_()
    kv = torch.func.functional_call(run.learner, {"table": table}, ())
    expected, = torch.autograd.grad(target_nats(model, kv, collate(pairs, "cpu")) / 4, table)
    seen = []
    run.learner.table.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    run.update(pairs)
    assert torch.allclose(seen[0], expected, rtol=1e-10)


def test_the_dev_loss_is_the_mean_over_all_target_tokens(model):
    """Would catch: a mean of means, or pairs that are left out at the end of a batch."""
    pairs, prefix = some_pairs(11), Prefix(model.config, 5, 16).double()
    nats = sum(target_nats(model, prefix(), collate([pair], "cpu")).item() for pair in pairs)
    tokens = sum(len(pair.ids) - pair.start for pair in pairs)
    assert dev_loss(model, prefix, pairs, 4) == pytest.approx(nats / tokens, rel=1e-12)


def test_what_texts_begin_with_is_computed_once_and_scored_as_if_alone(model, monkeypatch):
    """Would catch: a target that sees another one, or stands at another position for its company;
    a first token predicted from the neighbour's last; a token left out or counted twice.
    """
    torch.manual_seed(4)
    pairs = [Pair(source + torch.randint(257, (n,)).tolist(), len(source))
             for source, lengths in (([5, 6, 7], (1, 4, 2)), ([8], (3,)), ([9, 5, 6, 7], (2, 2)))
             for n in lengths]
    prefix, calls = Prefix(model.config, 5, 16).double(), []
    model.register_forward_pre_hook(lambda model, args: calls.append(tuple(args[0].shape)))
    monkeypatch.setattr("batches.BALANCE", 100)         # so narrow a model would cut the row
    for most in (6, 4, 2, 1):
        alone = sum(target_nats(model, prefix(), collate([p], "cpu")).item() for p in pairs)
        calls.clear()
        shared = dev_loss(model, prefix, pairs, most)
        assert shared == pytest.approx(alone / 14, rel=1e-12)
        if most == 6:       # the sources, and of the targets all but each one's last: once each
            assert calls == [(1, 3 + 1 + 4 + 14 - 6)]


def test_a_long_gradient_is_cut_to_its_length(model):
    """Would catch: clipping that is left out, or done after the step."""
    run, norms = some_run(model, clip=0.5), []
    run.optimizer.register_step_pre_hook(lambda *_: norms.append(torch.stack(
        [p.grad.norm() for p in run.learner.parameters()]).norm().item()))
    run.update(some_pairs(4))
    assert norms == [pytest.approx(0.5, rel=1e-5)]      # clip_grad_norm_ divides by norm + 1e-6


def test_the_optimiser_is_the_papers(model):
    """AdamW with the usual constants, and no decay unless it is asked for. Would catch: PyTorch's
    own default of 0.01, which would pull the prefix to zero.
    """
    for given, decay in (({}, 0), ({"weight_decay": 0.25}, 0.25)):
        optimizer = some_run(model, **given).optimizer
        group, = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, decay)


def test_the_learning_rate_reaches_the_optimiser(model):
    """Would catch: a schedule that is computed and never used."""
    run, rates = some_run(model, lr=8.0, steps=4), []
    run.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for _ in range(4):
        run.update(some_pairs(4))
    assert rates == [8, 6, 4, 2]


def test_the_attention_and_the_sharing_that_are_asked_for_are_used(model):
    """Would catch: --attention fused or --share-source without effect: the loss is the same."""
    calls, seen = [], []

    def other(*inputs, causal):
        calls.append(1)
        return attend(*inputs, causal)

    def nats(model, prefix, batch, attend):
        seen.append(batch.look)
        return target_nats(model, prefix, batch, attend)
    run = some_run(model, share_source=True)
    run.attend, run.nats = other, nats
    run.update(some_pairs(4))
    assert len(calls) == 3 and seen[0] is not None      # three layers; who may look where: a trie


def test_the_loss_that_is_logged_is_the_mean_over_tokens(model, tmp_path):
    """Would catch: a mean over batches or pairs, or one that is not begun anew."""
    pairs = some_pairs(40)
    run = some_run(model, mid_dim=0, lr=1e-12, steps=20, out=str(tmp_path / "run"))
    run.begin("")
    train.learn(run, pairs, pairs)
    told = [x["loss"] for x in lines(tmp_path / "run/log.jsonl") if "loss" in x]
    mean = dev_loss(model, run.learner, pairs, 8)
    assert told == pytest.approx([mean, mean], rel=1e-6)        # two epochs, and nothing is learned


def test_the_seed_decides_where_it_starts_and_in_what_order(model, tmp_path, model_directory):
    """Would catch: three seeds that are one and the same run."""
    orders, starts = [], []
    small, tokenizer = train.open_model(str(model_directory), "cpu", "fp32")
    for seed in (1, 2, 1):
        run, met = some_run(model, seed=seed, steps=3, out=str(tmp_path / "r")), []
        pairs, update = some_pairs(12), run.update
        run.begin("")
        run.update = lambda batch: met.append([pair.ids for pair in batch]) or update(batch)
        train.learn(run, pairs, pairs[:2])
        shutil.rmtree(tmp_path / "r")
        orders.append(met)
        settings = Settings(seed=seed, prefix_len=4, mid_dim=8)
        starts.append(train.make_prefix(settings, small, tokenizer)())
    assert orders[0] == orders[2] != orders[1]
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])


def test_few_examples_are_drawn_by_the_seed_and_dev_pairs_are_not(task, model_directory):
    """Would catch: the first lines of a sorted file for a sample; a dev set that changes with the
    seed, on which runs could not be compared.
    """
    def sources(*flags):
        settings = train.resolve(train.parse(Settings, [*task, *flags, "--out", "o"], ""))
        return [example.source for example in train.load_examples(settings)[0]]
    every, one, other = sources(), sources("--examples", "9"), sources("--examples", "9", "--seed",
                                                                       "1")
    assert one != other and one != every[:9] and len(set(one)) == 9 and {*one, *other} <= {*every}
    tokenizer = train.open_model(str(model_directory), "cpu", "fp32")[1]
    dev = [Example(f"{i}", ("x",)) for i in range(30)]
    few, again, all_of_them = (train.make_pairs(dev, dev, Settings(dev_pairs=n, seed=seed),
                                                tokenizer, 50)[1]
                               for n, seed in ((6, 1), (6, 2), (0, 1)))
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
    model, tokenizer = train.open_model(str(model_directory), "cpu", "fp32")
    settings = Settings(init="words", init_text="sum up:", mid_dim=0)
    wanted = keys_and_values(model, tokenizer.encode_ordinary(" sum up:"))
    assert torch.equal(train.make_prefix(settings, model, tokenizer)(), wanted)


def test_fine_tuning_is_in_fp32_and_the_run_keeps_its_dtype(task, monkeypatch):
    """As on a GPU, where left out means bf16. Would catch: steps of 1e-5 rounded away in bf16."""
    pytest.importorskip("baselines", reason="baselines.py, a side door, is not here")
    words = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
    monkeypatch.setattr("opening.decide_device",
                        lambda device, dtype: (torch.device("cpu"), words[dtype]))
    train.main([*task, "--steps", "1", "--out", "prefix"])
    at = task.index("--mid-dim")
    del task[at:at + 2]
    train.main([*task, "--steps", "1", "--method", "finetune", "--out", "tuned"])
    assert [run_settings(run)["dtype"] for run in ("prefix", "tuned")] == ["bf16", "fp32"]


def test_the_first_signal_waits_for_the_step_and_the_second_does_not():
    """Would catch: a cluster's SIGTERM that loses the run, a second Ctrl-C without effect."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        with train.stop_politely() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("data, lr, epochs, batch_size, prefix_len", [
    ("e2e", 8e-5, 5, 10, 5), ("webnlg", 5e-5, 5, 5, 5), ("dart", 5e-5, 10, 5, 10)])
def test_what_is_left_out_is_what_the_paper_did(data, lr, epochs, batch_size, prefix_len, tmp_path):
    """Table 6 of the paper. Would catch: a default that drifts away from it."""
    s = train.resolve(Settings(data=data, out=str(tmp_path / "new")))
    assert (s.lr, s.epochs, s.batch_size, s.prefix_len) == (lr, epochs, batch_size, prefix_len)
    assert (s.steps, s.mid_dim, s.clip, s.weight_decay, s.warmup) == (None, 512, 1, 0, 0)
    assert s.seed == 101                                # the official code's
    s = train.resolve(Settings(data="world", epochs=3, out=str(tmp_path / "new")))
    assert (s.epochs, s.steps) == (3, None)             # asked for: the world's own steps give way


def test_the_learning_rate_rises_and_falls_in_lines(model):
    """Would catch: a rate that starts or ends a step off. It is 0 after the last step only."""
    run, rates = some_run(model, lr=8.0, steps=8, warmup=0), []
    for run.step in range(9):
        rates.append(run.learning_rate())
    assert rates == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    run.settings.warmup, rates = 4, []
    for run.step in range(9):
        rates.append(run.learning_rate())
    assert rates == [2, 4, 6, 8, 8, 6, 4, 2, 0]


def test_frozen_weights_may_be_bf16_while_the_prefix_is_fp32(model):
    """Would catch: a prefix that is rounded to bf16 between steps, and so stops learning."""
    run = some_run(model.bfloat16(), lr=1e-5, steps=1000)
    run.learner.float()
    before = run.learner.table.detach().clone()
    loss = [run.update(some_pairs(4)).item() for _ in range(3)]
    assert all(math.isfinite(x) for x in loss)
    assert all(p.dtype == torch.float32 for p in run.learner.parameters())
    moved = (run.learner.table - before).abs()
    assert 0 < moved.max() < 1e-4   # steps of 1e-5: bf16 would have rounded them away


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


def test_five_and_five_steps_are_ten(task, tmp_path):
    """Would catch: a resumed run with another order of data, learning rate or optimiser state."""
    train.main([*task, "--out", "whole"])
    train.main([*task, "--out", "parts", "--stop-at", "5"])
    assert torch.load("parts/resume.pt", weights_only=True)["step"] == 5
    train.main(["--resume", "parts", "--device", "cpu"])
    same_state(tmp_path / "whole", tmp_path / "parts")
    for name in ("prefix.pt",):
        assert torch.equal(*(torch.load(tmp_path / run / name, weights_only=True)["prefix"]
                             for run in ("whole", "parts")))
    assert ([x for x in lines(tmp_path / "whole/log.jsonl") if "dev_loss" in x]
            == [x for x in lines(tmp_path / "parts/log.jsonl") if "dev_loss" in x])


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import train
real, left = os.fsync, [int(sys.argv[2])]
def fsync(number):                      # everything is written, nothing is renamed yet
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(number)
os.fsync = fsync
train.main(sys.argv[3:])
"""


@pytest.mark.parametrize("write", [6, 7])   # a prefix.pt and a resume.pt in the middle
def test_a_kill_in_the_middle_of_a_write_loses_nothing(task, tmp_path, write):
    """Would catch: half a file under the name of a whole one, or a log that tells a step twice."""
    train.main([*task, "--out", "whole"])
    died = subprocess.run([sys.executable, "-c", KILLED, ROOT, str(write), *task,
                           "--out", "killed"], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert 0 < torch.load("killed/resume.pt", weights_only=True)["step"] < 10
    train.main(["--resume", "killed", "--device", "cpu"])
    same_state(tmp_path / "whole", tmp_path / "killed")
    assert ([x for x in lines(tmp_path / "whole/log.jsonl") if "dev_loss" in x]
            == [x for x in lines(tmp_path / "killed/log.jsonl") if "dev_loss" in x])


def test_ctrl_c_saves_and_says_how_to_go_on(task, tmp_path):
    """Would catch: a step lost or done by half when the user is in a hurry."""
    task[task.index("--steps") + 1] = "100000"
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *task, "--out", "long"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log, deadline = tmp_path / "long/log.jsonl", time.monotonic() + 60
    while not (log.exists() and '"loss"' in log.read_text()):
        assert time.monotonic() < deadline and run.poll() is None, "the run never started"
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=60)
    step = torch.load("long/resume.pt", weights_only=True)["step"]
    assert run.returncode == 0 and f"stopped after step {step}" in out
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
    update = Run.update

    def spoil(run, pairs):
        nats = update(run, pairs)
        for weight in run.learner.parameters():
            weight.data *= -30 if run.step > 7 else 1
        return nats
    monkeypatch.setattr(Run, "update", spoil)
    train.main([*task, "--out", "run"])
    dev = [x["dev_loss"] for x in lines(tmp_path / "run/log.jsonl") if "dev_loss" in x]
    assert min(dev) < min(dev[-1], dev[0]), "it was to become better, then worse"
    model, tokenizer = train.open_model(task[1], "cpu", "fp32")
    settings = Settings(**run_settings("run"))
    _, pairs = train.make_pairs(*train.load_examples(settings), settings, tokenizer, 59)
    prefix = load_prefix("run/prefix.pt", model)
    nats = sum(target_nats(model, prefix, collate([pair], "cpu")).item() for pair in pairs)
    kept = nats / sum(len(pair.ids) - pair.start for pair in pairs)
    assert kept == pytest.approx(min(dev), rel=1e-5)    # fp32, other batches


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


def test_other_weights_cannot_be_gone_on_with(task):
    """Would catch: a run that goes on in front of another model, whose optimiser knows nothing."""
    train.main([*task, "--out", "run", "--stop-at", "2"])
    state = torch.load("run/resume.pt", weights_only=True)
    torch.save(state | {"fingerprint": "another"}, "run/resume.pt")
    with pytest.raises(ValueError, match="it was trained with other weights of the model"):
        train.main(["--resume", "run", "--device", "cpu"])


def test_what_is_shown_last_is_told_without_and_with_the_prefix(task, monkeypatch):
    """Would catch: the prefix's text shown as the frozen model's."""
    said, calls = train.generate, []

    def generate(model, prompts, rules, prefix, **more):
        calls.append((prefix, rules.banned))
        return said(model, prompts, rules, prefix, **more)
    monkeypatch.setattr(train, "generate", generate)
    train.main([*task, "--out", "run"])
    (without, _), (prefix, _) = calls
    assert without is None and prefix.size(4) == 5
    assert [banned for _, banned in calls] == [(10,), (10,)]


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
    """Not even such as are the default: what is asked for and not done is to be told.

    Would catch: a flag without effect; gigabytes that a kill has left in a folder below.
    """
    train.main([*task, "--out", "run", "--seed", "7", "--stop-at", "4"])
    for flags in (["--seed", "101"], ["--model", "tiny-gpt2"], ["--clip", "1.0"]):
        with pytest.raises(ValueError, match=f"got {flags[0]} with --resume"):
            train.main(["--resume", "run", *flags])
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "model.pt.x.tmp").touch()
    train.main(["--resume", "run", "--device", "cpu"])
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_other_data_cannot_be_gone_on_with(task):
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


@pytest.mark.parametrize("arguments, words", [
    (["--data", "e2f"], "got the data 'e2f'.*did you mean e2e"),
    (["--model", "tiny-gpt3"], "got the model 'tiny-gpt3'.*did you mean tiny-gpt2"),
    (["--method", "prefx"], "invalid choice: 'prefx'"),
    (["--prefxi-len", "3"], "unknown argument '--prefxi-len'; did you mean --prefix-len"),
    (["--batch-size", "many"], "invalid int value: 'many'"),
    (["--lr", "-1"], "got --lr -1.0; expected a number from"),
    (["--prefix-len", "60"], "too long for 4 tokens"),
    (["--prefix-len", "70"], "got a prefix of 70; expected less than the model's 64 positions"),
    (["--steps", "0"], "got --steps 0; expected at least 1"),
    (["--epochs", "2"], "got --steps and --epochs"),
    (["--max-target", "30"], "got --max-source or --max-target with .*; expected a BART"),
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
def test_a_missing_gpu_is_told(task):
    """Would catch: an assertion from deep inside PyTorch."""
    with pytest.raises(ValueError, match="PyTorch cannot use here .it sees 0 CUDA devices"):
        train.main([*task, "--device", "cuda"])


def test_a_mistake_ends_the_program_with_status_2(task):
    """Would catch: status 0 or 1, or more than one line on standard error."""
    ended = subprocess.run([sys.executable, str(ROOT / "train.py"), *task, "--out", "."],
                           capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: got --out .") and ended.stderr.count("\n") == 1


FULL = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
import plumbing, torch, train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # so that a write beyond the limit is an error
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
plumbing.run(lambda: train.main(sys.argv[2:]))
"""


def test_a_full_disk_is_told_and_costs_nothing(task, tmp_path):
    """No file may grow beyond 12 kB: enough for prefix.pt, not for resume.pt.

    Would catch: a traceback, half a file, or temporary files left behind.
    """
    ended = subprocess.run([sys.executable, "-c", FULL, ROOT, *task, "--out", "run"],
                           capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "could not write run/resume.pt" in ended.stderr.splitlines()[-1]
    assert sorted(os.listdir("run")) == ["config.json", "log.jsonl", "prefix.pt"]
    load_prefix("run/prefix.pt", train.open_model(task[1], "cpu", "fp32")[0])


def test_a_pair_that_is_too_long_is_cut_or_refused_aloud(task, capsys):
    """Would catch: pairs dropped in silence, or a target cut so that its end is never learned."""
    from data.sequence import encode_pairs, prompt_ids
    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(task[1])
    examples = [Example("a" * 10, ("b" * 5,)), Example("c" * 30, ("d" * 5, "e" * 40))]
    pairs, note = encode_pairs(examples, tokenizer, room=32)
    assert [len(p.ids) for p in pairs] == [21, 32]
    assert tokenizer.decode(pairs[1].ids) == " " + "c" * 22 + "<|endoftext|> ddddd <|endoftext|>"
    assert pairs[1].ids[:pairs[1].start] == prompt_ids(tokenizer, "c" * 22)[:23] + [256]
    assert note.startswith("1 of 3 pairs had the end of their source cut to fit 32 tokens, 1 were")
    train.main([*task, "--prefix-len", "46", "--steps", "1", "--out", "run"])
    assert "train: " in capsys.readouterr().out
