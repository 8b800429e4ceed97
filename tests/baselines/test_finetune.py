"""Fine-tuning, the paper's baseline, through the same loop: what learns, and what is saved."""
import itertools
import json
import math
import os
import shutil

import pytest
import torch
from conftest import batch_of, random_bart, random_gpt2, some_pairs

import sample
import train
from baselines.finetune import FineTune
from data.batches import count_labels
from data.paper import TRAINING
from data.tokenizer import byte_level_bpe
from model import GPT2, GPT2Config
from prefix import target_loss
from pretrained.checkpoint import load, save
from pretrained.load import load_model
from pretrained.run_directory import run_settings
from train import Settings, Trainer


def tuning_trainer(top=None, **settings):
    learner = FineTune(random_gpt2(), top)
    settings = Settings(**{"method": "finetune", "lr": 1e-3, "steps": 10, "batch_size": 4,
                           "out": "unused"} | settings)
    return Trainer(settings, learner.model, learner, [], [])


def test_fine_tuning_moves_every_weight_and_the_top_only_its_own():
    """Would catch: a baseline that is partly frozen, which would be easy to beat; or a "top 2" that
    trains three blocks.
    """
    for top, moves in ((None, lambda name: True),
                       (2, lambda name: name.startswith(("h.1.", "h.2.")))):
        trainer = tuning_trainer(top)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.train_step(some_pairs(4))
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, before[name]) != moves(name), name


def test_the_top_two_blocks_of_gpt2_medium_are_the_papers():
    """25,192,448 weights. Would catch: LayerNorms or embeddings counted among them."""
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_embd=1024, n_layer=24, n_head=16)).requires_grad_(False)
    assert FineTune(model, top=2).num_stored_parameters() == 25_192_448
    with pytest.raises(ValueError, match="top 25 blocks of a model with 24"):
        FineTune(model, top=25)


def test_a_baselines_loss_is_the_mean_over_tokens():
    """The official code's baselines. Would catch: the prefix's loss, in which long targets weigh
    more and the gradient is clipped much sooner.
    """
    trainer, pairs, gradients = tuning_trainer(clip=1e9), some_pairs(4), []
    copy = random_gpt2().requires_grad_(True)
    loss = target_loss(copy, copy.empty_prefix(), batch_of(copy, pairs))
    (loss / count_labels(pairs)).backward()
    trainer.optimizer.register_step_pre_hook(lambda *_: gradients.append(
        trainer.model.h[0].mlp.c_fc.weight.grad.clone()))
    trainer.train_step(pairs)
    assert torch.allclose(gradients[0], copy.h[0].mlp.c_fc.weight.grad, rtol=1e-9)


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
    sample.main(["--run", "whole", "--device", "cpu", "--max-new-tokens", "8", "n : 3"])
    tuned = capsys.readouterr().out
    generator = sample.Generator(sample.Settings(run=["whole"], device="cpu", max_new_tokens=8))
    assert tuned == generator.generate(["n : 3"])[0] + "\n"
    assert torch.equal(generator.model.wte.weight, a["wte.weight"])
    frozen = load(model_directory).wte.weight
    assert not torch.equal(generator.model.wte.weight, frozen)
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    losses = [line["dev_loss"] for line in log if "dev_loss" in line]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_a_reader_always_finds_the_best_model_whole(task, monkeypatch):
    """At every operation on a file after the first saving. Would catch: the last good model removed
    before the new one stands.
    """
    found = []

    def look(place):
        original = getattr(os, place)

        def look_and_do(*given, **options):
            if os.path.exists("run/resume.pt"):
                found.append(load("run/model").wte.weight.sum())
            return original(*given, **options)
        monkeypatch.setattr(os, place, look_and_do)
    for place in ("replace", "unlink", "fsync"):
        look(place)
    train.main([*task, "--method", "finetune", "--out", "run"])
    assert len(found) > 10 and len(set(found)) > 1


def test_fine_tuning_is_in_fp32_and_the_run_keeps_its_dtype(task, monkeypatch):
    """As on a GPU, where left out means bf16. Would catch: steps of 1e-5 rounded away in bf16."""
    dtypes = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
    monkeypatch.setattr("pretrained.load.decide_device",
                        lambda device, dtype: (torch.device("cpu"), dtypes[dtype]))
    train.main([*task, "--steps", "1", "--mid-dim", "16", "--out", "prefix"])
    train.main([*task, "--steps", "1", "--method", "finetune", "--out", "tuned"])
    assert [run_settings(run)["dtype"] for run in ("prefix", "tuned")] == ["bf16", "fp32"]


