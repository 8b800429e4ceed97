"""A prefix goes to the package peft and comes back: the same numbers, logits and tokens."""
import dataclasses
import json

import pytest
import torch
from conftest import random_bart

import train
from data.pairs import dev_batches, encode_examples, load_examples
from decoding.constraints import Constraints
from prefix import Prefix
from pretrained import convert, peft_adapter
from pretrained.architectures import architecture
from pretrained.hub import NAMES
from pretrained.load import load_model
from pretrained.run_directory import load_prefix, run_settings, save_prefix
from sample import generate

pytest.importorskip("safetensors", reason="peft's files: pip install safetensors")

EOS = 256
CLOSE = 1e-4            # of the range of the logits: fp32 sums in another order, see the oracle


@pytest.fixture
def run(tmp_path, model_directory):
    """A run on disk with a random prefix of 4."""
    model = load_model(str(model_directory), "cpu", "fp32")[0]
    torch.manual_seed(1)
    save_prefix(tmp_path / "run" / "prefix.pt", torch.randn(3, 2, 1, 4, 4, 6), model)
    about = {"settings": {"model": str(model_directory), "data": "x", "data_dir": ""}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    return tmp_path / "run"


def to_and_from(run, folder, model_directory):
    convert.main(["--run", str(run), "--to-peft", str(folder / "peft")])
    convert.main(["--from-peft", str(folder / "peft"), "--model", str(model_directory),
                  "--out", str(folder / "back")])
    return folder / "back"


def test_there_and_back_is_the_same_prefix(run, tmp_path, model_directory):
    """Would catch: keys for values, heads for positions, a layer off by one, in either direction.
    """
    back = to_and_from(run, tmp_path, model_directory)
    model = load_model(str(model_directory), "cpu", "fp32")[0]
    prefix = load_prefix(run / "prefix.pt", model)
    assert torch.equal(load_prefix(back / "prefix.pt", model), prefix)
    # The format itself, written out: column ((2 * layer + {K: 0, V: 1}) * H + head) * D + i.
    from safetensors.torch import load_file
    flat = load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]
    assert flat.shape == (4, 2 * 3 * 24)
    assert flat[3, ((2 * 2 + 1) * 4 + 1) * 6 + 5] == prefix[2, 1, 0, 1, 3, 5]


def test_a_published_model_has_its_published_name_there_and_ours_here(run, tmp_path, monkeypatch,
                                                                      model_directory):
    """Would catch: a base model that peft cannot find, or that we cannot."""
    monkeypatch.setattr("pretrained.load.WEIGHTS", model_directory.parent)
    monkeypatch.setitem(NAMES, model_directory.name, ("somebody/a-gpt2", "0" * 40))
    about = {"settings": {"model": model_directory.name, "data": "x", "data_dir": ""}}
    (run / "config.json").write_text(json.dumps(about))
    convert.main(["--run", str(run), "--to-peft", str(tmp_path / "peft")])
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "somebody/a-gpt2"
    convert.main(["--from-peft", str(tmp_path / "peft"), "--out", str(tmp_path / "back")])
    assert run_settings(tmp_path / "back")["model"] == model_directory.name


def test_training_goes_on_from_a_prefix_of_peft(run, tmp_path, model_directory, capsys):
    """Would catch: a start at random, or a prefix of the default length."""
    back = to_and_from(run, tmp_path, model_directory)
    rows = [{"source": f"n : {i}", "target": f"it is {i}"} for i in range(20)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(model_directory), "--data", str(tmp_path / "my.jsonl"), "--steps", "6",
             "--device", "cpu", "--lr", "1e-2", "--mid-dim", "0"]
    out = tmp_path / "on"
    train.main([*flags, "--start-from", str(back), "--out", str(out), "--stop-at", "3"])
    train.main(["--resume", str(out), "--device", "cpu"])
    capsys.readouterr()
    first, *_, last = [x["dev_loss"] for x in map(json.loads, open(out / "log.jsonl"))
                       if "dev_loss" in x]
    settings = train.Settings(data=str(tmp_path / "my.jsonl"), prefix_len=4)
    model, tokenizer = load_model(str(model_directory), "cpu", "fp32")
    start = Prefix.for_model(model, 4, 0)
    start.initialize(load_prefix(back / "prefix.pt", model))
    pairs, dev = encode_examples(*load_examples(settings), settings, model, tokenizer)
    trainer = train.Trainer(dataclasses.replace(settings, lr=1.0), model, start, pairs,
                            dev_batches(dev, 16, model))
    assert first == pytest.approx(trainer.dev_loss(), rel=1e-5)
    assert last < first
    with pytest.raises(ValueError, match="--prefix-len, --prefix-layers, --prefixes or --init"):
        train.main([*flags, "--start-from", str(back), "--prefix-len", "4"])


