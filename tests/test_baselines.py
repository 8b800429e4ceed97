"""Fine-tuning, the paper's baseline, through the same loop: what learns, what is kept, what not."""
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import random_bart, random_gpt2
from test_train import some_pairs

import sample
import train
from baselines import FineTune
from batches import collate
from checkpoint import load, save
from loss import target_nats
from opening import open_model
from settings import DEFAULTS
from train import Run, Settings


def tuned_run(top=None, **settings):
    learner = FineTune(random_gpt2(), top)
    settings = Settings(**{"method": "finetune", "lr": 1e-3, "steps": 10, "batch_size": 4,
                           "out": "unused"} | settings)
    return Run(settings, learner.model, learner)


def test_fine_tuning_moves_every_weight_and_the_top_only_its_own():
    """Would catch: a baseline that is partly frozen, which would be easy to beat; or a "top 2" that
    trains three blocks.
    """
    for top, moves in ((None, lambda name: True),
                       (2, lambda name: name.startswith(("h.1.", "h.2.")))):
        run = tuned_run(top)
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.update(some_pairs(4))
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(tensor, before[name]) != moves(name), name


def test_the_top_two_blocks_of_gpt2_medium_are_the_papers():
    """FACTS: 25,192,448 weights. Would catch: LayerNorms or embeddings counted among them."""
    with torch.device("meta"):
        from model import GPT2, GPT2Config
        model = GPT2(GPT2Config(n_embd=1024, n_layer=24, n_head=16)).requires_grad_(False)
    assert FineTune(model, top=2).stored() == 25_192_448
    with pytest.raises(ValueError, match="top 25 blocks of a model with 24"):
        FineTune(model, top=25)


def test_a_baselines_loss_is_the_mean_over_tokens():
    """The official code's baselines. Would catch: the prefix's loss, in which long targets weigh
    more and the gradient is clipped much sooner.
    """
    run, pairs, norms = tuned_run(clip=1e9), some_pairs(4), []
    copy = random_gpt2().requires_grad_(True)
    tokens = sum(len(pair.ids) - pair.start for pair in pairs)
    (target_nats(copy, copy.no_prefix(), collate(pairs, "cpu")) / tokens).backward()
    run.optimizer.register_step_pre_hook(lambda *_: norms.append(
        run.model.h[0].mlp.c_fc.weight.grad.clone()))
    run.update(pairs)
    assert torch.allclose(norms[0], copy.h[0].mlp.c_fc.weight.grad, rtol=1e-9)


@pytest.fixture
def task(tmp_path, monkeypatch, model_directory):
    """Arguments of a small fine-tuning run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"source": f"n : {i}", "target": f"it is {i}"}) for i in range(40)]
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines))
    return ["--model", str(model_directory), "--data", "tiny.jsonl", "--device", "cpu", "--lr",
            "1e-3", "--steps", "6", "--batch-size", "4", "--dev-every", "2"]


def test_a_fine_tuned_run_is_resumed_and_decoded_as_its_own_model(task, tmp_path, capsys,
                                                                  model_directory):
    """Would catch: a resumed run that starts from the frozen weights, or a decoder that loads them;
    an original that is overwritten.
    """
    original = (model_directory / "model.pt").read_bytes()
    train.main([*task, "--method", "finetune", "--out", "whole"])
    train.main([*task, "--method", "finetune", "--out", "parts", "--stop-at", "3"])
    train.main(["--resume", "parts", "--device", "cpu"])
    a, b = (load(tmp_path / run / "model").state_dict() for run in ("whole", "parts"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert (model_directory / "model.pt").read_bytes() == original
    assert not (tmp_path / "whole" / "prefix.pt").exists()
    capsys.readouterr()
    sample.main(["--run", "whole", "--device", "cpu", "--max-new", "8", "n : 3"])
    tuned = capsys.readouterr().out
    speaker = sample.Speaker(sample.Settings(run=["whole"], device="cpu", max_new=8))
    assert tuned == speaker.say(["n : 3"])[0] + "\n"
    assert torch.equal(speaker.model.wte.weight, a["wte.weight"])
    frozen = load(model_directory).wte.weight
    assert not torch.equal(speaker.model.wte.weight, frozen)
    logs = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    losses = [line["dev_loss"] for line in logs if "dev_loss" in line]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_the_papers_settings_are_the_defaults():
    """Table 6: learning rate, epochs, pairs in a batch. Would catch: one row in another's place."""
    assert {key: tuple(DEFAULTS[key[0]][key[1]][name] for name in ("lr", "epochs", "batch_size"))
            for key in itertools.product(("finetune", "finetune-top2"), ("e2e", "webnlg", "dart"))
            } == {("finetune", "e2e"): (5e-5, 5, 10), ("finetune", "webnlg"): (1e-5, 10, 6),
                  ("finetune", "dart"): (1e-5, 10, 6), ("finetune-top2", "e2e"): (5e-5, 5, 10),
                  ("finetune-top2", "webnlg"): (5e-5, 10, 9),
                  ("finetune-top2", "dart"): (5e-5, 5, 5)}


