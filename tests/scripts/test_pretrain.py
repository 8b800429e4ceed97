"""Pre-training: whole documents, the same run after an interruption, and the bundled result."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train as core
from data.tokenizer import load_tokenizer
from data.toy_world.text import FIRST, document, encode
from pretrained import run_directory
from pretrained.checkpoint import load, save
from scripts import muon, pretrain, pretrain_gpt2

BUNDLED = ROOT / "weights" / "tiny-gpt2"
SMALL = ["--width", "16", "--layers", "1", "--heads", "2", "--rows", "2", "--warmup", "2",
         "--device", "cpu", "--probe-every", "2", "--save-every", "2", "--tokens", str(6 * 2 * 192)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED)


@pytest.fixture
def directory(tmp_path):
    """A directory for a run, with the bundled tokenizer: no package is needed to make one."""
    (tmp_path / "run").mkdir()
    shutil.copy(BUNDLED / "tokenizer.tiktoken", tmp_path / "run")
    return tmp_path


def train(directory, *more):
    places = ["--out", str(directory / "run"), "--weights", str(directory / "w")]
    pretrain.main([*SMALL, *places, *more])
    return torch.load(directory / "run" / "resume.pt", weights_only=True)


def test_the_batch_of_a_step_depends_on_seed_and_step_only(tokenizer):
    """Catches text that depends on what was drawn before: a resumed run would read other text."""
    settings = pretrain.Settings(rows=2)
    make = pretrain_gpt2.batch_of_step
    whole = pretrain.Batches(make, tokenizer, settings, range(9))
    late = pretrain.Batches(make, tokenizer, settings, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole[6], late[1], strict=True))
    assert not torch.equal(whole[6][0], whole[7][0])
    other = pretrain.Batches(make, tokenizer, pretrain.Settings(rows=2, seed=1), range(9))
    assert not torch.equal(whole[6][0], other[6][0])


def test_documents_are_packed_whole_and_leave_little_room():
    """Catches prose cut off from its sheet, which teaches guessing, and rows full of padding."""
    rng = random.Random(2)
    documents = [[n] * rng.randint(30, 110) for n in range(40)]
    bins = pretrain_gpt2.pack(documents, 8, 193)
    placed = [item for items in bins for item in items]
    assert all(item in documents for item in placed)
    assert len({item[0] for item in placed}) == len(placed)
    lengths = [sum(map(len, items)) for items in bins]
    assert max(lengths) <= 193 and sum(lengths) > 0.9 * 8 * 193


def test_first_mentions_and_padding_are_not_learned(tokenizer):
    """Catches a loss on made-up names, which is noise, or on the empty end of a row."""
    ids, labels = pretrain_gpt2.batch_of_step(tokenizer, pretrain.Settings(rows=16), 0)
    learned = labels != -100
    assert torch.equal(labels[learned], ids[learned])
    rows = [list(zip(row.tolist(), mask.tolist(), strict=True)) for row, mask in zip(ids, learned)]
    rng, found = random.Random("text 0 0"), 0       # the documents of that batch, one by one
    for _ in range(40):
        tokens, roles = encode(document(rng), tokenizer)
        here = [(token, role != FIRST) for token, role in zip(tokens, roles, strict=True)]
        found += any(row[n:n + len(here)] == here for row in rows for n in range(len(row)))
    assert found >= 32          # of 40; a few may have found no room


def test_muon_makes_every_direction_equally_long():
    """Catches an update that is the plain gradient, or that mixes queries, keys and values."""
    torch.manual_seed(0)
    for count, rows, columns in ((3, 16, 16), (1, 16, 16), (1, 16, 64), (1, 64, 16)):   # 3: c_attn
        u, _, vh = torch.linalg.svd(torch.randn(count, rows, columns), full_matrices=False)
        lengths = torch.logspace(0, -1.5, 16) * torch.tensor([1, 9, 99])[:count, None]  # (N, 16)
        weight = torch.nn.Parameter(torch.zeros(count * rows, columns))
        weight.grad = (u * lengths[:, None] @ vh).flatten(0, 1)
        muon.Muon([weight], lr=1.0).step()
        update = -weight.detach().unflatten(0, (count, rows)) / max(1, rows / columns) ** 0.5
        along = (u.transpose(1, 2) @ update @ vh.transpose(1, 2)).diagonal(dim1=1, dim2=2)
        # What five steps of this iteration make of lengths between 0.03 and 1.
        assert 0.5 < along.min() and along.max() < 1.3


def test_muon_takes_the_same_step_with_matrices_of_one_shape_as_with_each_alone():
    """Catches lengths that are taken over several matrices, a matrix that gets another's step."""
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 64), (16, 16), (64, 16), (48, 16)]
    first = [torch.randn(shape) for shape in shapes]
    grads = [torch.randn(shape) * 10.0 ** n for n, shape in enumerate(shapes)]
    together = [torch.nn.Parameter(weight.clone()) for weight in first]
    alone = [torch.nn.Parameter(weight.clone()) for weight in first]
    optimizers = [muon.Muon(together, 0.1), *(muon.Muon([w], 0.1) for w in alone)]
    for _ in range(2):
        for weights in (together, alone):
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(together, alone, first, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, start, atol=0.01)


