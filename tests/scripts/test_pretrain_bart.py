"""Pre-training of the tiny BART: what the noise does, what is learned, and a run in small."""
import random
import re
import shutil

import pytest
import torch
from conftest import ROOT

from data.tokenizer import load_tokenizer
from pretrained.checkpoint import load
from scripts import pretrain

pretrain_bart = pytest.importorskip("scripts.pretrain_bart", reason="there is no bart/ here")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory for a run, with the bundled GPT-2's tokenizer under BART's numbers."""
    folder = tmp_path_factory.mktemp("pretrain_bart")
    shutil.copy(ROOT / "weights" / "tiny-gpt2" / "tokenizer.tiktoken", folder)
    (folder / "dict.txt").write_text("".join(f"{n} 1\n" for n in range(1280)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


def some_texts(count, seed=1):
    rng = random.Random(seed)
    return [pretrain_bart.text_of_world(rng) for _ in range(count)]


def test_the_target_is_the_text_and_the_source_its_sentences_in_another_order(tokenizer):
    """Would catch: blanks lost between sentences, a word that changes sides, a text cut short."""
    rng, moved = random.Random(2), 0
    for text in some_texts(100):
        sentences = pretrain_bart.sentences_of(text, tokenizer)
        source, target, learn = pretrain_bart.corrupt(sentences, tokenizer, rng)
        plain = re.sub(r"[{}]", "", text)
        assert tokenizer.decode(target) == re.sub(r"\s+", " ", plain)
        assert target[0] == source[0] == tokenizer.bos_token_id and len(learn) == len(target)
        assert target[-1] == source[-1] == tokenizer.eos_token_id
        kept = [token for token in source if token != tokenizer.mask_token_id]
        there = list(target)
        for token in kept:                      # nothing is made up
            there.remove(token)
        left = iter(target)
        moved += not all(token in left for token in kept)       # are they in the target's order?
    assert moved > 60                           # most have several sentences


def test_thirty_percent_are_masked_in_spans_of_three():
    """BART's figures. Would catch: a mask for each token, which shows how many are missing."""
    rng = random.Random(3)
    kinds = [kind for _ in range(3000) for kind in pretrain_bart.noise_kinds(60, rng)]
    spans = sum(kind in (1, 2) for kind in kinds)
    hidden = sum(kind in (2, 3) for kind in kinds)
    assert hidden / len(kinds) == pytest.approx(0.3, abs=0.01)      # 180,000 tokens
    assert hidden / spans == pytest.approx(3, abs=0.2)              # a few are cut by the end
    assert sum(kind == 1 for kind in kinds) / spans == pytest.approx(0.05, abs=0.01)    # e ** -3
    counts = [pretrain_bart.poisson(3, rng) for _ in range(20_000)]
    mean = sum(counts) / len(counts)
    assert mean == pytest.approx(3, abs=0.05)
    assert sum((n - mean) ** 2 for n in counts) / len(counts) == pytest.approx(3, abs=0.2)


def test_a_value_is_learned_where_it_can_be_read_and_only_there(tokenizer):
    """Nobody can guess a masked name. Would catch: half of the loss spent on noise; copies that are
    not learned; a gist, masked as a whole, that is not learned from the sentences it repeats.
    """
    rng, left_out, found = random.Random(4), 0, 0
    for _ in range(200):
        sentences = pretrain_bart.sentences_of(pretrain_bart.report_with_gist(rng), tokenizer)
        source, target, learn = pretrain_bart.corrupt(sentences, tokenizer, rng)
        read, inside = tokenizer.decode(source), [pair for row in sentences for pair in row]
        before, value, begun = "", "", 0
        for at, (token, its) in enumerate(inside):
            assert token == target[at + 1] and (its or learn[at + 1])       # words always
            if its != value:
                before, value, begun = tokenizer.decode(target[:at + 1]), its, at
            hidden = token not in source
            if not learn[at + 1]:
                assert not re.search(rf"\b{re.escape(its)}\b", before)
                left_out += 1
            elif its and hidden:                # not this token, but in other letters or before
                assert re.search(rf"\b{re.escape(its)}\b", before + " " + read)
                found += at - begun == 0
    assert left_out > 200 and found > 20


def test_half_of_the_texts_have_a_sentence_that_is_masked_as_a_whole(tokenizer):
    """Would catch: a gist that is never written anew, a sentence that leaves no mask behind."""
    rng, whole, masks = random.Random(5), 0, 0
    sentences = [[(token, "")] * 50 for token in range(10, 15)]         # too long for one span
    for _ in range(400):
        source, target, learn = pretrain_bart.corrupt(sentences, tokenizer, rng)
        assert len(target) == 252 and all(learn)
        whole += len(set(source) - {0, 2, tokenizer.mask_token_id}) == 4
        masks += source.count(tokenizer.mask_token_id)
    assert whole / 400 == pytest.approx(0.5, abs=0.08)                  # 3 deviations
    assert masks / 400 == pytest.approx(0.1 * (250 - 25) + 0.5, rel=0.05)


def test_the_batch_of_a_step_depends_on_seed_and_step_only(tokenizer):
    """Would catch: a resumed run that reads other noise."""
    settings = pretrain.Settings(model="tiny-bart", rows=4)
    make = pretrain_bart.batch_of_step
    whole = pretrain.Batches(make, tokenizer, settings, range(4))
    late = pretrain.Batches(make, tokenizer, settings, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole[3], late[1], strict=True))
    ids, learn, source, source_mask = whole[0]
    assert (ids[:, 0] == tokenizer.eos_token_id).all() and not learn[:, 0].any()
    assert 0 <= (ids.ne(0).sum() + source_mask.sum()) - 4 * 192 < 2 * 192
    assert max(ids.size(1), source.size(1)) <= 192 and (learn.sum(1) > 0).all()


def test_reports_are_in_the_text_and_headlines_are_not():
    """Would catch: a frozen model that has seen the answers."""
    texts = [re.sub(r"[{}]", "", text) for text in some_texts(500)]
    assert not any(re.search(r", an? \w+: |\w; \w+ing ", text) for text in texts)
    assert sum("is what we know" in text for text in texts) > 5
    assert any("nothing to do with" in text for text in pretrain_bart.vocabulary_texts(50, 0))


def test_a_toy_run_learns_is_resumed_and_is_read_back_by_the_core(directory, tmp_path):
    """Would catch: a part of the encoder without an optimiser, a finished model without numbers."""
    small = ["--model", "tiny-bart", "--width", "16", "--layers", "1", "--heads", "2", "--rows",
             "2", "--warmup", "2", "--device", "cpu", "--probe-every", "2", "--save-every", "2",
             "--tokens", str(6 * 2 * 192)]
    states = []
    for name, calls in (("whole", [[]]), ("stopped", [["--stop-at", "2"], ["--resume"]])):
        (tmp_path / name).mkdir()
        shutil.copy(directory / "tokenizer.tiktoken", tmp_path / name)
        for more in calls:
            pretrain.main([*small, "--out", str(tmp_path / name), "--weights",
                           str(tmp_path / f"{name}-weights"), *more])
        states.append(torch.load(tmp_path / name / "resume.pt", weights_only=True)["model"])
    first = pretrain.new_model(pretrain.Settings(width=16, layers=1, heads=2),
                               pretrain_bart.empty_model).state_dict()
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]), name
        assert name == "final_logits_bias" or not torch.equal(weight, first[name]), name
    model = load(tmp_path / "whole-weights")
    assert load_tokenizer(tmp_path / "whole-weights").vocab_size == model.config.vocab_size == 1285
