"""Attention with a prefix, its mask, and GPT-2 around it."""
import math

import pytest
import torch
from conftest import random_gpt2
from torch.nn import functional as F

from model import GPT2, GPT2Config, KVCache, attend, attention_mask
from pretrained.checkpoint import fingerprint, load, save
from utils.files import read_json, write_json

EXACT = 1e-10       # float64 sums in another order: about 1e-15 of numbers of order 10


def tensors(B=3, H=2, T=5, S=5, P=4, D=6, prefixes=1):
    torch.manual_seed(1)
    shapes = ((B, H, T, D), (B, H, S, D), (B, H, S, D), (prefixes, H, P, D), (prefixes, H, P, D))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, S, P, prefixes", [(5, 5, 4, 1), (5, 5, 0, 1), (1, 9, 3, 1),
                                               (4, 7, 9, 3), (6, 6, 6, 1), (2, 2, 11, 3)])
def test_attention_with_a_prefix_is_attention_over_more_keys(T, S, P, prefixes, causal):
    """Would catch: a wrong scale, a triangle in the wrong corner, a gradient not summed."""
    ours = tensors(T=T, S=S, P=P, prefixes=prefixes)
    key_mask = torch.rand(3, P + S) < 0.7
    key_mask[:, 0] = True                                   # a first key for everybody
    out = attend(*ours, attention_mask(key_mask, T, causal))
    # A prefix of no positions is not touched, so it has no gradient: materialised, an empty one.
    grads = torch.autograd.grad(out.square().sum(), ours, materialize_grads=True)

    mask = torch.zeros(3, 1, T, P + S, dtype=torch.bool)
    for b in range(3):
        for t in range(T):
            for s in range(P + S):
                mask[b, 0, t, s] = key_mask[b, s] and (not causal or s <= P + S - T + t)
    q, k, v, pk, pv = theirs = tensors(T=T, S=S, P=P, prefixes=prefixes)
    k, v = (torch.cat((p.expand(3, -1, -1, -1), x), 2) for p, x in ((pk, k), (pv, v)))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (out - expected).abs().max() < EXACT
    for got, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), theirs)):
        assert torch.equal(torch.isnan(got), torch.isnan(wanted))
        assert got.numel() == 0 or (got - wanted).abs().max() < EXACT


def test_attention_is_a_mixture_of_prefix_and_text():
    """lam attend(q, prefix) + (1 - lam) attend(q, text), lam the softmax weight of the prefix.

    Would catch: prefix keys that meet another scale or another mask than the text's.
    """
    q, k, v, pk, pv = tensors()
    everything, none = torch.ones(3, 9, dtype=torch.bool), q.new_empty(3, 2, 0, 6)
    text = attend(q, k, v, none, none, attention_mask(everything[:, :5], 5, causal=True))
    prefix = attend(q, none, none, pk, pv, attention_mask(everything[:, :4], 5, causal=False))
    scores = q @ torch.cat((pk.expand(3, -1, -1, -1), k), 2).transpose(2, 3) / math.sqrt(6)
    mask = attention_mask(everything, 5, causal=True)
    scores = scores.masked_fill(~mask, -math.inf)
    lam = scores.softmax(-1)[..., :4].sum(-1, keepdim=True)
    whole = attend(q, k, v, pk, pv, mask)
    assert (whole - (lam * prefix + (1 - lam) * text)).abs().max() < EXACT


def test_a_key_that_is_hidden_stays_hidden_however_well_it_fits():
    """Scores of 1e5 in favour of the future. Would catch: a mask of -1e4, which they outweigh."""
    q, k, v, _, _ = tensors()
    none = q.new_empty(1, 2, 0, 6)
    k = torch.cat((k[:, :, :2], 1e5 * q[:, :, 1:2].expand(-1, -1, 3, -1)), 2)
    mask = attention_mask(torch.ones(1, 5, dtype=torch.bool), 5, causal=True)
    out = attend(q, k, v, none, none, mask)
    alone = attend(q[:, :, :2], k[:, :, :2], v[:, :, :2], none, none, mask[:, :, :2, :2])
    assert (out[:, :, :2] - alone).abs().max() < EXACT


