"""pretrained.convert: what it reads, what it refuses, what it downloads. Needs no package beyond
torch; the equality with the transformers library is in test_transformers.py.
"""
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import os
import pickle
import socket
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, random_gpt2

from data.tokenizer import OWN_FILES
from pretrained.architectures import architecture, new_prefix
from pretrained.checkpoint import load, save
from pretrained.convert import main
from pretrained.hub import NAMES, declared_sha256, fetch
from pretrained.hugging_face import convert, read_checkpoint
from pretrained.load import find_model
from utils.cli import run_program
from utils.files import read_json, write_json

WHOLE = {"config.json", "model.pt"}


def small():
    return random_gpt2(vocab_size=61, n_positions=33, n_embd=12, n_layer=2, n_head=3).float()


def foreign(model, root=""):
    """The state dict of `model` as Hugging Face has it: Conv1D weights lie (in, out)."""
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {root + name: tensor.t().contiguous() if name.endswith(conv1d) else tensor.clone()
            for name, tensor in model.state_dict().items()}


def write(directory, state, form="zip", config=None, **options):
    """Write a Hugging Face checkpoint into `directory`."""
    directory.mkdir(exist_ok=True)
    about = {"model_type": "gpt2", "activation_function": "gelu_new", "architectures": ["Any"],
             **dataclasses.asdict(config or small().config), **options}
    (directory / "config.json").write_text(json.dumps(about))
    if form == "zip":
        torch.save(state, directory / "pytorch_model.bin")
    elif form == "legacy":
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == "safetensors":
        save_file = pytest.importorskip("safetensors.torch", reason="reads .safetensors").save_file
        save_file(state, directory / "model.safetensors")
    elif form == "shards":
        names = list(state)
        files = {n: f"part-{i % 2}.bin" for i, n in enumerate(names)}
        for file in set(files.values()):
            torch.save({n: state[n] for n in names if files[n] == file}, directory / file)
        index = directory / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": files}))
    return directory


