"""A run's directory: what is refused of one that another version of train.py has written or that is
damaged, what going on puts back, who may write.
"""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_gpt2

import train
from pretrained import run_directory
from pretrained.checkpoint import load, save
from pretrained.load import load_model
from pretrained.run_directory import (
    create,
    load_prefix,
    load_run,
    load_state,
    resumed_settings,
    run_settings,
    save_prefix,
    save_state,
)
from utils.cli import run_program
from utils.files import read_json, write_json

OURS = {field.name: field.default for field in dataclasses.fields(train.Settings)}
OLDER = {name: value for name, value in OURS.items() if name != "fast"} | {"pack": "auto"}


def write(folder, settings):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    return str(folder)


@pytest.mark.parametrize("settings, other", [
    (OLDER, "fast, pack"), (OURS | {"beam": 5, "pack": "no"}, "beam, pack"),
    ({name: value for name, value in OURS.items() if name != "clip"}, "clip"),
    ({"model": "tiny-gpt2"}, "accumulate, attention, batch_size, clip, ")])
def test_a_run_of_another_layout_is_not_resumed(tmp_path, capsys, settings, other):
    """Would catch: a TypeError, a setting that is dropped, or one that is guessed: the run would
    go on as another one.
    """
    run = write(tmp_path / "run", settings)
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: train.main(["--resume", run]))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: got {run}, whose config.json has other settings ({other}")
    assert "; expected those of this version of train.py; start a new run" in err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.json"]


def test_a_run_of_this_layout_is_resumed_with_its_own_settings(tmp_path):
    """Would catch: a check that refuses our own runs, or that loses what the call may change."""
    run = write(tmp_path / "run", OURS | {"lr": 0.25, "out": "elsewhere", "device": "cuda"})
    args = train.parse(train.Settings, ["--resume", run, "--device", "cpu", "--stop-at", "3"], "")
    assert resumed_settings(args) == train.Settings(lr=0.25, resume=run, out=run, device="cpu",
                                                    stop_at=3)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"settings": []}', '{"settings": {}}',
                                  '{"settings": {"model": 3}}'])