def test_the_model_is_that_of_the_run_that_is_started_from(run, tmp_path, monkeypatch,
                                                           model_directory):
    """Would catch: the bundled model where none is named, or a model named in vain."""
    back = to_and_from(run, tmp_path, model_directory)
    (tmp_path / "my.jsonl").write_text('{"source": "a", "target": "b"}\n'
                                       '{"source": "c", "target": "d"}\n')
    flags = ["--data", str(tmp_path / "my.jsonl"), "--steps", "1", "--device", "cpu", "--mid-dim",
             "0", "--start-from", str(back), "--out", str(tmp_path / "on")]
    with pytest.raises(ValueError, match="a prefix for the model .*, expected one for the model"):
        train.main([*flags, "--model", "tiny-gpt2"])
    train.main(flags)
    assert run_settings(tmp_path / "on")["model"] == str(model_directory)


@pytest.mark.parametrize("change, words", [
    ({"peft_type": "LORA"}, "an adapter of the kind LORA; expected PREFIX_TUNING"),
    ({"task_type": "SEQ_2_SEQ_LM"}, "the task SEQ_2_SEQ_LM and 1 submodules; expected CAUSAL_LM"),
    ({"num_transformer_submodules": 2}, "task CAUSAL_LM and 2 submodules; expected CAUSAL_LM and"),
    ({"num_attention_heads": 3}, "got .*_heads': 3.*; expected .*'num_attention_heads': 4.*; choo"),
    ({"num_layers": 2}, "got .*'num_layers': 2.*; expected .*'num_layers': 3.*; choose"),
    ({"token_dim": 48}, "got .*'token_dim': 48.*; expected .*'token_dim': 24.*; choose"),
    ({"num_virtual_tokens": 5}, "got .*_tokens': 5.*; expected .*'num_virtual_tokens': 4.*; choo"),
    (None, "which is no adapter of peft"),
])
def test_other_adapters_are_refused(run, tmp_path, model_directory, change, words):
    """Would catch: numbers that fit by their count only, put in front in silence."""
    convert.main(["--run", str(run), "--to-peft", str(tmp_path / "peft")])
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "{")
    with pytest.raises(ValueError, match=words):
        convert.main(["--from-peft", str(tmp_path / "peft"), "--model", str(model_directory),
                      "--out", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("raw", [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1234\n", b"",
    b"\x50\0\0\0\0\0\0\0{\"prompt"], ids=["pointer", "empty", "cut"])
@pytest.mark.parametrize("name", peft_adapter.WEIGHTS)
def test_a_damaged_adapter_is_one_sentence(run, tmp_path, model_directory, raw, name):
    """Would catch: a traceback of safetensors' own kind, which no program catches."""
    convert.main(["--run", str(run), "--to-peft", str(tmp_path / "peft")])
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    (tmp_path / "peft" / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"got .*{name}, which .*; expected .*; ") as caught:
        convert.main(["--from-peft", str(tmp_path / "peft"), "--model", str(model_directory),
                      "--out", str(tmp_path / "back")])
    assert "\n" not in str(caught.value) and not (tmp_path / "back").exists()
    assert ("git lfs pull" in str(caught.value)) == raw.startswith(b"version")


@pytest.mark.parametrize("name", [None, ""])
def test_a_prefix_that_names_no_base_model_needs_one(run, tmp_path, model_directory, monkeypatch,
                                                     name):
    """Would catch: "got .", or the model in whose directory one stands."""
    convert.main(["--run", str(run), "--to-peft", str(tmp_path / "peft")])
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    monkeypatch.chdir(model_directory)
    call = ["--from-peft", str(tmp_path / "peft"), "--out", str(tmp_path / "back")]
    with pytest.raises(ValueError, match="which names no base model; expected .*--model"):
        convert.main(call)
    with pytest.raises(ValueError, match="got the model ''; expected a name"):
        load_model("", "cpu", "fp32")
    convert.main([*call, "--model", str(model_directory)])


def test_what_has_no_such_form_is_refused(run, tmp_path, model_directory, monkeypatch):
    """Would catch: a BART's prefix cut down to its decoder, files overwritten, half a command."""
    pytest.importorskip("bart", reason="there is no bart/ here")
    with pytest.raises(ValueError, match="got --to-peft; expected --run"):
        convert.main(["--to-peft", str(tmp_path / "peft")])
    with pytest.raises(ValueError, match="got --from-peft; expected --out"):
        convert.main(["--from-peft", str(tmp_path / "peft")])
    for more in (["--model", "gpt2"], ["--out", str(tmp_path / "out")], ["gpt2"]):
        with pytest.raises(ValueError, match="got --to-peft; expected --run .* and nothing else"):
            convert.main(["--to-peft", str(tmp_path / "peft"), "--run", str(run), *more])
    for more in (["--model", "gpt2"], ["--run", str(run)]):
        with pytest.raises(ValueError, match="got --run or --model, which belong to --to-peft"):
            convert.main(["gpt2", "--out", str(tmp_path / "out"), *more])
    with pytest.raises(ValueError, match="which is not empty"):
        convert.main(["--run", str(run), "--to-peft", str(run)])
    with pytest.raises(ValueError, match="which has no prefix.pt"):
        convert.main(["--run", str(model_directory), "--to-peft", str(tmp_path / "peft")])
    bart = random_bart()
    monkeypatch.setattr(peft_adapter, "load_run", lambda *_: (bart, None, bart.empty_prefix()))
    with pytest.raises(ValueError, match="a bart; expected a GPT-2 or a Llama: peft's format has"):
        convert.main(["--run", str(run), "--to-peft", str(tmp_path / "peft")])


def in_transformers(model):
    """The same weights as a GPT-2 of transformers."""
    transformers = pytest.importorskip("transformers",
                                       reason="the oracle: pip install transformers")
    c = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS)).eval()
    transposed = architecture("gpt2").transposed
    state = {f"transformer.{name}": x.T if name.endswith(transposed) else x
             for name, x in model.state_dict().items()}
    theirs.load_state_dict(state | {"lm_head.weight": model.wte.weight})
    return theirs.requires_grad_(False)