def test_a_vocabulary_that_is_not_gpt2s_is_refused(tmp_path):
    """Would catch: a model in another language that is fed GPT-2's tokens without a word."""
    directory = write(tmp_path / "theirs", foreign(small()))
    (directory / "vocab.json").write_text(json.dumps({"\u0120der": 262, "<|endoftext|>": 0}))
    with pytest.raises(ValueError, match="a GPT-2 with a vocabulary of its own; expected GPT-2's"):
        convert(directory, tmp_path / "out")
    for damaged in ("[1, 2]", '{"a'):
        (directory / "vocab.json").write_text(damaged)
        with pytest.raises(ValueError, match="vocab.json, which is damaged .*; expected a JSON"):
            convert(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (directory / "vocab.json").write_text(json.dumps({"\u0120the": 262, "<|endoftext|>": 50256}))
    convert(directory, tmp_path / "out")


def test_shards_of_another_size_than_the_index_states_are_said(tmp_path, capsys):
    """Would catch: shards of two uploads in one model without a word. Tied weights count once."""
    model = small()
    size = sum(weight.nbytes for weight in model.parameters())
    state = foreign(model)
    state["lm_head.weight"] = state["wte.weight"]
    directory = write(tmp_path / "hf", state, "shards")
    index = directory / "pytorch_model.bin.index.json"
    about = json.loads(index.read_text())
    # In two files it is stored twice.
    twice = 0 if about["weight_map"]["lm_head.weight"] == about["weight_map"]["wte.weight"] else (
        model.wte.weight.nbytes)
    for stated, said in ((size + twice, False), (size + twice + 4, True), ("many", True)):
        index.write_text(json.dumps(about | {"metadata": {"total_size": stated}}))
        read_checkpoint(directory)
        assert ("they may be of different uploads" in capsys.readouterr().err) == said


def test_a_file_is_no_directory_to_write(tmp_path):
    """Would catch: "[Errno 20]"."""
    directory = write(tmp_path / "hf", foreign(small()))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file to write, which is a file; expected a new"):
        main([str(directory), "--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"


def test_several_beginnings_of_a_text_are_refused(tmp_path):
    """Would catch: a list in the place of a token, and a traceback in the middle of decoding."""
    directory = write(tmp_path / "hf", foreign(small()), bos_token_id=[1, 2])
    refused(directory, "config.json with bos_token_id = [1, 2]; expected a token below 61")


def refused(directory, *words):
    """Converting `directory` fails in one line that has these words and three parts, and leaves
    nothing behind.
    """
    out = directory.parent / "out"
    with pytest.raises(ValueError) as caught:
        convert(directory, out)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("got ") and "; expected " in message
    assert message.count("; ") >= 2, f"no next step in: {message}"
    for word in words:
        assert word in message
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("root", ["", "transformer."])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "shards"])
def test_every_file_format_gives_the_same_model(tmp_path, form, root):
    """Catches a format that is not read, a root that stays in the names, a forgotten transpose."""
    model = small()
    convert(write(tmp_path / "hf", foreign(model, root), form), tmp_path / "out")
    again = load(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == WHOLE
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not any(p.requires_grad for p in again.parameters())


def test_attention_buffers_are_ignored_and_biases_are_not(tmp_path):
    """Catches "attn.bias" taken as the end of "c_attn.bias": a model without its biases."""
    model = small()
    state = foreign(model, "transformer.")
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 33, 33).tril().bool()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    _, ours = read_checkpoint(write(tmp_path / "hf", state))
    assert ours.keys() == model.state_dict().keys()
    assert torch.equal(ours["h.1.attn.c_attn.bias"], model.h[1].attn.c_attn.bias)
    without = {n: t for n, t in state.items() if n != "transformer.h.1.attn.c_attn.bias"}
    refused(write(tmp_path / "hf", without), "h.1.attn.c_attn.bias")


def test_the_numbers_keep_their_dtype(tmp_path):
    """Catches a half-precision checkpoint blown up to fp32 on the disk."""
    half = small().bfloat16()
    _, ours = read_checkpoint(write(tmp_path / "hf", foreign(half)))
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}


def test_converted_weights_take_no_more_room_than_their_numbers(tmp_path):
    """Catches tensors saved together with the storage of a whole foreign file behind them."""
    model = small()
    convert(write(tmp_path / "hf", foreign(model), "safetensors"), tmp_path / "out")
    numbers = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # 400 bytes a tensor: the names, the pickle and the padding to 64 bytes in the zip archive.
    assert (tmp_path / "out/model.pt").stat().st_size < numbers + 400 * len(model.state_dict())


def test_the_head_is_the_word_embedding_or_the_checkpoint_is_refused(tmp_path):
    """Catches a separate head that is dropped without a word: other logits than the author's."""
    state = foreign(small(), "transformer.")
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    _, ours = read_checkpoint(write(tmp_path / "hf", state))
    assert "lm_head.weight" not in ours
    state["lm_head.weight"][3, 4] += 1e-6
    refused(write(tmp_path / "hf", state), "lm_head.weight", "wte.weight")
    state["lm_head.weight"] = state["lm_head.weight"][:, :-1].clone()
    refused(write(tmp_path / "hf", state), "lm_head.weight", "wte.weight")


def test_names_and_shapes_are_strict_both_ways(tmp_path):
    """Catches a layer left at random because its name was missing or unknown."""
    good = foreign(small())
    refused(write(tmp_path / "hf", {n: t for n, t in good.items() if n != "ln_f.bias"}),
            "without ln_f.bias")
    refused(write(tmp_path / "hf", {n: t for n, t in good.items() if not n.startswith("h.1")}),
            "without h.1.attn", "and 9 more")
    refused(write(tmp_path / "hf", good | {"score.weight": torch.ones(2, 12)}),
            "unknown score.weight")
    refused(write(tmp_path / "hf", good | {"transformer.ln_f.bias": good["ln_f.bias"]}), "twice")
    refused(write(tmp_path / "hf", good, vocab_size=62), "wte.weight", "(61, 12)", "(62, 12)")
    refused(write(tmp_path / "hf", good | {"h.0.mlp.c_fc.weight": torch.ones(12, 47)}), "(47, 12)")
    refused(write(tmp_path / "hf", good | {"h.0.mlp.c_fc.weight": torch.ones(576)}), "(576,)")
    refused(write(tmp_path / "hf", good | {"ln_f.bias": torch.ones(12, dtype=torch.int8)}), "int8")


