"""Learning three prefixes: the loss of BART, its batches, the program from a file to a text."""
import json

import pytest
import torch
from conftest import batch_of
from torch.nn import functional as F

import sample
import train
from bart.model import BART, BARTConfig, ThreePrefixes
from bart.prefix import BARTPrefix, parse_places
from data import seq2seq
from data.batches import Pair
from data.pairs import dev_batches, settings_for
from data.paper import resolve_training
from prefix import target_loss
from pretrained.architectures import new_prefix
from pretrained.load import load_model
from pretrained.run_directory import load_prefix
from train import Settings, Trainer


def some_pairs(n=5):
    """<s>source</s> and <s>target</s> of several lengths."""
    torch.manual_seed(2)
    lengths = [(4 + i % 4, 3 + i % 5) for i in range(n)]
    return [Pair([0, *torch.randint(3, 262, (s - 2,)).tolist(), 2, 0,
                  *torch.randint(3, 262, (t - 2,)).tolist(), 2], s) for s, t in lengths]


def some_prefixes(bart, mid_dim=16):
    torch.manual_seed(3)
    lengths = dict(encoder=3, decoder=4, cross=5)
    return BARTPrefix(bart.empty_prefix(), bart.width, lengths, mid_dim).double()


def some_trainer(bart, dev=(), **settings):
    settings = Settings(**{"lr": 1e-2, "steps": 10, "batch_size": 4, "out": "unused"} | settings)
    return Trainer(settings, bart, some_prefixes(bart), some_pairs(4), dev)


def test_only_the_prefixes_learn(bart):
    """Would catch: a weight left trainable, or a place whose numbers the optimiser never gets."""
    before = {name: tensor.clone() for name, tensor in bart.state_dict().items()}
    trainer = some_trainer(bart, weight_decay=0.1)
    theta = {name: tensor.clone() for name, tensor in trainer.learner.named_parameters()}
    for _ in range(3):
        trainer.train_step(some_pairs(4))
    for name, tensor in bart.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in bart.parameters())
    for name, tensor in trainer.learner.named_parameters():
        assert not torch.equal(tensor, theta[name]), f"{name} has learned nothing"


def test_the_loss_is_that_of_the_target_its_first_token_and_its_end(bart):
    """</s> goes in first; <s>, the words and </s> come out. Would catch: a shift by one, padding
    that is learned, <s> left out (the official code has it in).
    """
    prefix, pairs, expected = some_prefixes(bart)(), some_pairs(), 0.0
    for pair in pairs:
        source, target = pair.ids[:pair.start], pair.ids[pair.start:]
        hidden = bart.hidden_states(torch.tensor([[2, *target[:-1]]]), torch.tensor([source]),
                                    prefix=prefix)                              # (1, T, C)
        logits = bart.head(hidden)[0]                                           # (T, V)
        expected -= F.log_softmax(logits, -1)[range(len(target)), target].sum()
    batch = batch_of(bart, pairs)
    assert len(batch.labels) == sum(len(pair.ids) - pair.start for pair in pairs)
    got = target_loss(bart, prefix, batch)
    assert torch.allclose(got, expected, rtol=1e-12)
    tokens = sum(len(pair.ids) - pair.start for pair in pairs)
    assert batch.n_labels == tokens and batch.n_pairs == len(pairs)
    mean = some_trainer(bart, dev_batches(pairs, 2, bart)).dev_loss()
    assert mean == pytest.approx((got / tokens).item(), rel=1e-12)


def test_every_token_of_a_batch_weighs_the_same(bart):
    """The official code's BART. Would catch: GPT-2's sum over a target, ten times the gradient."""
    trainer, pairs, seen = some_trainer(bart, clip=1e9), some_pairs(4), []
    learner = some_prefixes(bart)
    tokens = sum(len(pair.ids) - pair.start for pair in pairs)
    (target_loss(bart, learner(), batch_of(bart, pairs)) / tokens).backward()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(trainer.learner["cross"].table.grad.clone()))
    trainer.train_step(pairs)
    assert torch.allclose(seen[0], learner["cross"].table.grad, rtol=1e-10)


