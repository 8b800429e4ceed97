"""Beam search: the search itself, its tree of texts, and many prefixes in one batch."""
import itertools
import json

import pytest
import torch
from conftest import random_gpt2

import sample
from decoding.beam import beam_search
from decoding.constraints import Constraints, ngram_continuations
from decoding.state import DecodingState, stack_prefixes
from pretrained.load import load_model
from pretrained.run_directory import save_prefix
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


def log_p(model, prompt, text, prefix):
    """The log-probability of `text` after `prompt`, from one forward pass without a cache."""
    hidden = model.hidden_states(torch.tensor([prompt + text]), prefix)         # (1, T, C)
    logits = model.head(hidden)[0].log_softmax(-1)                              # (T, V)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(text))


def searched(model, prompts, prefix, constraints, num_beams, *options):
    """[(text, its log-probability)] of beam search, from the prompts on."""
    state = DecodingState(model, prompts, prefix, constraints.max_new_tokens, num_beams)
    return beam_search(state, constraints, num_beams, *options)


def ending_often():
    """A model that ends its texts now and then: the end lies near the average hidden state."""
    model = random_gpt2(seed=1)
    model.wte.weight.data[EOS] += 4 * model.ln_f.bias / model.ln_f.bias.norm()
    return model


def test_beam_of_one_is_greedy(prompts, prefixes):
    """Would catch: a first step, an end or a constraint that the two decoders take differently."""
    model, lengths = ending_often(), set()
    for constraints in (Constraints(EOS, 20), Constraints(EOS, 20, 7),
                        Constraints(EOS, 9, forced_bos_token_id=5, forced_eos_token_id=EOS),
                        Constraints(EOS, 20, banned_tokens=(200, 3), no_repeat_ngram_size=2)):
        greedy = generate(model, prompts, constraints, prefixes)
        assert [row for row, _ in searched(model, prompts, prefixes, constraints, 1)] == greedy
        lengths |= {len(row) for row in greedy}
    assert len(lengths) > 3                                 # some ended by themselves


def test_with_beams_enough_the_likeliest_text_is_found(model, prompts):
    """All 84 texts of up to 3 of 5 tokens are tried. Would catch: a beam with another's past."""
    constraints = Constraints(4, max_new_tokens=3, banned_tokens=tuple(range(5, 257)))
    texts = [t for n in (1, 2, 3) for t in itertools.product(range(5), repeat=n)
             if 4 not in t[:-1] and (n == 3 or t[-1] == 4)]
    for prompt, penalty in itertools.product(prompts, (0.5, 1.0, 1.5)):
        scores = {t: log_p(model, prompt, list(t), None) / len(t) ** penalty for t in texts}
        best = max(scores, key=scores.get)
        (row, _), = searched(model, [prompt], None, constraints, 100, penalty, "never")
        assert tuple(row) == tuple(t for t in best if t != 4)


@pytest.mark.parametrize("early_stopping", ["true", "false", "never"])
def test_the_score_is_the_log_probability_of_the_text(prompts, prefixes, early_stopping):
    """Forced tokens included. Would catch: a score with the constraints, of the wrong beam or
    parent.
    """
    model = ending_often()
    for constraints in (Constraints(EOS, 12), Constraints(EOS, 12, 4, (7, 8), 2),
                        Constraints(EOS, 6, forced_bos_token_id=9, forced_eos_token_id=EOS)):
        found = searched(model, prompts, prefixes, constraints, 4, 0.9, early_stopping)
        for (text, score), prompt, prefix in zip(found, prompts, prefixes):
            ended = len(text) < constraints.max_new_tokens
            whole = text + [EOS] * ended
            assert abs(score - log_p(model, prompt, whole, prefix)) < 1e-9   # float64, 12 tokens
            assert constraints.forced_bos_token_id is None or text[0] == 9 and ended


def test_constraints_hold_in_every_beam(prompts):
    """Would catch: a ban or a least length that only the best beam keeps."""
    model = ending_often()
    free = [row for row, _ in searched(model, prompts, None, Constraints(EOS, 15), 4)]
    used = {token for row in free for token in row}
    constraints = Constraints(EOS, 15, 6, tuple(used), 2)
    for (row, _), prompt in zip(searched(model, prompts, None, constraints, 4), prompts):
        assert not used & set(row) and len(row) >= 6
        pairs = list(zip(prompt + row, (prompt + row)[1:]))
        assert len(set(pairs[len(prompt) - 1:])) == len(row)
        assert not set(pairs[:len(prompt) - 1]) & set(pairs[len(prompt) - 1:])
    assert ngram_continuations([1, 2, 3, 1, 2], 3) == {3}
    assert ngram_continuations([1, 2], 3) == set()
    assert ngram_continuations([1, 2, 2], 1) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
def test_many_prefixes_in_one_batch_are_each_alone(prompts, prefixes, dtype):
    """Would catch: a gap in front of a short prefix that is seen, or that shifts positions."""
    model = random_gpt2().to(dtype)
    prefixes = [p.to(dtype) for p in prefixes]
    together = DecodingState(model, prompts, prefixes, 8)
    alone = [DecodingState(model, [p], prefix, 8) for p, prefix in zip(prompts, prefixes)]
    for _ in range(5):
        for row, one in enumerate(alone):
            difference = (together.logits[row] - one.logits[0]).abs().max()
            assert difference / one.logits.abs().max() < TOLERANCE[dtype]
        newest = together.logits.argmax(-1)[:, None]                            # (B, 1)
        together.logits = together.step(newest)[:, 0]
        for row, one in enumerate(alone):
            one.logits = one.step(newest[row:row + 1])[:, 0]