def test_what_is_no_run_is_named(tmp_path, text):
    """Would catch: a traceback for a directory that has another config.json, or none."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="which is no run .*; expected the config.json that train"):
        run_settings(tmp_path)


def test_who_names_no_run_is_told_of_those_that_are_there(tmp_path, monkeypatch):
    """Would catch: an error without a next step, a damaged run that is advised in its own place."""
    monkeypatch.chdir(tmp_path)
    for made, advice in (("", "train one: `python train.py`"),
                         ("out/bart-xsum", "choose one of out/bart-xsum$"),
                         ("out/world", "did you mean out/world[?]")):
        if made:
            (tmp_path / made).mkdir(parents=True)
            (tmp_path / made / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=f"got out/wrld, which is no run .*; {advice}"):
            run_settings("out/wrld")
    with pytest.raises(ValueError, match="no run .KeyError.*; choose one of out/bart-xsum$"):
        run_settings("out/world/")


@pytest.mark.parametrize("name, value, words", [
    ("model", ["a"], "its model is ['a']"), ("data", 7, "its data is 7"),
    ("max_source", "512", "its max_source is '512'"), ("steps", "ten", "with steps = 'ten'"),
    ("batch_size", 10 ** 9, "with batch_size = 1000000000; expected a number from 1 to 100,000"),
    ("fast", 1, "with fast = 1; expected one value of the kind bool"),
    ("method", "none", "with method = 'none'; expected one of prefix, "),
    ("lr", float("nan"), "with lr = nan; expected a number from 1e-12 to 1e+30")])
def test_a_run_with_a_setting_that_no_flag_can_give_is_refused(tmp_path, name, value, words):
    """Would catch: a traceback far from the file, and memory asked for a batch of a billion."""
    run = write(tmp_path / "run", OURS | {name: value})
    with pytest.raises(ValueError) as caught:
        resumed_settings(dataclasses.replace(train.Settings(), resume=run))
    assert words in str(caught.value)
# ---- damage

def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_of_what_was_learned_is_refused(model, tmp_path):
    """Would catch: other numbers that load without a word, for PyTorch compares no checksum."""
    folded = torch.randn(3, 2, 1, 4, 5, 6)
    save_prefix(tmp_path / "prefix.pt", folded, model)
    place = (tmp_path / "prefix.pt").read_bytes().index(folded.numpy().tobytes()[:64])
    flip(tmp_path / "prefix.pt", place + 21)
    with pytest.raises(ValueError, match="which is no prefix .*data/0 in it has another checksum"):
        load_prefix(tmp_path / "prefix.pt", model)
    # A tensor that is marked as a directory, at byte 38 of its entry, of which PyTorch reads none.
    save_prefix(tmp_path / "prefix.pt", folded, model)
    whole = (tmp_path / "prefix.pt").read_bytes()
    entry = whole.rindex(b"PK\1\2", 0, whole.rindex(b"data/0"))
    (tmp_path / "prefix.pt").write_bytes(whole[:entry + 38] + b"\x10" + whole[entry + 39:])
    with pytest.raises(ValueError, match="which is no prefix .*data/0 in it has another checksum"):
        load_prefix(tmp_path / "prefix.pt", model)


def test_a_changed_config_of_a_run_is_refused(tmp_path, model):
    """Would catch: a run that is decoded or resumed with settings that are not its own; but also a
    file without a checksum, written by hand, that cannot be used.
    """
    settings = create(train.Settings(out=str(tmp_path / "run")), "", model)
    assert run_settings(settings.out) == dataclasses.asdict(settings)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"batch_size": null', '"batch_size": 3'))
    with pytest.raises(ValueError, match="no run .*damaged or was edited, its sha256 is another"):
        run_settings(settings.out)
    about = json.loads(path.read_text())
    del about["sha256"]
    path.write_text(json.dumps(about))
    assert run_settings(settings.out)["batch_size"] == 3


def test_a_model_is_its_weights_its_settings_and_its_tokens(model_directory, tmp_path):
    """Would catch: a prefix taken by a model that computes with other heads, or whose tokens have
    other numbers: nonsense with status 0.
    """
    marks = [load_model(str(model_directory), "cpu", "fp32")[0].fingerprint]
    for change in ("heads", "tokens", "nothing"):
        shutil.copytree(model_directory, tmp_path / change)
        model = random_gpt2(n_head=2 if change == "heads" else 4).float()
        if change == "tokens":
            path = tmp_path / change / "tokenizer.tiktoken"
            lines = path.read_text().splitlines()
            lines[65], lines[66] = (f"{b.split()[0]} {a.split()[1]}" for a, b in
                                    (lines[65:67], lines[66:64:-1]))
            path.write_text("\n".join(lines))
            with pytest.raises(ValueError, match="tokenizer.tiktoken has another SHA-256"):
                load_model(str(tmp_path / change), "cpu", "fp32")
        save(model, tmp_path / change)
        marks.append(load_model(str(tmp_path / change), "cpu", "fp32")[0].fingerprint)
    assert len(set(marks)) == 3 and marks[0] == marks[3]


def test_a_vocabulary_that_nobody_has_named_is_refused(model_directory, tmp_path):
    """Would catch: other tokens because a file was put there later, and nonsense with status 0."""
    shutil.copytree(model_directory, tmp_path / "model")
    for name in ("tokenizer.json", "dict.txt"):
        (tmp_path / "model" / name).write_text("0 1\n")
        with pytest.raises(ValueError, match=f"config.json names no {name}"):
            load_model(str(tmp_path / "model"), "cpu", "fp32")
        (tmp_path / "model" / name).unlink()
    load_model(str(tmp_path / "model"), "cpu", "fp32")


@pytest.mark.parametrize("name, value", [
    ("forced_bos_token_id", [1, 2]), ("eos_token_id", [1, "2"]), ("eos_token_id", 10 ** 6),
    ("bos_token_id", None)])
def test_a_token_that_decoding_cannot_use_is_refused(model_directory, tmp_path, name, value):
    """Would catch: a list in the place of a token, and a traceback in the middle of decoding."""
    shutil.copytree(model_directory, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    about = read_json(path)
    write_json(path, about | {"generation_config": {"eos_token_id": [1, 2]}})
    assert load(tmp_path / "model").generation_config == {"eos_token_id": [1, 2]}
    write_json(path, about | {"generation_config": {name: value}})
    with pytest.raises(ValueError, match=f"its generation_config has {name} = "):
        load(tmp_path / "model")


def test_a_tuned_model_has_the_tokens_of_its_base(model_directory, tmp_path, model):
    """Would catch: a fine-tuned model that speaks another model's tokens, with status 0."""
    pytest.importorskip("baselines", reason="there is no baselines/ here")
    base = tmp_path / "base"
    shutil.copytree(model_directory, base)
    frozen = load_model(str(base), "cpu", "fp32")[0]
    settings = create(train.Settings(out=str(tmp_path / "run"), model=str(base)), "", frozen)
    save(frozen, tmp_path / "run" / "model", again=True)
    load_run(settings.out, "cpu", "fp32")
    lines = (base / "tokenizer.tiktoken").read_text().splitlines()
    lines[65], lines[66] = (f"{b.split()[0]} {a.split()[1]}" for a, b in
                            (lines[65:67], lines[66:64:-1]))
    (base / "tokenizer.tiktoken").write_text("\n".join(lines))
    save(load(model_directory), base)               # its checksums are right
    with pytest.raises(ValueError, match="run/model, tuned from the model '.*put back the one"):
        load_run(settings.out, "cpu", "fp32")


