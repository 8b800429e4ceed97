"""A BART's files, read without the transformers library: its names, its vocabulary, a download.

What it has in common with GPT-2 is in test_convert.py, the equality of the logits in
test_bart_transformers.py.
"""
import dataclasses
import hashlib
import json

import pytest
import torch
from conftest import random_bart
from test_convert import hub  # noqa: F401  a fixture

from pretrained.checkpoint import load
from pretrained.hub import NAMES, fetch
from pretrained.hugging_face import FORCED, convert


def foreign(bart, root="model."):
    """The state dict as Hugging Face has it: everything but the bias of the logits has a root."""
    state = {root + name: tensor.clone() for name, tensor in bart.state_dict().items()}
    state["final_logits_bias"] = state.pop(root + "final_logits_bias")
    for copy in ("encoder.embed_tokens", "decoder.embed_tokens"):
        state[f"{root}{copy}.weight"] = bart.shared.weight.clone()
    return state | {"lm_head.weight": bart.shared.weight.clone()}


def write(directory, bart, state, vocabulary="dict.txt", **options):
    """A Hugging Face checkpoint in `directory`, with a vocabulary of the 256 bytes and an end."""
    directory.mkdir(exist_ok=True)
    about = dataclasses.asdict(bart.config) | {"model_type": "bart", "forced_bos_token_id": 0}
    (directory / "config.json").write_text(json.dumps(about | options))
    torch.save(state, directory / "pytorch_model.bin")
    (directory / vocabulary).write_text("".join(f"{n} 1\n" for n in range(257)))
    return directory


@pytest.mark.parametrize("root", ["model.", ""])
def test_every_weight_arrives(bart, tmp_path, root):
    """Would catch: a root that stays in the names, a tied copy taken for an unknown weight."""
    convert(write(tmp_path / "hf", bart, foreign(bart, root)), tmp_path / "ours")
    again = load(tmp_path / "ours", dtype=torch.float64)
    for name, tensor in bart.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.config == bart.config
    assert again.generation_config == {"forced_bos_token_id": 0}
    assert (tmp_path / "ours" / "dict.txt").read_text().count("\n") == 257


def test_a_file_without_the_bias_has_none(bart, tmp_path):
    """As bart-large's. Would catch: a refusal, or a bias left at random."""
    state = {name: t for name, t in foreign(bart).items() if name != "final_logits_bias"}
    convert(write(tmp_path / "hf", bart, state), tmp_path / "ours")
    assert not load(tmp_path / "ours").final_logits_bias.any()


def test_a_tied_copy_that_differs_is_refused(bart, tmp_path):
    """Would catch: a decoder with words of its own, read with the encoder's."""
    for name in ("lm_head.weight", "model.decoder.embed_tokens.weight"):
        state = foreign(bart)
        state[name][3, 4] += 1e-6
        with pytest.raises(ValueError, match="differs from shared.weight; expected one tensor"):
            convert(write(tmp_path / "hf", bart, state), tmp_path / "ours")


@pytest.mark.parametrize("option, value", [
    ("activation_function", "relu"), ("scale_embedding", True), ("normalize_before", True),
    ("add_final_layer_norm", True), ("normalize_embedding", False), ("add_bias_logits", True),
    ("static_position_embeddings", True), ("extra_pos_embeddings", 0),
    ("is_encoder_decoder", False), ("tie_word_embeddings", False), ("d_model", "24"),
    ("decoder_start_token_id", None)])
