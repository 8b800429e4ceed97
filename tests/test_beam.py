"""Beam search: the search itself, its tree of texts, and many prefixes in one batch."""
import itertools
import json

import pytest
import torch
from conftest import random_gpt2

import sample
from beam import Rules, search, seen_after
from prefix import save_prefix
from reader import GPT2Reader, stacked
from sample import generate

EOS = 256
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}     # sums of a few hundred terms of order 1


@pytest.fixture
def prompts():
    torch.manual_seed(4)
    return [torch.randint(256, (n,)).tolist() for n in (7, 1, 12, 4)]


@pytest.fixture
def prefixes():
    """One for each prompt, of different lengths; one is of length 0."""
    torch.manual_seed(5)
    return [torch.randn(3, 2, 1, 4, P, 6, dtype=torch.float64) for P in (5, 0, 11, 1)]


def log_p(model, prompt, said, prefix):
    """The log-probability of `said` after `prompt`, from one forward pass without a cache."""
    logits = model.head(model(torch.tensor([prompt + said]), prefix))[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(said))


def ending_often():
    """A model that ends its texts now and then: the end lies near the average hidden state."""
    model = random_gpt2(seed=1)
    model.wte.weight.data[EOS] += 4 * model.ln_f.bias / model.ln_f.bias.norm()
    return model


def test_beam_of_one_is_greedy(prompts, prefixes):
    """Would catch: a first step, an end or a rule that the two decoders take differently."""
    model, lengths = ending_often(), set()
    for rules in (Rules(EOS, 20), Rules(EOS, 20, 7), Rules(EOS, 9, first=5, last=EOS),
                  Rules(EOS, 20, banned=(200, 3), no_repeat=2)):
        greedy = generate(model, prompts, rules, prefixes)
        found = search(GPT2Reader(model, prompts, prefixes, rules.max_new), rules, 1)
        assert [row for row, _ in found] == greedy
        lengths |= {len(row) for row in greedy}
    assert len(lengths) > 3                                 # some ended by themselves


def test_with_beams_enough_the_likeliest_text_is_found(model, prompts):
    """All 84 texts of up to 3 of 5 tokens are tried. Would catch: a beam with another's past."""
    rules = Rules(4, max_new=3, banned=tuple(range(5, 257)))
    texts = [t for n in (1, 2, 3) for t in itertools.product(range(5), repeat=n)
             if 4 not in t[:-1] and (n == 3 or t[-1] == 4)]
    for prompt, penalty in itertools.product(prompts, (0.5, 1.0, 1.5)):
        worth = {t: log_p(model, prompt, list(t), None) / len(t) ** penalty for t in texts}
        best = max(worth, key=worth.get)
        (row, _), = search(GPT2Reader(model, [prompt], None, 3, 100), rules, 100, penalty, "sure")
        assert tuple(row) == tuple(t for t in best if t != 4)


@pytest.mark.parametrize("stop", ["full", "likely", "sure"])
def test_the_score_is_the_log_probability_of_what_was_said(prompts, prefixes, stop):
    """Forced tokens included. Would catch: a score after the rules, of the wrong beam or parent."""
    model = ending_often()
    for rules in (Rules(EOS, 12), Rules(EOS, 12, 4, (7, 8), 2), Rules(EOS, 6, first=9, last=EOS)):
        found = search(GPT2Reader(model, prompts, prefixes, rules.max_new, 4), rules, 4, 0.9, stop)
        for (said, score), prompt, prefix in zip(found, prompts, prefixes):
            ended = len(said) < rules.max_new
            whole = said + [EOS] * ended
            assert abs(score - log_p(model, prompt, whole, prefix)) < 1e-9   # float64, 12 tokens
            assert rules.first is None or said[0] == 9 and ended


