"""What no way of decoding may say, and where a text has to be able to end."""
import itertools
import shutil

import pytest
import torch
from conftest import ROOT, random_bart, random_gpt2, random_llama

import sample
import train
from data.tokenizer import load_tokenizer
from decoding.beam import beam_search
from decoding.constraints import Constraints, constraints_of
from decoding.state import DecodingState
from pretrained.checkpoint import save
from sample import generate, sample_token

EOS = 256
WAYS = {"greedy": {}, "sampled": {"temperature": 1.5}, "beams": {"num_beams": 3}}


def every_way(model, prompts, constraints, prefix=None):
    """The texts of greedy, sampled and beam decoding."""
    yield generate(model, prompts, constraints, prefix)
    draws = torch.Generator().manual_seed(1)
    yield generate(model, prompts, constraints, prefix,
                   lambda logits: sample_token(logits, 1.5, generator=draws))
    state = DecodingState(model, prompts, prefix, constraints.max_new_tokens, 3)
    yield [row for row, _ in beam_search(state, constraints, 3)]


# ---- the vocabulary

def resized(architecture, directory, request):
    """A model on disk with 7 rows more than its vocabulary has tokens, all of them very likely."""
    pytest.importorskip(architecture, reason=f"there is no {architecture}/ here")
    if architecture == "llama":
        model = random_llama(259 + 7)
        model.generation_config = {"eos_token_id": 1}
        request.getfixturevalue("bytes_tokenizer").save(str(directory / "tokenizer.json"))
    else:
        model = random_gpt2(257 + 7) if architecture == "model" else random_bart(262 + 7)
        name = "model_directory" if architecture == "model" else "bart_directory"
        shutil.copytree(request.getfixturevalue(name), directory, dirs_exist_ok=True)
    model.word_embedding.weight.data[-7:] *= 4
    if model.architecture == "llama" and model.lm_head is not None:
        model.lm_head.weight.data[-7:] *= 4
    save(model.float(), directory)
    return str(directory)


@pytest.mark.parametrize("architecture", ["model", "bart", "llama"])
def test_no_token_is_said_that_the_vocabulary_does_not_have(tmp_path, architecture, request):
    """Would catch: a KeyError after everything is decoded, or tokens that are dropped in silence.
    """
    directory = resized(architecture, tmp_path, request)
    for way, flags in WAYS.items():
        generator = sample.Generator(sample.Settings(model=directory, device="cpu",
                                                     max_new_tokens=25, **flags))
        model, known = generator.model, set(generator.tokenizer.ids)
        prompts = [generator.prompt(text, model.empty_prefix()) for text in ("Hello", "a b c")]
        free = list(every_way(model, prompts, Constraints(generator.constraints.eos_token_id, 25)))
        assert any(set(row) - known for rows in free for row in rows), "nothing was to be banned"
        for rows in every_way(model, prompts, generator.constraints):
            assert not set(itertools.chain(*rows)) - known, way
        assert all(isinstance(text, str) for text in generator.generate(["Hello", "a b c"]))


def test_a_run_of_a_resized_model_is_shown_at_its_end(tmp_path, request, capsys):
    """Would catch: a KeyError when the training is done."""
    directory = resized("model", tmp_path, request)
    (tmp_path / "my.jsonl").write_text('{"source": "a", "target": "b"}\n'
                                       '{"source": "c", "target": "d"}\n')
    train.main(["--model", directory, "--data", str(tmp_path / "my.jsonl"), "--steps", "1",
                "--device", "cpu", "--mid-dim", "0", "--out", str(tmp_path / "run")])
    assert "decode with:" in capsys.readouterr().out


def test_what_fills_a_gap_in_barts_numbers_is_not_said(bart_directory, tmp_path):
    """Would catch: "madeupword0000", which no text has, said and then left out; <s> forbidden."""
    pytest.importorskip("bart", reason="there is no bart/ here")
    shutil.copytree(bart_directory, tmp_path / "bart")
    with open(tmp_path / "bart" / "dict.txt", "a") as file:
        file.write("madeupword0000 0\n")
    model, tokenizer = random_bart(263), load_tokenizer(tmp_path / "bart")
    assert constraints_of(model, tokenizer).banned_tokens == (261,)
    assert constraints_of(model, tokenizer, ["A"]).banned_tokens == (*tokenizer.encode("A"), 261)


# ---- the end

@pytest.mark.parametrize("n", [1, 2])
def test_the_end_is_no_repetition(n):
    """A prompt ends as its text does: a blank and <|endoftext|>. Would catch: texts that ramble up
    to the last token, because the end would be the prompt's again.
    """
    tokenizer = load_tokenizer(ROOT / "weights" / "tiny-gpt2")
    prompt, target = tokenizer.source_ids("name : Rudibis"), tokenizer.target_ids("It is a bridge.")
    scores = torch.zeros(1, tokenizer.vocab_size)
    rules = Constraints(tokenizer.eos_token_id, 100, no_repeat_ngram_size=n, more_ends=(3,))
    rules.apply(scores, len(target) - 1, [[3, 220, 3, *prompt, *target[:-1]]])
    assert not scores[0, [tokenizer.eos_token_id, 3]].any()
    assert scores[0, prompt[0]] == (float("-inf") if n == 1 else 0)


def test_where_nothing_is_left_the_text_ends():
    """17 tokens, 12 of them in the source, and at least 9 asked for. Would catch: a forbidden token
    said for ever, or beams that lose what they have said.
    """
    model, prompts = random_gpt2(vocab_size=17), [list(range(i, i + 12)) for i in range(4)]
    rules = Constraints(16, 12, 9, no_repeat_ngram_size=1)
    greedy, *others = every_way(model, prompts, rules)
    for rows in (greedy, *others):
        for prompt, row in zip(prompts, rows):
            assert sorted(prompt + row) == list(range(16))
    for prompt, row in zip(prompts, greedy):
        state = DecodingState(model, [prompt], None, 12, 1)
        assert [text for text, _ in beam_search(state, rules, 1)] == [row]


def test_beams_go_on_beside_many_ends():
    """Would catch: every continuation an end, so that fewer beams are left than there were."""
    model, ends = random_gpt2(), (7, 8, 9, 11)
    model.wte.weight.data[[EOS, *ends]] += 20 * model.ln_f.bias / model.ln_f.bias.norm()
    rules = Constraints(EOS, 12, 3, more_ends=ends)
    state = DecodingState(model, [[1, 2], [3]], None, 12, 2)
    for row, _ in beam_search(state, rules, 2, 1.0, "never"):
        assert len(row) >= 3 and not {EOS, *ends} & set(row)
    with pytest.raises(ValueError, match="got 50 beams and a .* of 257; expected at most 42"):
        beam_search(DecodingState(model, [[1]], None, 3, 50), rules, 50)


def test_the_makers_ends_end_a_text(model_directory):
    """Would catch: a list of ends of which one counts, or none where the tokenizer has its own."""
    model, tokenizer = random_gpt2(), load_tokenizer(model_directory)
    for theirs, ends in ((EOS, [EOS]), (9, [EOS, 9]), ([7, EOS, 9], [EOS, 7, 9])):
        assert constraints_of(model, tokenizer).ends() == [EOS]
        model.generation_config = {"eos_token_id": theirs}
        assert constraints_of(model, tokenizer).ends() == ends
        model.generation_config = {}