def test_the_learning_rate_rises_then_falls_to_nothing():
    """Catches a schedule that ends high: the last steps are what makes the copies exact."""
    rates = [pretrain.schedule(step, 100, 10) for step in range(100)]
    assert rates[9] == 1.0 == max(rates) and rates[0] == 0.1
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(directory):
    """Catches state that is not saved: the moments, the place in the text, the learning rate."""
    shutil.copytree(directory / "run", directory / "stopped" / "run")
    whole = train(directory)
    assert train(directory / "stopped", "--stop-at", "2")["step"] == 2
    state = (directory / "stopped" / "run" / "resume.pt").read_bytes()
    train(directory / "stopped", "--resume", "--stop-at", "4")
    assert not (directory / "stopped" / "w").exists()
    (directory / "stopped" / "run" / "resume.pt").write_bytes(state)    # step 4 was never saved
    again = train(directory / "stopped", "--resume")
    assert again["step"] == whole["step"] == 6
    for name, weight in whole["model"].items():
        assert torch.equal(weight, again["model"][name]), name
    logs = [(path / "run" / "log.jsonl").read_text("utf-8").splitlines()[1:]
            for path in (directory, directory / "stopped")]
    lines = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [2, 4, 6]


def test_the_finished_model_is_read_back_by_the_core(directory):
    """Catches a finished directory that train.py cannot open, or one without its history."""
    state = train(directory)
    model = load(directory / "w")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["model"][name].half().float()), name
    assert load_tokenizer(directory / "w").vocab_size == model.config.vocab_size == 1280
    assert len((directory / "w" / "pretrain_log.jsonl").read_text("utf-8").splitlines()) == 4


def test_a_run_is_not_mixed_with_another(directory):
    """Catches a second run in the same directory, and a resumed run with another recipe."""
    with pytest.raises(ValueError, match="expected .*resume.pt of a run that was begun"):
        train(directory, "--resume")
    train(directory)
    with pytest.raises(ValueError, match="which holds a run"):
        train(directory)
    with pytest.raises(ValueError, match="--lr 0.002"):
        train(directory, "--resume", "--lr", "1")
    with open(directory / "run" / "tokenizer.tiktoken", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="resumed .*the vocabulary beside it is another than it"):
        train(directory, "--resume")
    with pytest.raises(ValueError, match="got --width 0; expected a number from 1"):
        train(directory / "new", "--width", "0")
    with pytest.raises(ValueError, match="got a model of .* parameters.* memory; give a smaller"):
        train(directory / "new", "--width", "9600", "--layers", "1000")
    with pytest.raises(ValueError, match="steps of 10000 x 100000 tokens.*--rows or --context"):
        train(directory / "new", "--rows", "10000", "--context", "100000")
    with pytest.raises(ValueError, match="got --width .* and --heads 7; expected a width"):
        train(directory / "new", "--heads", "7")


def test_what_the_world_does_not_fit_into_is_refused(directory):
    """Catches steps without a token to learn, whose loss is NaN; an error after hours, at the first
    probe; an index beyond the words, of another vocabulary.
    """
    for flags, words in ((["--context", "60"], "got --context 60, into which the world's texts do"),
                         (["--vocabulary", "300"], "a vocabulary of 1280 tokens; expected 300")):
        with pytest.raises(ValueError, match=words):
            train(directory, *flags)
    assert not (directory / "run" / "log.jsonl").exists()


def test_somebody_elses_log_is_left_alone(directory):
    """Catches a file that is deleted because of its name; but also a run that was killed before its
    first saving, and that cannot be begun again.
    """
    log = directory / "run" / "log.jsonl"
    log.write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match="has a log.jsonl of something else"):
        train(directory)
    assert log.read_text() == '{"mine": 1}\n'
    log.unlink()
    lines = train(directory)["step"]
    (directory / "run" / "resume.pt").unlink()
    assert train(directory)["step"] == lines and log.read_text().count("\n") == 4