def test_a_query_that_sees_no_key_gets_zero():
    """Would catch: 0/0 at a padded query, which turns every later number of its row into NaN."""
    ours = tensors(P=0)
    key_mask = torch.tensor([[0, 0, 1, 1, 1]] * 3, dtype=torch.bool)
    out = attend(*ours, attention_mask(key_mask, 5, causal=True))
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    for gradient in torch.autograd.grad(out.sum(), ours, materialize_grads=True):
        assert gradient.isfinite().all()


def test_length_zero_is_the_frozen_model(model):
    """Would catch: positions or a mask that change when a prefix is merely possible."""
    ids = torch.randint(257, (2, 9))
    plain, empty = model.hidden_states(ids), model.hidden_states(ids, model.empty_prefix())
    assert torch.equal(plain, empty)


def test_the_future_is_invisible(model):
    """Would catch: a triangle that stands too far to the right."""
    ids = torch.randint(257, (2, 9))
    changed = ids.clone()
    changed[:, 6:] = torch.randint(257, (2, 3))
    prefix = torch.randn(3, 2, 1, 4, 5, 6, dtype=torch.float64)
    before, after = model.hidden_states(ids, prefix), model.hidden_states(changed, prefix)
    assert (before[:, :6] - after[:, :6]).abs().max() < EXACT
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("P", [0, 5])
def test_padding_is_invisible(model, side, P):
    """Would catch: padding that is seen, or that shifts the positions of the text."""
    prefix = torch.randn(3, 2, 1, 4, P, 6, dtype=torch.float64)
    texts = [torch.randint(257, (n,)) for n in (9, 4, 1)]
    ids, mask = torch.randint(257, (3, 9)), torch.zeros(3, 9, dtype=torch.bool)   # noise
    columns = [slice(9 - len(t), 9) if side == "left" else slice(0, len(t)) for t in texts]
    for row, (text, own) in enumerate(zip(texts, columns)):
        ids[row, own], mask[row, own] = text, True
    key_mask = torch.cat((torch.ones(3, P, dtype=torch.bool), mask), 1)             # (B, P+S)
    padded = model.hidden_states(ids, prefix, key_mask)
    assert padded.isfinite().all()
    for row, (text, own) in enumerate(zip(texts, columns)):
        alone = model.hidden_states(text[None], prefix)[0]
        assert (padded[row, own] - alone).abs().max() < EXACT


def test_many_prefixes_in_one_batch_are_each_alone(model):
    """Would catch: a row that sees another's prefix, or whose text starts at its length."""
    lengths = (5, 2, 0)
    prefixes = [torch.randn(3, 2, 1, 4, P, 6, dtype=torch.float64) for P in lengths]
    together, key_mask = torch.randn(3, 2, 3, 4, 5, 6, dtype=torch.float64), torch.ones(3, 13) > 0
    for row, (prefix, P) in enumerate(zip(prefixes, lengths)):
        together[:, :, row, :, :P] = prefix[:, :, 0]
        key_mask[row, P:5] = False
    ids = torch.randint(257, (3, 8))
    whole = model.hidden_states(ids, together, key_mask)
    for row, prefix in enumerate(prefixes):
        alone = model.hidden_states(ids[row:row + 1], prefix)[0]
        assert (whole[row] - alone).abs().max() < EXACT


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7, 8), (4,), (8,)])
def test_reading_in_pieces_is_reading_at_once(model, cuts, joined):
    """The prefix in front of the cache, or joined to its beginning.

    Would catch: a cache that stores the wrong column, or queries at the wrong end of it; a prefix
    that counts twice.
    """
    ids, prefix = torch.randint(257, (2, 9)), torch.randn(3, 2, 1, 4, 5, 6, dtype=torch.float64)
    apart, cached = model.empty_prefix(), prefix
    if not joined:
        apart, cached = cached, apart
    cache, start, pieces = KVCache(cached, 2, 9), 0, []
    for end in (*cuts, 9):
        pieces.append(model.hidden_states(ids[:, start:end], apart, cache=cache))
        start = end
    assert (torch.cat(pieces, 1) - model.hidden_states(ids, prefix)).abs().max() < EXACT