def test_a_model_that_is_replaced_keeps_its_links_and_modes(model, tmp_path):
    """Would catch: a config.json that is deleted first, so that a link to another disk becomes a
    file here, and nobody else may read it; a directory without one while the weights are written.
    """
    save(model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.rename(tmp_path / "elsewhere.json")
    config.symlink_to("../elsewhere.json")
    (tmp_path / "elsewhere.json").chmod(0o604)
    model.wte.weight.data += 1
    save(model, tmp_path / "model")
    assert config.is_symlink() and config.stat().st_mode & 0o777 == 0o604
    assert torch.equal(load(tmp_path / "model", dtype=torch.float64).wte.weight, model.wte.weight)


@pytest.mark.parametrize("place", [1, 2])
def test_a_model_that_is_half_replaced_is_refused(model, tmp_path, monkeypatch, place):
    """Would catch: new weights under the old settings, where a kill comes between the two files."""
    save(model, tmp_path / "model")
    model.wte.weight.data += 1
    replace, left = os.replace, [place]

    def killed(*names):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        replace(*names)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "model")
    if place == 1:                                  # before the first: all is as it was
        assert load(tmp_path / "model", dtype=torch.float64).wte.weight.isfinite().all()
    else:
        with pytest.raises(ValueError, match="holds other weights than config.json names"):
            load(tmp_path / "model")


def test_numbers_that_are_none_are_neither_written_nor_read(model, tmp_path):
    """Would catch: NaN exported, or written over a good model; "!!!!!!" decoded with status 0."""
    folded = torch.randn(3, 2, 1, 4, 5, 6)
    save_prefix(tmp_path / "prefix.pt", folded, model)
    save(model, tmp_path / "model")
    saved = torch.load(tmp_path / "prefix.pt", weights_only=True)
    for bad in (torch.nan, torch.inf):
        folded[1, 0, 0, 2, 3, 4] = bad
        model.wte.weight.data[3, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            save_prefix(tmp_path / "prefix.pt", folded, model)
        with pytest.raises(ValueError, match="NaN or infinity in wte.weight"):
            save(model, tmp_path / "model")
        assert load_prefix(tmp_path / "prefix.pt", model).isfinite().all()
        assert load(tmp_path / "model").wte.weight.isfinite().all()
        torch.save(saved | {"prefix": folded}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match="NaN or infinity"):
            load_prefix(tmp_path / "bad.pt", model)


# ---- going on

def test_going_on_puts_back_what_belongs_to_the_state(tmp_path, capsys):
    """Would catch: an older prefix taken for the best, a damaged log that makes the whole run
    useless, lines of steps that are done again; and all of it without a word.
    """
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 5}\n')
    (tmp_path / "prefix.pt").write_bytes(b"the best")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_json(tmp_path / "config.json", {"settings": {}})
    settings = train.Settings(out=str(tmp_path))
    save_state(settings, {"fingerprint": "f", "data": "d", "step": 5})
    whole = {name: (tmp_path / name).read_bytes() for name in ("log.jsonl", "prefix.pt",
                                                                   "model/config.json")}

    def resumed(name, damaged):
        (tmp_path / name).write_bytes(damaged)
        assert load_state(settings, "f", "d")["step"] == 5
        assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
        return capsys.readouterr().err
    assert resumed("log.jsonl", whole["log.jsonl"] + b'{"step": 6}\n{"st') == ""
    said = f"{tmp_path / 'log.jsonl'} is not that of step 5, to which resume.pt belongs; it is put"
    assert said in resumed("log.jsonl", b'{"step": 0}\n{"st\xff: 5}\n')
    assert "prefix.pt is not that of step 5" in resumed("prefix.pt", b"an older one")
    assert "config.json is not that of step 5" in resumed("model/config.json", b"another")
    (tmp_path / "prefix.pt").unlink()
    assert "prefix.pt is not that of step 5" in resumed("log.jsonl", whole["log.jsonl"])
    with pytest.raises(ValueError, match="the data or its tokens have changed"):
        load_state(settings, "f", "other")