def test_the_run_of_another_program_is_not_gone_on_with(directory):
    """Catches "KeyError: 'settings'", which nobody expected."""
    run_directory.save_state(core.Settings(out=str(directory / "run")), {"step": 1})
    with pytest.raises(ValueError, match="which cannot be resumed .*it is of a run with --"):
        train(directory, "--resume")
    torch.save({"step": 1}, directory / "run" / "resume.pt")
    with pytest.raises(ValueError, match="which cannot be resumed .*expected what this program"):
        train(directory, "--resume")


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_signal_saves_and_is_the_status(directory, processes):
    """Catches hours of steps that are lost, status 0, processes that go on alone."""
    flags = [*SMALL, "--tokens", "100000000", "--save-every", "1000000", "--processes", processes,
             "--out", str(directory / "run"), "--weights", str(directory / "w")]
    run = subprocess.Popen([sys.executable, "-m", "scripts.pretrain", *flags], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log, deadline = directory / "run" / "log.jsonl", time.monotonic() + 100
    while not (log.exists() and '"step"' in log.read_text()):
        assert time.monotonic() < deadline and run.poll() is None, "the run never started"
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    step = torch.load(directory / "run" / "resume.pt", weights_only=True)["step"]
    assert run.returncode == 143 and out.rstrip().endswith("--resume") and not (
        directory / "w").exists()
    assert json.loads(log.read_text().splitlines()[-1])["step"] == step
    if processes == "1":
        pretrain.main([*flags, "--resume", "--stop-at", str(step + 1)])
        state = torch.load(directory / "run" / "resume.pt", weights_only=True)
        assert state["step"] == step + 1


@pytest.mark.parametrize("rate, words", [("inf", "got --matrix-lr inf; expected"),
                                         ("1e6", "got a loss of .* by step .*lower --lr")])
def test_a_pre_training_that_runs_away_leaves_the_model_alone(directory, rate, words):
    """Catches NaN written over the bundled weights."""
    save(pretrain.new_model(pretrain.Settings(width=8, layers=1, heads=1)), directory / "w")
    before = (directory / "w" / "model.pt").read_bytes()
    with pytest.raises(ValueError, match=words):
        train(directory, "--lr", "1e6", "--matrix-lr", rate)
    assert (directory / "w" / "model.pt").read_bytes() == before


def test_a_step_that_runs_away_is_not_saved(directory, monkeypatch):
    """Catches a look at the loss alone, which is that before the last update."""
    train_step = pretrain.train_step

    def runaway(model, *given):
        mean = train_step(model, *given)
        model.wte.weight.data *= 1e38           # finite, but its logits are not
        return mean
    monkeypatch.setattr(pretrain, "train_step", runaway)
    with pytest.raises(ValueError, match="got a loss of .* by step 1 .*lower --lr"):
        train(directory, "--stop-at", "1")
    assert not (directory / "run" / "resume.pt").exists()
    assert (directory / "run" / "log.jsonl").read_text().count("\n") == 1


def test_weights_that_are_none_replace_nothing(directory):
    """Catches: the tokenizer and the log of a good model replaced before its weights are refused;
    1e5 is a number in 32 bits, and none in 16.
    """
    train(directory)
    before = {path: path.read_bytes() for path in (directory / "w").iterdir()}
    settings = pretrain.Settings(width=8, layers=1, heads=1, out=str(directory / "run"),
                                 weights=str(directory / "w"))
    model = pretrain.new_model(settings)
    model.h[0].mlp.c_fc.bias.data[3] = 1e5
    for name in ("tokenizer.tiktoken", "log.jsonl"):
        (directory / "run" / name).write_text("other")
    with pytest.raises(ValueError, match="with NaN or infinity in h.0.mlp.c_fc.bias"):
        pretrain.finish(model, settings)
    assert before == {path: path.read_bytes() for path in (directory / "w").iterdir()}


def test_the_bundled_model_is_small_and_copies_names_it_never_read(tokenizer):
    """Catches weights of another tokenizer or another world, or too large to be bundled."""
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 8_000_000
    model = load(BUNDLED)
    assert tokenizer.vocab_size == model.config.vocab_size == tokenizer.eos_token_id + 1
    found = pretrain_gpt2.probe(model, tokenizer, count=16)
    # The last line of pretrain_log.jsonl has these numbers for 64 texts; guessing copies nothing.
    assert found["copied"] > 0.95 and found["prose"] < 0.6
