"""A run's directory: what is refused of one that another version of train.py has written."""
import dataclasses
import json

import pytest

import train
from pretrained.run_directory import resumed_settings, run_settings
from utils.cli import run_program

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