def test_beams_in_a_batch_are_each_alone(prompts, prefixes):
    """Would catch: a tree that mixes rows, a row that goes on after its neighbours have ended."""
    model = ending_often()
    for stop in ("true", "false", "never"):
        constraints = Constraints(EOS, 15)
        together = searched(model, prompts, prefixes, constraints, 5, 1.2, stop)
        for (text, score), prompt, prefix in zip(together, prompts, prefixes):
            (alone, its), = searched(model, [prompt], prefix, constraints, 5, 1.2, stop)
            assert text == alone and abs(score - its) < 1e-9                    # float64


def test_more_keys_than_positions_are_no_longer_text(prompts):
    """64 positions, but 5 beams of 30 tokens. Would catch: a limit on keys where it is on text."""
    (row, _), = searched(random_gpt2(), prompts[:1], None, Constraints(EOS, 100, 100), 5)
    assert len(row) == 57                                   # 64 positions less the prompt of 7


def test_stacking_one_prefix_changes_nothing(prefixes):
    """Would catch: a copy of a shared prefix for every row."""
    same, mask = stack_prefixes(prefixes[0], 4)
    assert same is prefixes[0] and mask.shape == (4, 5) and mask.all()


def test_too_many_beams_are_refused(prompts):
    """Would catch: an index error inside topk."""
    with pytest.raises(ValueError, match="got 200 beams and a vocabulary of 257; expected at most"):
        searched(random_gpt2(), prompts, None, Constraints(EOS, 5), 200)


# ---- the program

@pytest.fixture
def runs(tmp_path, model_directory):
    """Two runs of one model on disk, with prefixes of different lengths."""
    model, paths = load_model(str(model_directory), "cpu", "fp32")[0], []
    for name, P in (("a", 4), ("b", 9)):
        torch.manual_seed(P)
        folder = tmp_path / name
        save_prefix(folder / "prefix.pt", torch.randn(3, 2, 1, 4, P, 6), model)
        data = "e2e" if name == "a" else "x"
        (folder / "config.json").write_text(json.dumps({"settings": {
            "model": str(model_directory), "data": data}}))
        paths.append(str(folder))
    return paths


def test_each_request_is_answered_by_its_run(runs, tmp_path, capsys):
    """Would catch: the first run's prefix for all, or an answer in another's place."""
    sources = [f"n : {i}" for i in range(7)]
    names = [("a", "b")[i % 3 == 0] for i in range(7)]
    lines = [{"source": s, "run": name} for s, name in zip(sources, names)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--device", "cpu", "--max-new-tokens", "9", "--num-beams", "2"]
    output = tmp_path / "out.jsonl"
    sample.main(["--run", runs[0], "--run", runs[1], "--input", str(tmp_path / "in.jsonl"),
                 "--batch-size", "3", "--output", str(output), *options])
    capsys.readouterr()
    for line, source, name in zip(output.read_text().splitlines(), sources, names):
        sample.main(["--run", runs[name == "b"], source, *options])
        row = json.loads(line)
        assert row["text"] == capsys.readouterr().out.removesuffix("\n")
        assert row["source"] == source and row["run"] == runs[name == "b"]


def test_a_table_is_decoded_as_the_paper_does(runs):
    """Would catch: greedy decoding, or another length, where nothing else was asked for."""
    def resolved(**settings):
        return sample.resolve(sample.Settings(**settings))
    s = resolved(run=runs)
    assert (s.num_beams, s.min_new_tokens, s.max_new_tokens, s.length_penalty) == (5, 5, 100, 1.0)
    assert resolved(run=runs[1:]).num_beams == 1
    assert resolved(run=runs, temperature=0.7).num_beams == 1
    assert resolved(run=runs, num_beams=3, min_new_tokens=0).min_new_tokens == 0


@pytest.mark.parametrize("arguments, words", [
    (["--run", "A", "--run", "B", "x"], "got several --run and no --input"),
    (["--run", "A", "--run", "B", "--input", "in.txt"], "got --input in.txt and several --run"),
    (["--run", "A", "--run", "B", "--input", "no.jsonl"], "got the run None; expected one of"),
    (["--run", "A", "--input", "other.jsonl"], "got the run 'c'; expected one of"),
    (["--run", "A", "--run", "C", "--input", "in.jsonl"], "beside --run .*a; expected prefixes of "
                                                          "one model.*got .*prefix.pt, a prefix"),
    (["--run", "A", "x", "--num-beams", "3", "--temperature", "1"],
     "got --num-beams 3 and --temperature 1"),
    (["--run", "A", "x", "--beam", "0"], "got --num-beams 0; expected"),        # the short name
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


def test_what_the_source_says_is_not_repeated_either():
    """Would catch: --no-repeat-ngram-size of the answer only. 17 tokens, 12 of them in the source.
    """
    model, constraints = random_gpt2(vocab_size=17), Constraints(16, 4, no_repeat_ngram_size=1)
    prompts = [list(range(i, i + 12)) for i in range(4)]
    beams = [row for row, _ in searched(model, prompts, None, constraints, 3)]
    for rows in (generate(model, prompts, constraints), beams):
        for prompt, row in zip(prompts, rows):
            assert len({*prompt, *row}) == len(prompt + row)