@pytest.mark.parametrize("cached", [False, True])
def test_a_text_that_branches_is_each_of_its_branches(model, cached):
    """Two tokens side by side, each behind the same past, as beam search has them.

    Would catch: the second branch at the first one's position plus one, or in sight of it.
    """
    ids, prefix = torch.randint(257, (1, 6)), torch.randn(3, 2, 1, 4, 5, 6, dtype=torch.float64)
    tree = torch.ones(6, 6, dtype=torch.bool).tril()                            # (T, N)
    tree[5, 4] = False
    if cached:
        cache = KVCache(model.empty_prefix(), 1, 6)
        model.hidden_states(ids[:, :4], prefix, cache=cache)
        both = model.hidden_states(ids[:, 4:], prefix, cache=cache, tree=tree[None, 4:, 4:])
    else:
        both = model.hidden_states(ids, prefix, tree=tree[None])[:, 4:]         # (1, 2, C)
    for branch in range(2):
        text = torch.cat((ids[:, :4], ids[:, 4 + branch:5 + branch]), 1)
        alone = model.hidden_states(text, prefix)[0, -1]
        assert (both[0, branch] - alone).abs().max() < EXACT


def test_too_many_tokens_are_refused(model):
    """Would catch: an index error deep in an embedding, or, worse, positions that wrap around."""
    ids, prefix = torch.zeros(1, 61, dtype=torch.long), torch.zeros(3, 2, 1, 4, 4, 6).double()
    model.hidden_states(ids[:, :60], prefix)
    for apart, cached in ((prefix, model.empty_prefix()), (model.empty_prefix(), prefix)):
        with pytest.raises(ValueError, match="a prefix of 4 and 61 tokens; expected at most 64"):
            model.hidden_states(ids, apart, cache=KVCache(cached, 1, 61))
    with pytest.raises(ValueError, match="got token 4, but this cache holds 3"):
        model.hidden_states(ids[:, :4], cache=KVCache(prefix, 1, 3))
    with pytest.raises(ValueError, match="got width 10 and 3 heads"):
        GPT2(GPT2Config(n_embd=10, n_head=3))


def test_a_saved_model_comes_back_frozen_and_the_same(model, tmp_path):
    """Would catch: weights lost or rounded on the way, a model that comes back ready to learn."""
    save(model, tmp_path)
    again = load(tmp_path, dtype=torch.float64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    assert again.fingerprint == fingerprint(model)


def test_the_fingerprint_knows_every_number(model):
    """Would catch: a prefix accepted by a model that was trained on, however little."""
    before = fingerprint(model)
    assert fingerprint(random_gpt2()) == before
    model.h[1].mlp.c_proj.bias.data[3] += 1e-12
    assert fingerprint(model) != before


def test_the_fingerprint_knows_names_and_shapes():
    """Would catch: two models of other shapes under one name because their bytes agree."""
    one, two = torch.nn.Linear(2, 6, bias=False), torch.nn.Linear(6, 2, bias=False)
    two.weight.data = one.weight.data.reshape(2, 6).clone()
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "model.pt").unlink(), "no model.pt"),
    (lambda d: (d / "config.json").unlink(), "no config.json"),
    (lambda d: (d / "config.json").write_text("{"), "do not fit"),
    (lambda d: (d / "model.pt").write_bytes((d / "model.pt").read_bytes()[:5000]), "do not fit"),
    (lambda d: (d / "model.pt").write_bytes(b"hello"), "do not fit"),
    (lambda d: torch.save(random_gpt2(seed=1).state_dict(), d / "model.pt"), "other weights"),
    (lambda d: torch.save({1: 2}, d / "model.pt"), "do not fit"),
    (lambda d: rewrite(d, architecture="bert"), "do not fit.*bert"),
    (lambda d: rewrite(d, config={"n_layer": 2, "n_embd": 24, "n_head": 4}), "do not fit"),
])
def test_a_damaged_model_is_refused_in_one_sentence(model, tmp_path, damage, words):
    """Would catch: a traceback, or a model that loads with some of its weights missing."""
    save(model, tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)got .*{words}.*expected what .*convert.* writes"):
        load(tmp_path)


def rewrite(directory, **changes):
    write_json(directory / "config.json", read_json(directory / "config.json") | changes)