def test_nothing_is_saved_that_only_a_weight_gradient_needs(bart):
    """Only the gradient of its weight needs a linear layer's input; a frozen one saves none.

    Would catch: activations of an encoder of 512 tokens stored for weights that do not learn.
    """
    inputs, saved = [], []          # the tensors themselves, so that no address is used twice
    for layer in bart.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    prefix, batch = some_prefixes(bart), batch_of(bart, some_pairs())
    for learns in (False, True):    # True is the control
        bart.requires_grad_(learns)
        inputs.clear(), saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            target_loss(bart, prefix(), batch)
        addresses = {t.data_ptr() for t in saved}
        assert any(t.data_ptr() in addresses for t in inputs) == learns
    bart.requires_grad_(False)


# ---- settings

@pytest.mark.parametrize("given, lengths", [
    ("", {"encoder": 7, "decoder": 7, "cross": 7}), ("cross", {"cross": 7}),
    ("encoder=2, cross", {"encoder": 2, "cross": 7}),
    ("decoder=90", {"decoder": 90})])               # longer than the 64 positions
def test_places_and_their_lengths_can_be_chosen(bart, given, lengths):
    """Would catch: a length for all three only, or a prefix counted among the positions."""
    assert parse_places(given, 7, "random") == lengths
    prefix = new_prefix(bart, 7, 0, "random", given)()
    assert {place: part.size(4) for place, part in prefix._asdict().items() if part.size(4)
            } == lengths
    assert settings_for(bart, train.Settings()).max_target == 60
    assert seq2seq.token_limit(bart, 90, 512, 60) == (64, 60)


@pytest.mark.parametrize("given", ["middle", "cross,cross", "cross=", "cross=-1", "cross=0",
                                   "cross=x", ","])
def test_other_places_are_refused(bart, given):
    """Would catch: a traceback, or a prefix of no length that learns nothing."""
    with pytest.raises(ValueError, match=f"got --prefixes {given}; expected one or more of"):
        new_prefix(bart, 7, 16, "random", given)


def test_gpt2_has_one_place(bart, model):
    """Would catch: --prefixes, --max-source or --max-target passed over in silence."""
    assert new_prefix(model, 7, 16)().size(4) == 7
    with pytest.raises(ValueError, match="no length: the words of --init-text decide it"):
        new_prefix(bart, 7, 16, "words", "cross=3")
    assert seq2seq.token_limit(bart, 7, 20, 10) == (20, 10)
    filled = settings_for(bart, train.Settings())
    assert (filled.max_source, filled.max_target) == (512, 60)      # the paper's, kept in the run
    for given in ({"prefixes": "cross"}, {"max_source": 512}, {"max_target": 60}):
        with pytest.raises(ValueError, match="got --prefixes, --max-source or --max-target with a "
                                             "gpt2; expected a BART"):
            settings_for(model, train.Settings(**given))


# ---- the program

@pytest.fixture
def task(tmp_path, bart_directory, monkeypatch):
    """A task of 40 lines, and the flags of a short run."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"source": f"n : {i}", "target": f"it is {i}"}) for i in range(40)]
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines))
    return ["--model", str(bart_directory), "--data", "tiny.jsonl", "--lr", "1e-2", "--steps",
            "40", "--batch-size", "4", "--mid-dim", "16", "--device", "cpu", "--prefix-len", "4"]


def dev_losses(run):
    lines = [json.loads(line) for line in open(f"{run}/log.jsonl")]
    return [line["dev_loss"] for line in lines if "dev_loss" in line]


def test_a_run_learns_is_resumed_bit_for_bit_and_decodes(task, capsys):
    """Would catch: a place that is not saved, a run that cannot be opened again."""
    train.main([*task, "--out", "whole"])
    out = capsys.readouterr().out
    dev = dev_losses("whole")
    assert dev[-1] < 0.7 * dev[0] and "no prefix" in out
    train.main([*task, "--out", "stopped", "--stop-at", "13"])
    train.main(["--resume", "stopped", "--device", "cpu"])
    assert dev_losses("stopped") == dev
    whole, stopped = (torch.load(f"{run}/prefix.pt", weights_only=True)["prefix"]
                      for run in ("whole", "stopped"))
    assert whole.keys() == set(ThreePrefixes._fields)
    assert all(torch.equal(whole[place], stopped[place]) for place in whole)
    capsys.readouterr()
    for more in ([], ["--num-beams", "3"]):
        sample.main(["--run", "whole", "--device", "cpu", "n : 41", "--max-new-tokens", "12",
                     *more])
        assert "a" in capsys.readouterr().out


def test_a_run_from_words_at_chosen_places(task, capsys):
    """Would catch: words that are not those of the flag, a place that learns although left out."""
    del task[task.index("--prefix-len"):]
    train.main([*task, "--steps", "2", "--out", "run", "--prefixes", "encoder,cross",
                "--init", "words", "--init-text", "sum up:", "--mid-dim", "0"])
    assert "prefix started from 'sum up:', length 8" in capsys.readouterr().out
    model = load_model(task[1], "cpu", "fp32")[0]
    assert [part.size(4) for part in load_prefix("run/prefix.pt", model)] == [8, 0, 8]
    settings = json.loads(open("run/config.json").read())["settings"]
    assert settings["prefix_len"] == 8 and settings["prefixes"] == "encoder,cross"


def test_a_run_starts_from_the_prefixes_of_another(task, tmp_path):
    """Would catch: lengths or places that are not the other run's, a start that is not it."""
    places = ["--prefixes", "encoder=2,cross", "--mid-dim", "0"]
    train.main([*task, *places, "--steps", "5", "--out", "first"])
    del task[task.index("--prefix-len"):]
    train.main([*task, "--mid-dim", "0", "--steps", "5", "--start-from", "first", "--out", "next"])
    assert dev_losses("next")[0] == pytest.approx(min(dev_losses("first")), rel=1e-5)
    settings = json.loads(open("next/config.json").read())["settings"]
    assert settings["prefixes"] == "encoder=2,cross=4"
    with pytest.raises(ValueError, match="start-from"):
        train.main([*task, "--start-from", "first", "--prefixes", "cross", "--out", "other"])


