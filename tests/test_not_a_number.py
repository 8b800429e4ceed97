"""A NaN or an infinity in weights or in a prefix is refused at every door, each time in one line:
where it is read, whoever wrote it, and where it is to be written.

With one of them a model says its token 0 for ever, and a program ends as if all were well.
"""
import json

import pytest
import torch
from conftest import random_gpt2
from test_convert import foreign, refused, small, write

import sample
import train
from pretrained import convert
from pretrained.checkpoint import fingerprint, load, save
from pretrained.load import load_model
from pretrained.run_directory import load_prefix, save_prefix

BAD = [float("nan"), float("inf"), float("-inf")]
WORDS = "with NaN or infinity in {}; expected finite numbers; "


@pytest.fixture
def written(monkeypatch):
    """`written(write, *what)` calls `write`, which refuses, and then again without its check: so
    another program might have written it.
    """
    def write_anyway(write, *what):
        with pytest.raises(ValueError, match="with NaN or infinity in"):
            write(*what)
        with monkeypatch.context() as patched:
            for module in ("checkpoint", "run_directory"):
                patched.setattr(f"pretrained.{module}.check_finite", lambda *_: None)
            write(*what)
    return write_anyway


@pytest.mark.parametrize("number", BAD)
def test_weights_are_refused(model_directory, tmp_path, written, number):
    """By `load`, so by every program; also in fp64, whose largest numbers fp32 does not have."""
    model = random_gpt2().float()
    model.h[1].mlp.c_fc.bias.data[3] = number
    written(save, model, tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.tiktoken").write_bytes(
        (model_directory / "tokenizer.tiktoken").read_bytes())
    for door in (lambda: load(tmp_path / "bad"),
                 lambda: sample.main(["--model", str(tmp_path / "bad"), "--device", "cpu", "x"]),
                 lambda: train.main(["--model", str(tmp_path / "bad"), "--device", "cpu"])):
        with pytest.raises(ValueError, match="got .*bad " + WORDS.format("h.1.mlp.c_fc.bias")):
            door()
    model = random_gpt2()
    model.ln_f.weight.data[0] = 1e300
    save(model, tmp_path / "wide")
    with pytest.raises(ValueError, match=WORDS.format("ln_f.weight")):
        load(tmp_path / "wide")
    assert torch.isfinite(load(tmp_path / "wide", dtype=torch.float64).ln_f.weight).all()


@pytest.mark.parametrize("number", BAD)
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_a_checkpoint_is_not_converted(tmp_path, number, form):
    """Of the head, too, that is the word embedding: not "lm_head.weight differs"."""
    state = foreign(small(), "transformer.")
    state["transformer.wte.weight"][3, 4] = number
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    refused(write(tmp_path / "hf", state, form), " with NaN or infinity in ", ".weight; expected")


@pytest.mark.parametrize("number", BAD)
def test_a_prefix_is_refused(model_directory, tmp_path, written, number):
    """To decode, to train on from, to export and to import."""
    model, _ = load_model(str(model_directory), "cpu", "fp32")
    prefix = torch.randn(3, 2, 1, 4, 4, 6)
    prefix[2, 1, 0, 3, 1, 5] = number
    written(save_prefix, tmp_path / "run" / "prefix.pt", prefix, model)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"settings": {
        "model": str(model_directory), "data": "x"}}))
    run, cpu = str(tmp_path / "run"), ["--device", "cpu"]
    for door in (lambda: load_prefix(tmp_path / "run" / "prefix.pt", model),
                 lambda: sample.main(["--run", run, *cpu, "x"]),
                 lambda: sample.main(["--run", run, *cpu, "--num-beams", "3", "x"]),
                 lambda: train.main(["--start-from", run, *cpu, "--data", "world"]),
                 lambda: convert.main(["--run", run, "--to-peft", str(tmp_path / "peft")])):
        with pytest.raises(ValueError, match="got .*prefix.pt " + WORDS.format("the prefix")):
            door()
    assert not (tmp_path / "peft").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps({
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM"}))
    flat = torch.zeros(4, 144)
    flat[1, 3] = number
    torch.save({"prompt_embeddings": flat}, tmp_path / "theirs" / "adapter_model.bin")
    with pytest.raises(ValueError, match="got .*adapter_model.bin " + WORDS.format("prompt_emb.*")):
        convert.main(["--from-peft", str(tmp_path / "theirs"), "--model", str(model_directory),
                      "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_three_prefixes_are_looked_through(bart, tmp_path, written):
    """Would catch: a BART's first prefix taken for all."""
    pytest.importorskip("bart", reason="there is no bart/ here")
    save(bart, tmp_path / "bart")
    bart.fingerprint = fingerprint(bart)
    folded = bart.prefix_from_tokens([5, 6])
    folded.cross[0, 0, 0, 0, 0, 0] = float("nan")
    written(save_prefix, tmp_path / "prefix.pt", folded, bart)
    with pytest.raises(ValueError, match=WORDS.format("cross")):
        load_prefix(tmp_path / "prefix.pt", load(tmp_path / "bart", dtype=torch.float64))