def same(theirs, ours, prefix):
    """The same logits and the same greedy texts, with their adapter and with our prefix."""
    torch.manual_seed(2)
    prompts = torch.randint(EOS, (3, 7))                                        # (B, T)
    wanted = theirs(prompts, attention_mask=torch.ones_like(prompts)).logits    # (B, T, V)
    got = ours.head(ours.hidden_states(prompts, prefix))                        # (B, T, V)
    assert (got - wanted).abs().max() < CLOSE * (wanted.max() - wanted.min())
    plain = ours.head(ours.hidden_states(prompts))                              # (B, T, V)
    assert not torch.allclose(plain, wanted, atol=0.1), "the prefix does nothing"
    texts = theirs.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts),
                            max_new_tokens=12, do_sample=False)[:, 7:].tolist()
    texts = [row[:row.index(EOS)] if EOS in row else row for row in texts]
    assert generate(ours, prompts.tolist(), Constraints(EOS, 12), prefix) == texts


def test_peft_reads_what_we_write(run, tmp_path, model_directory):
    """Would catch: a field of its config that peft needs, a layout that only we understand."""
    peft = pytest.importorskip("peft", reason="the oracle: pip install peft")
    convert.main(["--run", str(run), "--to-peft", str(tmp_path / "peft")])
    ours = load_model(str(model_directory), "cpu", "fp32")[0]
    theirs = peft.PeftModel.from_pretrained(in_transformers(ours), tmp_path / "peft").eval()
    same(theirs, ours, load_prefix(run / "prefix.pt", ours))


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_we_read_what_peft_writes(tmp_path, model_directory, projection):
    """Would catch: a prefix of peft's that is stored in another form behind an MLP."""
    peft = pytest.importorskip("peft", reason="the oracle: pip install peft")
    ours = load_model(str(model_directory), "cpu", "fp32")[0]
    torch.manual_seed(3)
    theirs = peft.get_peft_model(in_transformers(ours), peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection,
        encoder_hidden_size=24)).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data += torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "peft")
    convert.main(["--from-peft", str(tmp_path / "peft"), "--model", str(model_directory),
                  "--out", str(tmp_path / "run")])
    same(theirs, ours, load_prefix(tmp_path / "run" / "prefix.pt", ours))


def test_a_damaged_adapter_of_ours_is_refused(run, tmp_path, model_directory):
    """Would catch: other numbers without a word, for safetensors has no checksum; a traceback."""
    to_and_from(run, tmp_path, model_directory)
    path = tmp_path / "peft" / "adapter_model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-9] + b"\x01" + whole[-8:], whole[:20] + b"\xff" + whole[21:], b"",
                    b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="got .*; expected"):
            peft_adapter.read_weights(tmp_path / "peft")


def test_not_a_number_is_not_exported(run, tmp_path):
    """Would catch: NaN that leaves by --to-peft."""
    saved = torch.load(run / "prefix.pt", weights_only=True)
    saved["prefix"][1, 0, 0, 2, 3, 4] = torch.nan
    torch.save(saved, run / "prefix.pt")
    with pytest.raises(ValueError, match="NaN or infinity"):
        convert.main(["--run", str(run), "--to-peft", str(tmp_path / "peft")])
    assert not (tmp_path / "peft").exists()