def test_a_fine_tuned_model_alone_is_not_read_with_other_tokens(task, model_directory, tmp_path,
                                                                bart_directory, monkeypatch):
    """Would catch: out/RUN/model taken for a model, and its tokens for GPT-2's 50,257."""
    train.main([*task, "--method", "finetune", "--out", "run"])
    with monkeypatch.context() as patched:          # GPT-2's own may not be on this machine
        patched.setattr("opening.load_tokenizer", lambda directory: SimpleNamespace(n_vocab=50257))
        with pytest.raises(ValueError, match="whose vocabulary is not that of its model, of 257 "
                                             "tokens; expected tokenizer.tiktoken, .*copy"):
            open_model("run/model", "cpu", "fp32")
    shutil.copy(model_directory / "tokenizer.tiktoken", "run/model")
    assert open_model("run/model", "cpu", "fp32")[1].n_vocab == 257
    shutil.copytree(bart_directory, tmp_path / "bart")
    assert open_model("bart", "cpu", "fp32")[1].n_vocab == 262
    save(random_bart(vocab_size=261).float(), "bart")           # as some are published: no <mask>
    assert open_model("bart", "cpu", "fp32")[1].n_vocab == 262
    save(random_gpt2(vocab_size=300).float(), "run/model")
    (tmp_path / "bart" / "dict.txt").rename(tmp_path / "run" / "model" / "dict.txt")
    for directory in ("bart", "run/model"):         # a BART without its numbers, a GPT-2 with them
        with pytest.raises(ValueError, match="whose vocabulary is not that of its model"):
            open_model(directory, "cpu", "fp32")


def test_a_model_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    """Would catch: the best model lost on a full disk, half of a directory left behind."""
    save(random_gpt2(seed=1), tmp_path / "model")

    def full(*_, **options):
        raise OSError(28, "No space left on device")
    for place in ("checkpoint.torch.save", "checkpoint.os.fsync"):      # at once, or later
        with monkeypatch.context() as patched, pytest.raises(OSError, match="is untouched"):
            patched.setattr(place, full)
            save(random_gpt2(seed=2), tmp_path / "model")
        again = load(tmp_path / "model", dtype=torch.float64)
        assert torch.equal(again.wte.weight, random_gpt2(seed=1).wte.weight)
    monkeypatch.setattr("checkpoint.json.dump", full)           # new weights, and no config.json
    with pytest.raises(OSError):
        save(random_gpt2(seed=2), tmp_path / "model")
    with pytest.raises(ValueError, match="has no config.json"):
        load(tmp_path / "model")


@pytest.mark.parametrize("flag", [["--prefix-len", "3"], ["--mid-dim", "0"], ["--init", "words"]])
def test_a_flag_of_the_prefix_is_refused_without_one(task, flag):
    """Would catch: a flag that is silently ignored."""
    with pytest.raises(ValueError, match=f"got {flag[0]} with --method finetune"):
        train.main([*task, "--method", "finetune", *flag])