def test_rules_hold_in_every_beam(prompts):
    """Would catch: a ban or a least length that only the best beam keeps."""
    model = ending_often()
    free = [row for row, _ in search(GPT2Reader(model, prompts, None, 15, 4), Rules(EOS, 15), 4)]
    used = {token for row in free for token in row}
    rules = Rules(EOS, 15, 6, tuple(used), 2)
    for (row, _), prompt in zip(search(GPT2Reader(model, prompts, None, 15, 4), rules, 4), prompts):
        assert not used & set(row) and len(row) >= 6
        pairs = list(zip(prompt + row, (prompt + row)[1:]))
        assert len(set(pairs[len(prompt) - 1:])) == len(row)
        assert not set(pairs[:len(prompt) - 1]) & set(pairs[len(prompt) - 1:])
    assert seen_after([1, 2, 3, 1, 2], 3) == {3} and seen_after([1, 2], 3) == set()
    assert seen_after([1, 2, 2], 1) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
def test_many_prefixes_in_one_batch_are_each_alone(prompts, prefixes, dtype):
    """Would catch: a gap in front of a short prefix that is looked at, or that shifts positions."""
    model = random_gpt2().to(dtype)
    prefixes = [p.to(dtype) for p in prefixes]
    together = GPT2Reader(model, prompts, prefixes, 8)
    alone = [GPT2Reader(model, [p], prefix, 8) for p, prefix in zip(prompts, prefixes)]
    for step in range(5):
        for row, one in enumerate(alone):
            difference = (together.logits[row] - one.logits[0]).abs().max()
            assert difference / one.logits.abs().max() < TOLERANCE[dtype]
        newest = together.logits.argmax(-1)[:, None]                            # (B, 1)
        together.logits = together.read(newest)[:, 0]
        for row, one in enumerate(alone):
            one.logits = one.read(newest[row:row + 1])[:, 0]


def test_beams_in_a_batch_are_each_alone(prompts, prefixes):
    """Would catch: a tree that mixes rows, a row that goes on after its neighbours have ended."""
    model = ending_often()
    for stop in ("full", "likely", "sure"):
        rules = Rules(EOS, 15)
        together = search(GPT2Reader(model, prompts, prefixes, 15, 5), rules, 5, 1.2, stop)
        for (said, score), prompt, prefix in zip(together, prompts, prefixes):
            (one, its), = search(GPT2Reader(model, [prompt], prefix, 15, 5), rules, 5, 1.2, stop)
            assert said == one and abs(score - its) < 1e-9                      # float64


def test_more_keys_than_positions_are_no_longer_text(prompts):
    """64 positions, but 5 beams of 30 tokens. Would catch: a limit on keys where it is on text."""
    model = random_gpt2()
    (row, _), = search(GPT2Reader(model, prompts[:1], None, 100, 5), Rules(EOS, 100, 100), 5)
    assert len(row) == 57                                   # 64 positions less the prompt of 7


def test_stacking_one_prefix_changes_nothing(prefixes):
    """Would catch: a copy of a shared prefix for every row."""
    same, real = stacked(prefixes[0], 4)
    assert same is prefixes[0] and real.shape == (4, 5) and real.all()


def test_too_many_beams_are_refused(prompts):
    """Would catch: an index error inside topk."""
    with pytest.raises(ValueError, match="got 200 beams and a vocabulary of 257; expected at most"):
        search(GPT2Reader(random_gpt2(), prompts, None, 5, 200), Rules(EOS, 5), 200)


# ---- the program

@pytest.fixture
def runs(tmp_path, model_directory):
    """Two runs of one model on disk, with prefixes of different lengths."""
    model, paths = sample.open_model(str(model_directory), "cpu", "fp32")[0], []
    for name, P in (("a", 4), ("b", 9)):
        torch.manual_seed(P)
        folder = tmp_path / name
        save_prefix(folder / "prefix.pt", torch.randn(3, 2, 1, 4, P, 6), model)
        told = {"settings": {"model": str(model_directory), "data": "e2e" if name == "a" else "x"}}
        (folder / "config.json").write_text(json.dumps(told))
        paths.append(str(folder))
    return paths


