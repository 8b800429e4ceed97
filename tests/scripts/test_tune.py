"""Which rate, which length: what is tried, what goes on, and that nothing is lost."""
import contextlib
import io
import json
import re
import shlex
import signal

import pytest

import train
from data.paper import resolve_training
from data.toy_world import tables
from scripts import tune
from scripts.results import read_rows
from utils.cli import parse, run_program


def flags(folder):
    """Of a search between two rates, 1e30 being far too high, for the task in `folder`."""
    return ["--data", str(folder / "my.jsonl"), "--rates", "1e30", "--rates", "3e-3", "--lengths",
            "3", "--steps", "4", "--device", "cpu", "--mid-dim", "16", "--out",
            str(folder / "tuned")]


def searched(folder):
    """What the search prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tune.main(flags(folder))
    return printed.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a folder with a task of 20 tables of the invented world, what the search printed)."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"source": e.source, "target": e.targets} for e in tables.task("near", "train", 20)]
    (folder / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder, searched(folder)


def test_the_better_half_goes_on_and_nothing_runs_twice(whole):
    """Would catch: the worse half that goes on; a rate that diverges and ends the search; a call
    that begins again, or that mixes runs of other settings; a command that train.py refuses.
    """
    folder, text = whole
    log = folder / "tuned" / "lr-0.003-prefix-len-3" / "log.jsonl"
    losses = {row["step"]: row["dev_loss"] for row in read_rows(log) if "dev_loss" in row}
    assert list(losses) == [0, 1, 2, 3, 4] and losses[4] < losses[0]
    assert [line.split() for line in text.splitlines()[-4:-2]] == [
        ["0.003", "3", "4", f"{min(losses.values()):.3f}"], ["1e+30", "3", "1", "inf"]]
    assert "end of the grid" in text
    words = shlex.split(text.split("go on with: ")[1])
    settings = resolve_training(parse(train.Settings, words[2:], ""))
    assert (settings.lr, settings.prefix_len, settings.mid_dim) == (3e-3, 3, 16)
    assert words[:2] == ["python", "train.py"] and settings.data == str(folder / "my.jsonl")
    before = log.stat().st_mtime_ns
    assert searched(folder) == text and log.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="runs with other flags.*another --out"):
        tune.main([*flags(folder), "--seed", "7"])


def test_a_stopped_call_goes_on_to_the_same_losses(whole, tmp_path):
    """Would catch: a run that begins again, or that goes on from another place."""
    folder, text = whole
    (tmp_path / "my.jsonl").write_bytes((folder / "my.jsonl").read_bytes())
    tuned = tmp_path / "tuned"
    common = tune.common_words(parse(tune.Settings, flags(tmp_path), ""), tuned)
    good, bad = tuned / "lr-0.003-prefix-len-3", tuned / "lr-1e+30-prefix-len-3"
    train.main([*common, "--lr", "0.003", "--prefix-len", "3", "--stop-at", "1", "--out",
                str(good)])
    saved = (good / "config.json").stat().st_mtime_ns
    bad.mkdir()                                 # killed before there was anything to go on with
    assert searched(tmp_path) == text.replace(str(folder), str(tmp_path))
    assert (good / "config.json").stat().st_mtime_ns == saved


def test_few_examples_are_split_as_in_the_paper():
    """dev is 30 % of train. Would catch: a rate chosen by 2 sources, or dev sources learned from.
    """
    for n_train, n_dev, expected in ((18, 2, (15, 5)), (100, 500, (100, 30)), (10, 3, (10, 3)),
                                     (2, 1, (2, 1))):
        part = list(range(n_train)), list(range(1000, 1000 + n_dev))
        learn, dev = tune.split_few(*part, seed=101)
        assert (len(learn), len(dev)) == expected
        assert len({*learn, *dev}) == sum(expected) and {*learn} <= {*part[0]}


def test_a_damaged_log_is_mended_aloud(whole, capsys):
    """Would catch: a search that ends at it without advice, or that chooses by other numbers."""
    folder, text = whole
    log = folder / "tuned" / "lr-0.003-prefix-len-3" / "log.jsonl"
    before = log.read_bytes()
    for damaged in (before.replace(b'"step": 2', b'"step: 2'),
                    before.replace(b'"dev_loss": ', b'"dev_loss": 0.0')):
        log.write_bytes(damaged)
        assert searched(folder) == text and log.read_bytes() == before
        assert f"{log} is not that of step 4" in capsys.readouterr().err


@pytest.mark.parametrize("words, choices", [
    ([], 9), (["--lr", "1e-3"], 3), (["--prefix-len", "4"], 3), (["--init", "words"], 3),
    (["--method", "finetune"], 3), (["--rates", "1", "--rates", "1", "--lengths", "2"], 1)])
def test_what_is_given_is_not_varied(words, choices):
    """Would catch: lengths tried where words, a run or the method decide them."""
    found = tune.grid(parse(tune.Settings, words, ""))
    assert len(found) == choices
    for choice in found:
        if words[:1] != ["--prefix-len"]:
            resolve_training(parse(train.Settings, [*choice, *(
                words if words[:1] in (["--init"], ["--method"]) else [])], ""))


def test_flags_that_tune_decides_are_refused():
    """Would catch: a flag without effect."""
    for words in (["--stop-at", "3"], ["--resume", "x"], ["--epochs", "2"], ["--steps", "6"]):
        with pytest.raises(ValueError, match=f"got {words[0]}; expected --steps alone"):
            tune.main(words)


def test_help_shows_what_it_takes_and_nothing_else(capsys):
    """Would catch: train.py's own flags, examples and directory of a run in the help of a search.
    """
    with pytest.raises(SystemExit):
        tune.main(["--help"])
    out = capsys.readouterr().out
    assert "--rates" in out and "--dev-pairs" in out and "out/tune-MODEL-DATA" in out
    for name in ("--epochs", "--dev-every", "--stop-at", "--resume", "train.py --"):
        assert name not in out
    examples = re.findall("\n  example: (.*)", out)
    assert len(examples) >= 6
    for example in examples:
        python, m, name, *argv = shlex.split(example)
        assert (python, m, name) == ("python", "-m", "scripts.tune")
        given = parse(tune.Settings, argv, "").given
        assert given and not given & set(tune.OWN[-4:])
    with pytest.raises(ValueError, match="unknown argument '--stop-a'; .*`python -m scripts.tune "
                       "--help` lists") as caught:
        tune.main(["--stop-a", "x"])
    assert "mean --stop-at" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_the_programs_status(tmp_path, monkeypatch, capsys, number):
    """Would catch: status 0 for a search that was stopped, after which `&&` goes on."""
    def stopped(words):
        return 128 + number
    monkeypatch.setattr(tune.train, "main", stopped)
    monkeypatch.chdir(tmp_path)
    pairs = [{"source": f"s {n}", "target": "t"} for n in range(9)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: tune.main(["--data", "my.jsonl", "--steps", "4"]))
    assert ended.value.code == 128 + number
    assert "the same command goes on" in capsys.readouterr().out