def test_the_state_of_another_run_is_refused_and_changes_nothing(tmp_path, model):
    """Would catch: the log and the prefix of one run put back into another; a mix of both."""
    runs = [create(train.Settings(out=str(tmp_path / name), seed=seed), "", model)
            for seed, name in enumerate("ab")]
    for run in runs:
        (Path(run.out) / "log.jsonl").write_text(f"of {run.out}")
        save_state(run, {"fingerprint": "f", "data": "d", "step": 5})
    shutil.copy(tmp_path / "a" / "resume.pt", tmp_path / "b" / "resume.pt")
    before = {path: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with pytest.raises(ValueError, match="cannot be resumed .*it is of a run with --seed 0"):
        load_state(runs[1], "f", "d")
    assert before == {path: path.read_bytes() for path in before}
    moved = dataclasses.replace(runs[0], out=str(tmp_path / "b"), device="cpu", stop_at=9)
    assert load_state(moved, "f", "d")["step"] == 5         # these may be others
    assert (tmp_path / "b" / "log.jsonl").read_text() == f"of {runs[0].out}"


def test_other_threads_are_said_when_a_run_goes_on(tmp_path, model, capsys):
    """Would catch: last bits that differ, and nobody who can tell why."""
    settings = create(train.Settings(out=str(tmp_path / "run")), "", model)
    save_state(settings, {"fingerprint": "f", "data": "d", "step": 5})
    load_state(settings, "f", "d")
    assert capsys.readouterr().err == ""
    about = read_json(tmp_path / "run" / "config.json")
    about["environment"]["threads"] += 1
    write_json(tmp_path / "run" / "config.json", about)
    load_state(settings, "f", "d")
    assert "'threads': 2" in capsys.readouterr().err


# ---- who writes

def test_two_starts_never_share_a_directory(tmp_path, model, monkeypatch):
    """Would catch: the settings of one run beside the prefix of another, and status 0."""
    monkeypatch.chdir(tmp_path)
    settings = train.Settings(data="my.jsonl")
    assert [create(settings, "", model).out for _ in range(3)] == [
        "out/tiny-gpt2-my", "out/tiny-gpt2-my-2", "out/tiny-gpt2-my-3"]
    named = dataclasses.replace(settings, out="mine")
    create(named, "", model)
    before = (tmp_path / "mine" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="got --out mine, which exists"):
        create(named, "", model)
    assert (tmp_path / "mine" / "config.json").read_bytes() == before


def test_a_run_that_is_written_is_not_resumed_beside(tmp_path, model):
    """Would catch: two processes that write one run; a lock that is left by a process that died."""
    settings = create(train.Settings(out=str(tmp_path / "run")), "", model)
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    save_state(settings, {"fingerprint": "f", "data": "d", "step": 5})
    program = ("import sys; sys.path.insert(0, sys.argv[1])\n"
               "from pretrained.run_directory import load_state, run_settings\n"
               "run_settings(sys.argv[2]); print('read', flush=True)\n"
               "import train\n"
               "load_state(train.Settings(out=sys.argv[2]), 'f', 'd')\n")
    other = subprocess.run([sys.executable, "-c", program, ROOT, tmp_path / "run"],
                           capture_output=True, text=True)
    assert other.stdout == "read\n" and other.returncode == 1
    assert "in which another process is writing" in other.stderr.splitlines()[-1]
    shutil.copytree(tmp_path / "run", tmp_path / "left")        # as its process left it
    load_state(dataclasses.replace(settings, out=str(tmp_path / "left")), "f", "d")


def test_the_commit_of_somebody_elses_repository_is_not_ours(tmp_path, monkeypatch):
    """Would catch: the commit of a repository into which this project was copied."""
    monkeypatch.setattr(run_directory, "ROOT", tmp_path / "vendor" / "ours")
    (tmp_path / "vendor" / "ours").mkdir(parents=True)
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e@example.org"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git does not work here")
    assert run_directory.commit_here() is None
    monkeypatch.setattr(run_directory, "ROOT", tmp_path)
    assert len(run_directory.commit_here()) == 40


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")],
                         ids=["a pipe", "what never ends"])
def test_what_never_ends_is_no_run_and_no_model(model_directory, tmp_path, make):
    """Would catch: a program that waits for ever, or that fills the memory."""
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(model_directory, model)
    run.mkdir()
    save_prefix(run / "prefix.pt", load(model).empty_prefix(), load(model))
    (run / "config.json").write_text('{"settings": {"model": "x"}}')
    doors = {run / "prefix.pt": lambda: load_prefix(run / "prefix.pt", load(model)),
             run / "config.json": lambda: run_settings(run),
             model / "tokenizer.tiktoken": lambda: load_model(str(model), "cpu", "fp32"),
             model / "config.json": lambda: load(model), model / "model.pt": lambda: load(model)}
    for path, door in doors.items():
        path.unlink()
        make(path)
        with pytest.raises(ValueError, match="no plain file"):
            door()