def test_another_function_is_refused_by_name(bart, tmp_path, option, value):
    """Would catch: a checkpoint whose tensors fit and whose function is another one."""
    with pytest.raises(ValueError, match=f"with {option} = {value!r}; expected .*; "):
        convert(write(tmp_path / "hf", bart, foreign(bart), **{option: value}), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_targets_begin_with_may_be_token_0_or_left_out(bart, tmp_path):
    """Would catch: <s> refused as no number; a refusal of uploads before October 2020."""
    directory = write(tmp_path / "hf", bart, foreign(bart), decoder_start_token_id=0)
    convert(directory, tmp_path / "ours")
    assert load(tmp_path / "ours").config.decoder_start_token_id == 0
    about = json.loads((directory / "config.json").read_text())
    del about["decoder_start_token_id"]
    (directory / "config.json").write_text(json.dumps(about))
    convert(directory, tmp_path / "ours")
    assert load(tmp_path / "ours").config.decoder_start_token_id == 2
    for start in (5, 262, -1):
        (directory / "generation_config.json").write_text(json.dumps(
            {"decoder_start_token_id": start}))
        if start == 5:
            convert(directory, tmp_path / "ours")
            assert load(tmp_path / "ours").config.decoder_start_token_id == 5
            continue
        with pytest.raises(ValueError, match="with decoder_start_token_id = .*; expected a token"):
            convert(directory, tmp_path / "ours")


@pytest.mark.parametrize("changes, newer", [
    ({"force_bos_token_to_be_generated": True}, None),
    ({"force_bos_token_to_be_generated": False}, None),
    ({"force_bos_token_to_be_generated": True}, {"eos_token_id": 2}),
    ({"forced_bos_token_id": 7, "forced_eos_token_id": 2}, None),
    ({"forced_bos_token_id": 7, "forced_eos_token_id": 2}, {"forced_bos_token_id": 0}),
    ({"forced_bos_token_id": 0}, {"eos_token_id": [2, 5]})])
def test_what_is_forced_is_what_transformers_forces(bart, tmp_path, changes, newer):
    """Would catch: the key that the makers used until 2021, as of distilbart-cnn, a file that is
    read after the one that replaced it.
    """
    transformers = pytest.importorskip("transformers", reason="the oracle: pip install "
                                                              "transformers")
    directory = write(tmp_path / "hf", bart, foreign(bart), bos_token_id=0, eos_token_id=2)
    about = json.loads((directory / "config.json").read_text())
    del about["forced_bos_token_id"]
    (directory / "config.json").write_text(json.dumps(about | changes))
    if newer is not None:
        (directory / "generation_config.json").write_text(json.dumps(newer))
    theirs = transformers.BartForConditionalGeneration.from_pretrained(
        directory).generation_config
    convert(directory, tmp_path / "ours")
    ours = load(tmp_path / "ours").generation_config
    assert all(ours.get(name) == getattr(theirs, name) for name in FORCED)
    # A text has to end somewhere: here the older file's end stays where the newer one has none.
    assert ours["eos_token_id"] == (theirs.eos_token_id or 2)


def test_a_name_is_downloaded_with_its_vocabulary(hub, bart, tmp_path):  # noqa: F811
    """Would catch: bart-large without vocab.json, which would read GPT-2's numbers."""
    directory = write(tmp_path / "published", bart, foreign(bart), "vocab.json")
    torch.save(foreign(bart), directory / "model.safetensors")      # asked for where it is readable
    try:
        from safetensors.torch import save_file
        save_file(foreign(bart), directory / "model.safetensors")
    except ImportError:
        pass
    hub.files = {path.name: path.read_bytes() for path in directory.iterdir()}
    hub.sums = {name: hashlib.sha256(body).hexdigest() for name, body in hub.files.items()}
    fetch("bart-large", tmp_path / "out", hub.url)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.pt",
                                                              "vocab.json"}
    repository, commit = NAMES["bart-large"]
    assert repository == "facebook/bart-large"
    assert f"GET /{repository}/resolve/{commit}/vocab.json" in hub.asked
    assert load(tmp_path / "out").generation_config["forced_bos_token_id"] == 0


def test_a_tokenizer_json_alone_goes_with_the_model(bart, tmp_path):
    """As transformers 5 saves it. Would catch: advice to download what no page has."""
    directory = write(tmp_path / "hf", bart, foreign(bart), "tokenizer.json")
    convert(directory, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").exists()


def test_a_bart_without_a_vocabulary_is_refused(tmp_path):
    """Would catch: fluent nonsense, the only sign of the wrong numbers."""
    bart = random_bart()
    directory = write(tmp_path / "hf", bart, foreign(bart))
    (directory / "dict.txt").unlink()
    with pytest.raises(ValueError, match="hf without its vocabulary; expected vocab.json or"):
        convert(directory, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