def test_each_request_is_answered_by_its_run(runs, tmp_path, capsys):
    """Would catch: the first run's prefix for all, or an answer in another's place."""
    sources = [f"n : {i}" for i in range(7)]
    names = [("a", "b")[i % 3 == 0] for i in range(7)]
    lines = [{"source": s, "run": name} for s, name in zip(sources, names)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--device", "cpu", "--max-new", "9", "--beam", "2"]
    output = tmp_path / "out.jsonl"
    sample.main(["--run", runs[0], "--run", runs[1], "--input", str(tmp_path / "in.jsonl"),
                 "--batch-size", "3", "--output", str(output), *options])
    capsys.readouterr()
    for line, source, name in zip(output.read_text().splitlines(), sources, names):
        sample.main(["--run", runs[name == "b"], source, *options])
        told = json.loads(line)
        assert told["text"] == capsys.readouterr().out.removesuffix("\n")
        assert told["source"] == source and told["run"] == runs[name == "b"]


def test_a_table_is_decoded_as_the_paper_does(runs):
    """Would catch: greedy decoding, or another length, where nothing else was asked for."""
    told = sample.resolve(sample.Settings(run=runs))
    assert (told.beam, told.min_new, told.max_new, told.length_penalty) == (5, 5, 100, 1.0)
    assert sample.resolve(sample.Settings(run=runs[1:])).beam == 1
    assert sample.resolve(sample.Settings(run=runs, temperature=0.7)).beam == 1
    assert sample.resolve(sample.Settings(run=runs, beam=3, min_new=0)).min_new == 0


@pytest.mark.parametrize("arguments, words", [
    (["--run", "A", "--run", "B", "x"], "got several --run and no --input"),
    (["--run", "A", "--run", "B", "--input", "in.txt"], "got --input in.txt and several --run"),
    (["--run", "A", "--run", "B", "--input", "no.jsonl"], "got the run None; expected one of"),
    (["--run", "A", "--input", "other.jsonl"], "got the run 'c'; expected one of"),
    (["--run", "A", "--run", "C", "--input", "in.jsonl"], "beside --run .*a; expected prefixes of "
                                                          "one model.*got .*prefix.pt, a prefix"),
    (["--run", "A", "x", "--beam", "3", "--temperature", "1"], "got --beam 3 and --temperature 1"),
    (["--run", "A", "x", "--attention", "fused"], "got --attention fused and 5 beams"),
    (["--run", "A", "x", "--beam", "0"], "got --beam 0; expected"),
])
def test_a_mistake_is_told_in_one_sentence(runs, arguments, words, tmp_path, monkeypatch):
    """Would catch: a traceback, or a prefix of another model put in front in silence."""
    monkeypatch.chdir(tmp_path)
    save_prefix(tmp_path / "c" / "prefix.pt", torch.randn(3, 2, 1, 4, 4, 6), random_gpt2(seed=9))
    (tmp_path / "in.txt").write_text("n : 1\n")
    (tmp_path / "no.jsonl").write_text('{"source": "x"}\n')
    (tmp_path / "in.jsonl").write_text('{"source": "x", "run": "a"}\n')
    (tmp_path / "other.jsonl").write_text('{"source": "x", "run": "c"}\n')
    names = {"A": runs[0], "B": runs[1], "C": str(tmp_path / "c")}
    with pytest.raises(ValueError, match=words):
        sample.main([*(names.get(a, a) for a in arguments), "--device", "cpu"])


def test_what_the_source_says_is_not_said_again_either():
    """Would catch: --no-repeat that looks at the answer only. 17 tokens, 12 of them in the source.
    """
    model, rules = random_gpt2(vocab_size=17), Rules(16, 4, no_repeat=1)
    prompts = [list(range(i, i + 12)) for i in range(4)]
    beams = [row for row, _ in search(GPT2Reader(model, prompts, None, 4, 3), rules, 3)]
    for rows in (generate(model, prompts, rules), beams):
        for prompt, row in zip(prompts, rows):
            assert len({*prompt, *row}) == len(prompt + row)