@pytest.mark.parametrize("option, value", [
    ("model_type", "bert"), ("model_type", None), ("activation_function", "relu"),
    ("activation_function", "gelu"), ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
    ("n_head", None), ("n_head", "3"), ("n_head", 0), ("n_layer", -1), ("n_inner", 40),
    ("n_layer", 10 ** 9), ("n_embd", 2 ** 63), ("layer_norm_epsilon", float("nan")),
    ("model_type", ["gpt2"])])
def test_another_architecture_is_refused_by_name(tmp_path, option, value):
    """Catches a checkpoint whose tensors fit and whose function is another one."""
    directory = write(tmp_path / "hf", foreign(small()), **{option: value})
    refused(directory, option, repr(value))


def test_the_usual_hidden_width_may_be_said_aloud(tmp_path):
    """Four times n_embd, 12 here. Would catch: a refusal of what is no other model."""
    convert(write(tmp_path / "hf", foreign(small()), n_inner=48), tmp_path / "out")
    assert load(tmp_path / "out").config == small().config


def test_heads_must_divide_the_width(tmp_path):
    """Catches an error from inside a reshape, long after the file was accepted."""
    directory = write(tmp_path / "hf", foreign(small()), n_head=5)
    with pytest.raises(ValueError, match="5 heads"):
        convert(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(tmp_path):
    """Catches a traceback, or a wrong file name, for a directory that lacks something."""
    (tmp_path / "hf").mkdir()
    refused(tmp_path / "hf", "config.json")
    directory = write(tmp_path / "hf", foreign(small()), "none")
    refused(directory, "model.safetensors", "pytorch_model.bin")
    write(directory, foreign(small()), "shards")
    (directory / "part-1.bin").unlink()
    refused(directory, "part-1.bin")
    (directory / "pytorch_model.bin.index.json").write_text("{}")
    refused(directory, "weight_map")
    (directory / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../b.bin"}}')
    refused(directory, "weight_map of names of files")
    (directory / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(directory, "git lfs pull")
    for text in ("{", "[]", '{"model_type": "gp'):
        (directory / "config.json").write_text(text)
        refused(directory, "config.json", "damaged")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path, form):
    """Catches half a download taken for a whole one."""
    directory = write(tmp_path / "hf", foreign(small()), form)
    file = next(p for p in directory.iterdir() if p.name != "config.json")
    whole = file.read_bytes()
    for length in [0, 1, 8, 100, *range(500, len(whole), len(whole) // 40), len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused(directory, file.name, "delete it")


class Trap:
    """Unpickled without care, it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, form):
    """Catches weights_only=False: a downloaded file would own the machine."""
    state = foreign(small()) | {"ln_f.bias": Trap(tmp_path / "sprung")}
    directory = write(tmp_path / "hf", state, form)
    if form == "pickle":
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(state["ln_f.bias"]))
    refused(directory, "pytorch_model.bin", "model.safetensors")
    assert not (tmp_path / "sprung").exists()
    with open(tmp_path / "trap", "wb") as file:             # the trap does work
        pickle.dump(state["ln_f.bias"], file)
    pickle.loads((tmp_path / "trap").read_bytes())
    assert (tmp_path / "sprung").exists()


def test_a_pickle_of_other_things_is_refused(tmp_path):
    """Catches an AttributeError for a training checkpoint in the place of a state dict."""
    refused(write(tmp_path / "hf", [torch.ones(1)]), "state dict")
    refused(write(tmp_path / "hf", {"model": foreign(small()), "step": 3}), "state dict")


def test_safetensors_without_its_package_is_an_error_with_the_next_step(tmp_path, monkeypatch):
    """Catches an ImportError shown to the user, or the file passed over for nothing."""
    directory = write(tmp_path / "hf", foreign(small()), "safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)       # as if it were not installed
    refused(directory, "pip install safetensors")
    torch.save(foreign(small()), directory / "pytorch_model.bin")
    convert(directory, tmp_path / "out")
    assert load(tmp_path / "out").config == small().config


def test_the_foreign_config_is_never_overwritten(tmp_path):
    """Catches `--out` on the source itself: its config.json would be lost."""
    directory = write(tmp_path / "hf", foreign(small()))
    before = (directory / "config.json").read_bytes()
    with pytest.raises(ValueError, match="two directories"):
        convert(directory, tmp_path / "other" / ".." / "hf")
    assert (directory / "config.json").read_bytes() == before


@pytest.mark.parametrize("old", ["config.json", *OWN_FILES])
def test_what_is_there_is_neither_overwritten_nor_mixed(tmp_path, monkeypatch, old):
    """Would catch: `convert DIR/tiny-gpt2` over the bundled model, with its tokenizer kept."""
    monkeypatch.setattr("pretrained.convert.WEIGHTS", tmp_path / "weights")
    there = tmp_path / "weights" / "tiny-gpt2"
    there.mkdir(parents=True)
    (there / old).write_text("old")
    words = [str(write(tmp_path / "tiny-gpt2", foreign(small())))]
    for more in ([], ["--out", str(there)]):
        with pytest.raises(ValueError, match=f"which has a {old} already; expected a new .*; "):
            main(words + more)
    assert [(p.name, p.read_text()) for p in there.iterdir()] == [(old, "old")]
    (there / old).unlink()
    main(words)
    assert {p.name for p in there.iterdir()} == WHOLE


def test_a_folder_with_a_models_name_is_not_in_its_way(tmp_path, monkeypatch):
    """Would catch: advice that leads back to itself, where ./gpt2 holds something else."""
    asked, weights = [], tmp_path / "weights"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pretrained.convert.WEIGHTS", weights)
    monkeypatch.setattr("pretrained.load.WEIGHTS", weights)
    for module in ("convert", "load"):
        monkeypatch.setattr(f"pretrained.{module}.fetch", lambda name, out: asked.append(name))
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "notes.txt").write_text("mine")
    main(["gpt2"])
    assert find_model("gpt2") == weights / "gpt2" and asked == ["gpt2", "gpt2"]
    write(tmp_path / "gpt2", foreign(small()))          # a checkpoint: the user's own is meant
    with pytest.raises(ValueError, match="run `python -m pretrained.convert gpt2 --out weights/"):
        find_model("gpt2")
    main(["gpt2", "--out", "weights/gpt2"])             # as it was told
    assert find_model("gpt2") == weights / "gpt2" and len(asked) == 2
    convert(tmp_path / "gpt2", tmp_path / "mine")
    assert find_model("mine").samefile(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got empty, which has no config.json"):
        load(find_model("empty"))


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the real one does: a file's own address states its SHA-256 and sends on to a
    storage address, which has the bytes and states nothing.
    """

    def do_HEAD(self):
        self.server.asked.append(f"{self.command} {self.path}")
        file = self.path.rsplit("/", 1)[1]
        body = self.server.files.get(file)
        if body is None:
            self.send_error(404)
        elif "/old-name/" in self.path:
            self.send_response(307)
            self.send_header("Location", self.path.replace("/old-name/", "/new-name/"))
            self.end_headers()
        elif file == "config.json" or self.path.startswith("/storage/"):
            self.send_response(200)
            self.send_header("ETag", '"0123456789012345678901234567890123456789"')
            self.send_header("Content-Length", len(body))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
        else:
            self.send_response(302)
            self.send_header("Location", f"/storage/{file}")
            if self.server.states_sums:
                self.send_header("X-Linked-ETag", f'"{self.server.sums[file]}"')
            self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine that has one small GPT-2 under every name."""
    directory = write(tmp_path / "published", foreign(small(), "transformer."))
    with contextlib.suppress(pytest.skip.Exception):        # then the .bin is asked for
        write(directory, foreign(small()), "safetensors")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {p.name: p.read_bytes() for p in directory.iterdir()}
    server.sums = {name: hashlib.sha256(body).hexdigest() for name, body in server.files.items()}
    server.states_sums, server.asked = True, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_name_is_downloaded_checked_and_converted(hub, tmp_path):
    """Catches a wrong address, and downloads left behind that double the room on the disk."""
    fetch("gpt2-medium", tmp_path / "out", hub.url)
    assert {p.name for p in (tmp_path / "out").iterdir()} == WHOLE
    assert torch.equal(load(tmp_path / "out").wte.weight, small().wte.weight)
    repository, commit = NAMES["gpt2-medium"]
    assert f"GET /{repository}/resolve/{commit}/config.json" in hub.asked


def test_a_large_model_comes_in_shards(hub, tmp_path):
    """Catches: only models in one file known; a page with the older format alone; one shard less,
    or one that is not checked.
    """
    for name in [name for name in hub.files if name != "config.json"]:
        del hub.files[name]
    directory = write(tmp_path / "sharded", foreign(small()), "shards")
    (directory / "vocab.json").write_text(json.dumps({"\u0120the": 262, "<|endoftext|>": 50256}))
    hub.files |= {path.name: path.read_bytes() for path in directory.iterdir()}
    hub.sums = {name: hashlib.sha256(body).hexdigest() for name, body in hub.files.items()}
    fetch("owner/name", tmp_path / "out", hub.url)
    assert torch.equal(load(tmp_path / "out").wte.weight, small().wte.weight)
    assert sum("GET /owner" in line and "part-" in line for line in hub.asked) == 2
    hub.sums["part-1.bin"] = "0" * 64
    with pytest.raises(ValueError, match="part-1.bin: got SHA-256"):
        fetch("owner/name", tmp_path / "other", hub.url)
    del hub.files["part-1.bin"]
    with pytest.raises(FileNotFoundError, match="part-1.bin"):
        fetch("owner/name", tmp_path / "third", hub.url)


def test_the_sum_is_read_before_the_redirection(hub):
    """Catches the checksum lost on the way: the storage host does not repeat it."""
    url = hub.url + "/owner/name/resolve/main/pytorch_model.bin"
    assert declared_sha256(url) == hub.sums["pytorch_model.bin"]
    assert not any("/storage/" in line for line in hub.asked)
    renamed = hub.url + "/owner/old-name/resolve/main/pytorch_model.bin"
    assert declared_sha256(renamed) == hub.sums["pytorch_model.bin"]
    # A short ETag is git's, of a small file: no SHA-256.
    assert declared_sha256(hub.url + "/owner/name/resolve/main/config.json") is None


@pytest.mark.parametrize("file, text", [
    ("tokenizer.json", '{"model": {"vocab": {"der": 0}}}'),
    ("vocab.json", '{"\u0120the": 262, "<|endoftext|>": 50256}')])
def test_a_page_has_the_one_vocabulary_or_the_other(hub, tmp_path, file, text):
    """Catches: a model that asks for a file which its page does not have."""
    hub.files[file] = text.encode("utf-8")
    hub.sums[file] = hashlib.sha256(hub.files[file]).hexdigest()
    fetch("owner/name", tmp_path / "out", hub.url)
    own = {file} if file == "tokenizer.json" else set()
    assert {p.name for p in (tmp_path / "out").iterdir()} == WHOLE | own
    hub.files.pop(file)
    with pytest.raises(OSError, match="could not ask .*vocab.json.*404"):
        fetch("owner/name", tmp_path / "other", hub.url)


@pytest.mark.parametrize("name", ["gpt2-medium", "gpt2"])
def test_a_wrong_sum_keeps_nothing(hub, tmp_path, name):
    """Catches a changed file accepted: by the hub's own sum, or by ours where we have one."""
    if name == "gpt2-medium":
        hub.sums = dict.fromkeys(hub.sums, "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(name, tmp_path / "out", hub.url)
    assert {p.name for p in (tmp_path / "out" / "hf").iterdir()} == {"config.json"}
    assert not any((tmp_path / "out" / name).exists() for name in WHOLE)


def test_weights_without_any_sum_are_not_trusted(hub, tmp_path):
    """Catches an unchecked download where the server says nothing."""
    hub.states_sums = False
    with pytest.raises(ValueError, match="no SHA-256"):
        fetch("gpt2-large", tmp_path / "out", hub.url)


def test_a_download_is_not_repeated_when_it_is_there(hub, tmp_path):
    """Catches gigabytes fetched again after a full disk, and files put there by hand ignored, where
    the hub can be asked for their sums and where it cannot.
    """
    for number, url in enumerate((hub.url, "http://127.0.0.1:1")):      # nobody listens on port 1
        out = tmp_path / f"out{number}"
        (out / "hf").mkdir(parents=True)
        for name, body in hub.files.items():
            (out / "hf" / name).write_bytes(body)
        fetch("gpt2-medium", out, url)
        assert load(out).config == small().config
    assert [line for line in hub.asked if line.startswith("GET") and ".json" not in line] == []


def test_what_is_there_is_checked_like_a_download(hub, tmp_path, capsys):
    """Catches half a file of an earlier try, or a damaged one, that stands in the way for ever."""
    kept = tmp_path / "out" / "hf"
    kept.mkdir(parents=True)
    for name, body in hub.files.items():
        (kept / name).write_bytes(body[:-9])
    fetch("gpt2-medium", tmp_path / "out", hub.url)
    assert "is damaged: SHA-256" in capsys.readouterr().err
    assert torch.equal(load(tmp_path / "out").wte.weight, small().wte.weight)


def test_a_server_that_speaks_something_else_is_named():
    """Catches: BadStatusLine, which is no OSError, as a mistake of our own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-x\r\n\r\n")
        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/model.safetensors"
        with pytest.raises(OSError, match=f"could not reach {url}: SSH"):
            declared_sha256(url)


def test_a_hub_that_says_no_is_named(hub, tmp_path):
    """Catches a traceback from inside urllib."""
    hub.files = {}
    with pytest.raises(OSError, match="could not .*config.json.*404"):
        fetch("gpt2-medium", tmp_path / "out", hub.url)
    with pytest.raises(OSError, match="could not reach http://127.0.0.1:1/"):
        declared_sha256("http://127.0.0.1:1/model.safetensors")    # nobody listens on port 1
    with pytest.raises(ValueError, match="gpt2-medium"):
        fetch("gpt5", tmp_path / "out", hub.url)


def command(*words):
    return subprocess.run([sys.executable, "-m", "pretrained.convert", *map(str, words)],
                          cwd=ROOT, capture_output=True, text=True)


def test_the_command_converts_a_directory(tmp_path):
    """Catches a command that works only when called as a function."""
    done = command(write(tmp_path / "hf", foreign(small())), "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert load(tmp_path / "out").config == small().config


@pytest.mark.parametrize("process", [
    pytest.param(True, marks=pytest.mark.slow, id="program"), pytest.param(False, id="function")])
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, capfd, process):
    """Catches a traceback, torch's advice to run the code, or success reported for a failure."""
    cut = write(tmp_path / "cut", foreign(small()))
    whole = (cut / "pytorch_model.bin").read_bytes()
    (cut / "pytorch_model.bin").write_bytes(whole[:len(whole) // 2])
    trap = write(tmp_path / "trap", {"wte.weight": Trap(tmp_path / "sprung")}, "legacy")
    for source, word in (("gtp2", "did you mean gpt2?"), (cut, "cut short"), (trap, "mkdir")):
        words = [str(source), "--out", str(tmp_path / "out")]
        if process:
            done = command(*words)
            status, out, err = done.returncode, done.stdout, done.stderr
        else:
            with pytest.raises(SystemExit) as caught:
                run_program(functools.partial(main, words))
            status, (out, err) = caught.value.code, capfd.readouterr()
        assert status == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1
        assert word in err and "weights_only" not in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "sprung").exists()


def test_the_makers_way_of_decoding_survives_both_files(tmp_path):
    """Catches a generation config that is lost by `convert`, by `save` or by `load`."""
    directory = write(tmp_path / "hf", foreign(small()), num_beams=4, bos_token_id=60,
                      length_penalty=None, task_specific_params={"summarization": {}})
    newer = {"bos_token_id": 59, "forced_eos_token_id": 3, "temperature": 0.5}
    (directory / "generation_config.json").write_text(json.dumps(newer))
    convert(directory, tmp_path / "out")
    wanted = {"bos_token_id": 59, "forced_eos_token_id": 3}     # what is not used is not kept
    model = load(tmp_path / "out")
    assert model.generation_config == wanted        # the newer file's word counts
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").generation_config == wanted
    save(small(), tmp_path / "plain")
    assert load(tmp_path / "plain").generation_config == {}


def test_the_newer_file_has_the_last_word(tmp_path):
    """Would catch: a token forced that generation_config.json does not force (as transformers: it
    replaces the older file's words), one of several ends, ends that no row of the model can be.
    """
    directory = write(tmp_path / "hf", foreign(small()), forced_eos_token_id=3, eos_token_id=60)
    for newer, wanted in (
            (None, {"forced_eos_token_id": 3, "eos_token_id": 60}),
            ({}, {"eos_token_id": 60}), ({"forced_bos_token_id": 5, "eos_token_id": 7},
                                         {"forced_bos_token_id": 5, "eos_token_id": 7}),
            ({"eos_token_id": [7, 0, 9]}, {"eos_token_id": [7, 0, 9]}),
            ({"eos_token_id": [50256, 9], "bos_token_id": 50256}, {"eos_token_id": 9})):
        if newer is not None:
            (directory / "generation_config.json").write_text(json.dumps(newer))
        convert(directory, tmp_path / "ours")
        assert load(tmp_path / "ours").generation_config == wanted
    for wrong in (61, -1, "3", [3, 4]):
        newer = json.dumps({"forced_eos_token_id": wrong})
        (directory / "generation_config.json").write_text(newer)
        with pytest.raises(ValueError, match="with forced_eos_token_id = .*; expected a token bel"):
            convert(directory, tmp_path / "ours")


def test_a_download_brings_the_newer_file(hub, tmp_path):
    """Would catch: how the makers decode lost on the way from the hub."""
    hub.files["generation_config.json"] = b'{"eos_token_id": [7, 9]}'
    hub.sums["generation_config.json"] = ""
    fetch("gpt2-medium", tmp_path / "out", hub.url)
    assert load(tmp_path / "out").generation_config == {"eos_token_id": [7, 9]}


def test_a_head_may_be_the_embedding_in_a_shorter_dtype(tmp_path):
    """Would catch: one tensor refused, saved once in fp32 and once in fp16."""
    state = foreign(small(), "transformer.")
    wide = state["transformer.wte.weight"]
    for head, words in ((wide.half(), wide), (wide, wide.half()), (wide.bfloat16(), wide.double())):
        _, ours = read_checkpoint(write(tmp_path / "hf", state | {
            "lm_head.weight": head, "transformer.wte.weight": words}))
        assert torch.equal(ours["wte.weight"], words)
    half = wide.half()
    half[3, 4] += 0.01
    refused(write(tmp_path / "hf", state | {"lm_head.weight": half}), "lm_head.weight differs")


def test_another_width_of_the_mlp_is_named(tmp_path):
    """Would catch: the advice to download both files again, which never ends."""
    refused(write(tmp_path / "hf", foreign(small()), n_inner=40), "n_inner = 40; expected None")
    for same in (None, 48):                                     # 4 * 12
        convert(write(tmp_path / "hf", foreign(small()), n_inner=same), tmp_path / "out")


@pytest.mark.parametrize("kind, option", [("gpt2", "activation_function"),
                                          ("bart", "activation_function"), ("llama", "hidden_act")])
def test_all_names_of_an_activation_are_one_function(kind, option):
    """Would catch: a name that is another function, or the model's own left out."""
    activations = pytest.importorskip("transformers.activations", reason="the oracle: pip install "
                                                                         "transformers")
    x, (first, *others) = torch.linspace(-6, 6, 999, dtype=torch.float64), (
        architecture(kind).fixed_options[option])
    for name in others:
        difference = activations.ACT2FN[name](x) - activations.ACT2FN[first](x)
        assert difference.abs().max() < 1e-8, name      # sqrt(2 / pi) has 10 digits in some of them


def test_another_name_of_the_activation_is_read(tmp_path):
    """Would catch: a GPT-2 refused for the newer name of the function that it was trained with."""
    for name in ("gelu_new", "gelu_pytorch_tanh", None):
        write(tmp_path / "hf", foreign(small()), activation_function=name)
        convert(tmp_path / "hf", tmp_path / "out")
    other = write(tmp_path / "hf", foreign(small()), activation_function="gelu")
    with pytest.raises(ValueError, match="activation_function = 'gelu'; expected 'gelu_new'"):
        convert(other, tmp_path / "none")


@pytest.mark.parametrize("name", ["spiece.model", "vocab.txt"])
def test_another_kind_of_vocabulary_is_refused_by_name(tmp_path, name):
    """Would catch: a GPT-2 of another language that is read with English tokens, without a word."""
    directory = write(tmp_path / "hf", foreign(small()))
    (directory / name).write_text("x")
    with pytest.raises(ValueError, match=f"with {name}, a vocabulary of another kind than"):
        convert(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the table of the architectures

def test_an_architecture_that_is_not_here_is_refused_in_plain_words(tmp_path):
    """Catches a KeyError, in a program or for a model's directory of another version."""
    with pytest.raises(ValueError, match="got model_type 'nope'; expected one of gpt2, bart, "):
        architecture("nope")
    save(small(), tmp_path / "ours")
    about = read_json(tmp_path / "ours" / "config.json")
    write_json(tmp_path / "ours" / "config.json", about | {"architecture": "nope"})
    with pytest.raises(ValueError, match="ours, whose files do not fit .*got model_type 'nope'"):
        load(tmp_path / "ours")


def test_a_room_that_was_deleted_is_named(tmp_path, monkeypatch):
    """Catches a ModuleNotFoundError for a BART where somebody has deleted bart/; and a GPT-2 that
    needs it.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "bart"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bart", None)              # as if the folder were not there
    with pytest.raises(ValueError, match="got model_type 'bart', but there is no bart.* here; "):
        architecture("bart")
    refused(write(tmp_path / "hf", foreign(small()), model_type="bart"), "there is no bart")
    assert new_prefix(small(), 3, 5)().size(4) == 3


@pytest.mark.parametrize("change", [
    {"config": {"n_layer": 10 ** 9}}, {"config": {"n_layer": "2"}}, {"config": {"n_head": 3.0}},
    {"config": {"n_embd": True}}, {"architecture": ["gpt2"]}, {"generation_config": [1]},
    {"generation_config": {"eos_token_id": "a"}}, {"generation_config": {"eos_token_id": [61]}}])
def test_a_config_of_ours_with_other_types_or_sizes_is_refused(tmp_path, change):
    """Would catch: a billion layers, each of which takes memory before its weights are missed."""
    save(small(), tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    if "config" in change:
        change = {"config": about["config"] | change["config"]}
    path.write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match="whose files do not fit"):
        load(tmp_path)
