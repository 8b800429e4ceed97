"""Decoding a Llama is `generate` of the transformers library: the same tokens from its weights.

Random weights in fp32, ragged prompts. The end is made likely enough that texts reach it.
"""
import pytest
import torch
from llama_cases import in_ours, their_llama

from decoding.beam import beam_search
from decoding.constraints import Constraints
from decoding.state import DecodingState
from sample import generate

transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers")
from test_generate import EOS, MAX_NEW, OPTIONS, V, their_texts  # noqa: E402

HEADS = {"6 over 2": (6, 2), "4 over 4": (4, 4), "4 over 1": (4, 1)}
ENDS = (EOS, 5, 44)


@pytest.fixture
def prompts():
    torch.manual_seed(4)
    return [torch.randint(2, V, (n,)).tolist() for n in (7, 1, 12, 4)]


def both(heads, seed, ends=(EOS,)):
    """The same random weights in their Llama and in ours; its ends are likely."""
    heads, kv_heads = heads
    theirs = their_llama(seed, vocab_size=V, hidden_size=24, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=6, num_hidden_layers=2)
    theirs.lm_head.weight.data[list(ends)] *= 1.8       # then they are the likeliest now and then
    return theirs, in_ours(theirs)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_greedy_decoding_of_a_llama_is_theirs(prompts, heads, option):
    """Would catch: a cached key that is rotated again, padding in front that turns the text."""
    theirs_options, our_options = OPTIONS[option]
    for seed in (0, 1):
        theirs, ours = both(heads, seed)
        texts = generate(ours, prompts, Constraints(EOS, MAX_NEW, **our_options))
        assert texts == their_texts(theirs, prompts, **theirs_options)
        assert option != "free" or len({len(text) for text in texts}) > 1


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_beam_search_of_a_llama_is_theirs(prompts, heads):
    """Would catch: a beam whose position is that of its column, heads repeated in the cache."""
    ended = 0
    for seed in (0, 1):
        theirs, ours = both(heads, seed)
        expected = their_texts(theirs, prompts, num_beams=4)
        state = DecodingState(ours, prompts, None, MAX_NEW, 4)
        texts = [row for row, _ in beam_search(state, Constraints(EOS, MAX_NEW), 4)]
        assert texts == expected
        ended += sum(len(row) < MAX_NEW - 1 for row in texts)
    assert ended


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_text_ends_at_any_of_several_ends(prompts, num_beams):
    """As of chat models, which have an end of a turn too. Would catch: a text that goes on behind
    an end that was not learned, an end that is left in it or comes before min_new_tokens.
    """
    used = set()
    for seed, least in ((0, 0), (1, 0), (2, 5)):
        theirs, ours = both((6, 2), seed, ENDS)
        T = max(map(len, prompts))
        ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])           # (B, T)
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
        rows = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW,
                               min_new_tokens=least, num_beams=num_beams,
                               eos_token_id=list(ENDS))[:, T:].tolist()
        stops = [next((i for i, t in enumerate(row) if t in ENDS), len(row)) for row in rows]
        used |= {row[stop] for row, stop in zip(rows, stops) if stop < len(row)}
        rules = Constraints(EOS, MAX_NEW, least, more_ends=ENDS[1:])
        texts = generate(ours, prompts, rules)
        if num_beams > 1:
            state = DecodingState(ours, prompts, None, MAX_NEW, num_beams)
            texts = [row for row, _ in beam_search(state, rules, num_beams)]
        assert texts == [row[:stop] for row, stop in zip(rows, stops)]
    assert len(used) > 1
