"""Llama: the prefix in front of grouped, rotated keys; and what every model here has to do."""
import pytest
import torch
from conftest import random_llama

from model import KVCache
from prefix import Prefix

EXACT = 1e-6        # angles are computed in fp32, as transformers does


@pytest.fixture
def model():
    return random_llama()


def some_prefix(P=5, rows=1):
    torch.manual_seed(7)
    return torch.randn(3, 2, rows, 2, P, 4, dtype=torch.float64)                # (L, 2, B, G, P, D)


def test_the_prefix_has_the_few_heads(model):
    """Would catch: the query heads taken for the prefix's shape, as peft had it for a while."""
    prefix = Prefix.for_model(model, 5, mid_dim=16)
    assert prefix().shape == (3, 2, 1, 2, 5, 4)
    assert prefix.table.shape == (5, 20)                    # P' is as wide as the model


def test_a_prefix_made_of_words_is_those_words(model):
    """Would catch: text that does not start at position P, a prefix key that is rotated again."""
    words, text = [5, 200, 31, 7], torch.randint(257, (3, 11))
    prompt = torch.cat((torch.tensor([words] * 3), text), 1)
    hard = model.hidden_states(prompt)[:, len(words):]
    soft = model.hidden_states(text, model.prefix_from_tokens(words))
    assert (hard - soft).abs().max() < EXACT


def test_length_zero_is_the_frozen_model(model):
    """Would catch: positions or a mask that change when a prefix is merely possible."""
    ids = torch.randint(257, (2, 9))
    assert torch.equal(model.hidden_states(ids), model.hidden_states(ids, model.empty_prefix()))


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_invisible(model, left):
    """Would catch: padding that is seen, or that turns the keys of the text further."""
    prefix, texts = some_prefix(), [torch.randint(257, (n,)) for n in (9, 4, 1)]
    ids, mask = torch.randint(257, (3, 9)), torch.zeros(3, 9, dtype=torch.bool)     # noise
    places = [slice(9 - len(t), 9) if left else slice(0, len(t)) for t in texts]
    for row, (text, place) in enumerate(zip(texts, places)):
        ids[row, place], mask[row, place] = text, True
    padded = model.hidden_states(ids, prefix, torch.cat((torch.ones(3, 5) > 0, mask), 1))
    for row, (text, place) in enumerate(zip(texts, places)):
        alone = model.hidden_states(text[None], prefix)[0]
        assert (padded[row, place] - alone).abs().max() < EXACT


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7, 8), (4,)])
def test_reading_in_pieces_is_reading_at_once(model, cuts):
    """Would catch: keys in the cache before their rotation, or repeated for every query head."""
    ids, prefix = torch.randint(257, (2, 9)), some_prefix()
    cache, start, pieces = KVCache(prefix, 2, 9), 0, []
    assert cache.kv.shape == (3, 2, 2, 2, 14, 4)                        # (L, 2, B, G, P+S, D)
    for end in (*cuts, 9):
        pieces.append(model.hidden_states(ids[:, start:end], cache=cache))
        start = end
    whole = model.hidden_states(ids, prefix)
    assert (torch.cat(pieces, 1) - whole).abs().max() < EXACT


@pytest.mark.parametrize("wrong", [dict(heads=6, kv_heads=4), dict(head_dim=5)])
def test_impossible_heads_are_refused(wrong):
    """Would catch: a reshape that mixes heads, or an error deep in the first layer."""
    with pytest.raises(ValueError, match="got .* heads of size .*correct the model's config.json"):
        random_llama(**wrong)