def test_headlines_are_learned_decoded_and_scored(task, monkeypatch):
    """Would catch: a score that looks for a table in a report, three prefixes taken for one."""
    evaluate = pytest.importorskip("scripts.evaluate", reason="there is no scripts/ here")
    monkeypatch.setattr("scripts.scores.SCORERS", {})   # METEOR alone takes half a minute to start
    task[task.index("tiny.jsonl")] = "world-headlines"
    train.main([*task, "--steps", "2", "--dev-pairs", "4", "--out", "run"])
    evaluate.main(["--run", "run", "--split", "dev", "--examples", "3", "--device", "cpu",
                   "--max-new-tokens", "5"])
    scores = json.loads(open("run/dev.scores.json").read())["scores"]["all"]
    assert scores["slots"] == 0 and scores["tables"] == 3


def test_fine_tuning_goes_through_the_same_loop(task):
    """Would catch: an attribute error after minutes of loading, a BART that is saved half."""
    pytest.importorskip("baselines", reason="there is no baselines/ here")
    for flag in ("--prefix-len", "--mid-dim"):
        del task[task.index(flag):task.index(flag) + 2]
    with pytest.raises(ValueError, match="got --method finetune-top2 with a BART; expected"):
        train.main([*task, "--method", "finetune-top2", "--out", "top"])
    train.main([*task, "--steps", "3", "--method", "finetune", "--out", "all", "--lr", "1e-3"])
    assert dev_losses("all")[-1] < dev_losses("all")[0]
    sample.main(["--run", "all", "--device", "cpu", "n : 41", "--max-new-tokens", "12"])


def test_the_tiny_bart_summarises_where_nothing_is_said():
    """Would catch: tables for a model that reads reports."""
    assert resolve_training(Settings(model="tiny-bart")).data == "world-headlines"
    assert resolve_training(Settings()).data == "world"


def test_the_papers_settings_are_the_defaults_for_xsum():
    """Table 6. Would catch: GPT-2's settings for BART's task."""
    with torch.device("meta"):
        large = BART(BARTConfig())
    found = {data: settings_for(large, resolve_training(Settings(model="bart-large", data=data)))
             for data in ("xsum", "xsum-news-to-sports", "xsum-within-news")}
    assert {data: (s.lr, s.epochs, s.batch_size, s.prefix_len, s.mid_dim,
                   *seq2seq.token_limit(large, s.prefix_len, s.max_source, s.max_target))
            for data, s in found.items()} == {
        "xsum": (5e-5, 30, 14, 100, 800, 512, 60),
        "xsum-news-to-sports": (5e-5, 15, 36, 40, 800, 512, 60),
        "xsum-within-news": (5e-5, 30, 36, 80, 800, 512, 60)}
    assert resolve_training(Settings()).mid_dim == 512
    for data in ("dialogsum", "scitldr"):       # not in the paper, and XSum is the nearest that is
        settings = resolve_training(Settings(model="bart-large", data=data))
        assert settings.prefix_len == 100