def test_the_papers_settings_are_the_defaults():
    """Table 6: learning rate, epochs, pairs in a batch. Would catch: one row in another's place."""
    assert {key: tuple(TRAINING[key[0]][key[1]][name] for name in ("lr", "epochs", "batch_size"))
            for key in itertools.product(("finetune", "finetune-top2"), ("e2e", "webnlg", "dart"))
            } == {("finetune", "e2e"): (5e-5, 5, 10), ("finetune", "webnlg"): (1e-5, 10, 6),
                  ("finetune", "dart"): (1e-5, 10, 6), ("finetune-top2", "e2e"): (5e-5, 5, 10),
                  ("finetune-top2", "webnlg"): (5e-5, 10, 9),
                  ("finetune-top2", "dart"): (5e-5, 5, 5)}


def test_a_fine_tuned_model_alone_is_not_read_with_other_tokens(task, model_directory, monkeypatch):
    """Would catch: out/RUN/model taken for a model, and its tokens for GPT-2's 50,257."""
    train.main([*task, "--method", "finetune", "--out", "run"])
    with monkeypatch.context() as patched:          # GPT-2's own may not be on this machine
        patched.setattr("pretrained.load.load_tokenizer", lambda directory: OtherTokenizer)
        with pytest.raises(ValueError, match="whose vocabulary is not that of its model, of 257 "
                                             "tokens; expected tokenizer.tiktoken, .*copy"):
            load_model("run/model", "cpu", "fp32")
    shutil.copy(model_directory / "tokenizer.tiktoken", "run/model")
    assert load_model("run/model", "cpu", "fp32")[1].vocab_size == 257


class OtherTokenizer:
    is_encoder_decoder, max_id = False, 50256


def test_a_bart_is_not_read_with_the_tokens_of_a_gpt2(tmp_path, monkeypatch, request):
    """Would catch: a BART without its own numbers of the tokens, a GPT-2 that is read with them."""
    pytest.importorskip("bart.model", reason="the folder bart/ is not here")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(request.getfixturevalue("bart_directory"), tmp_path / "bart")
    assert load_model("bart", "cpu", "fp32")[1].vocab_size == 262
    save(random_bart(vocab_size=261).float(), "bart")           # as some are published: no <mask>
    assert load_model("bart", "cpu", "fp32")[1].vocab_size == 262
    save(random_gpt2(vocab_size=300).float(), "gpt2")
    shutil.copy("bart/tokenizer.tiktoken", "gpt2")
    assert byte_level_bpe("gpt2").n_vocab == 257
    shutil.move("bart/dict.txt", "gpt2/dict.txt")
    for directory in ("bart", "gpt2"):
        with pytest.raises(ValueError, match="whose vocabulary is not that of its model"):
            load_model(directory, "cpu", "fp32")


def test_a_model_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    """Would catch: the best model lost on a full disk, half of a directory left behind."""
    save(random_gpt2(seed=1), tmp_path / "model")

    def full(*_, **options):
        raise OSError(28, "No space left on device")
    for place in ("pretrained.checkpoint.torch.save", "pretrained.checkpoint.os.fsync",
                  "utils.files.json.dump"):                     # at once, or later
        with monkeypatch.context() as patched, pytest.raises(OSError, match="is untouched"):
            patched.setattr(place, full)
            save(random_gpt2(seed=2), tmp_path / "model")
        again = load(tmp_path / "model", dtype=torch.float64)
        assert torch.equal(again.wte.weight, random_gpt2(seed=1).wte.weight)


@pytest.mark.parametrize("flag", [["--prefix-len", "3"], ["--mid-dim", "0"], ["--init", "words"]])
def test_a_flag_of_the_prefix_is_refused_without_one(task, flag):
    """Would catch: a flag that is silently ignored."""
    with pytest.raises(ValueError, match=f"got {flag[0]} with --method finetune"):
        train.main([*task, "--method", "finetune", *flag])
