"""BART and its three prefixes: what each reaches, what it leaves alone, how it is saved."""
import pytest
import torch
from conftest import random_bart, random_gpt2

from bart.model import BART, BARTConfig, EncodedSource, ThreePrefixes
from bart.prefix import PLACES, BARTPrefix
from model import ExplicitAttention, KVCache
from prefix import Prefix, summarize_parameters
from pretrained.checkpoint import load, save
from pretrained.run_directory import load_prefix, save_prefix

EXACT = 1e-10       # float64 sums in another order: about 1e-15 of numbers of order 10


def some_prefix(bart, encoder=3, decoder=4, cross=5, rows=1):
    torch.manual_seed(7)
    return ThreePrefixes(*(torch.randn(*like.shape[:2], rows, like.size(3), P, like.size(5),
                                       dtype=torch.float64)
                           for like, P in zip(bart.empty_prefix(), (encoder, decoder, cross))))


def fresh_prefix(bart, lengths, mid_dim=16):
    return BARTPrefix(bart.empty_prefix(), bart.width, lengths, mid_dim)


def texts(B=2, S=9, T=6):
    torch.manual_seed(8)
    return torch.randint(261, (B, S)), torch.randint(261, (B, T))


def logits(bart, source, target, prefix=None, source_mask=None):
    return bart.head(bart.hidden_states(target, source, source_mask, prefix))   # (B, T, V)


class WatchingAttention(ExplicitAttention):
    """Notes the prefixes of each attention, and which one it is: only the decoder's is causal."""

    def __init__(self):
        self.met, self.decoder_masks = [], []

    def mask(self, key_mask, T, causal, tree=None):
        mask = super().mask(key_mask, T, causal, tree)
        if causal:
            self.decoder_masks.append(mask)
        return mask

    def __call__(self, q, k, v, pk, pv, mask):
        where = ("decoder" if any(mask is own for own in self.decoder_masks)
                 else "encoder" if q.size(2) == k.size(2) else "cross")
        self.met.append((where, pk, pv))
        return super().__call__(q, k, v, pk, pv, mask)


@pytest.mark.parametrize("place", PLACES)
def test_each_prefix_reaches_exactly_its_own_attentions(bart, place):
    """Would catch: one prefix for two places, a place that is passed over, a layer off by one."""
    prefix = some_prefix(bart, **{p: 5 if p == place else 0 for p in PLACES})
    bart.attention = WatchingAttention()
    logits(bart, *texts(), prefix)
    met = bart.attention.met
    assert [where for where, _, _ in met] == ["encoder"] * 2 + ["decoder", "cross"] * 3
    own = [(pk, pv) for where, pk, pv in met if where == place]
    for layer, (pk, pv) in enumerate(own):
        assert torch.equal(pk, getattr(prefix, place)[layer, 0])
        assert torch.equal(pv, getattr(prefix, place)[layer, 1])
    assert all(pk.size(2) == 0 for where, pk, _ in met if where != place)


def test_only_the_encoders_prefix_changes_how_a_source_is_encoded(bart):
    """Would catch: a cross prefix that is baked into the encoded source, and so counted twice."""
    (source, target), plain = texts(), bart.encode(texts()[0])
    for place in PLACES:
        prefix = some_prefix(bart, **{p: 5 if p == place else 0 for p in PLACES})
        same = torch.equal(bart.encode(source, prefix=prefix).kv, plain.kv)
        assert same == (place != "encoder")
        difference = logits(bart, source, target, prefix) - logits(bart, source, target)
        assert difference.abs().max() > 0.01, f"{place} changes nothing"


def test_each_place_has_a_table_and_an_mlp_of_its_own(bart):
    """Would catch: one table for all. Encoder: 2 layers of 2 heads; decoder: 3 layers of 4."""
    prefix = fresh_prefix(bart, dict(encoder=3, decoder=4, cross=5), mid_dim=16)
    assert [tuple(part.shape) for part in prefix()] == [
        (2, 2, 1, 2, 3, 12), (3, 2, 1, 4, 4, 6), (3, 2, 1, 4, 5, 6)]
    tensors = [id(p) for place in PLACES for p in prefix[place].parameters()]
    assert len(set(tensors)) == len(tensors) == 3 * 5
    alone = fresh_prefix(bart, {"cross": 5}, mid_dim=16)
    assert [part.size(4) for part in alone()] == [0, 0, 5]
    assert {name.split(".")[0] for name, _ in alone.named_parameters()} == {"cross"}
    for wrong in ({}, {"middle": 3}):
        with pytest.raises(ValueError, match="expected one or more of encoder, decoder, cross"):
            fresh_prefix(bart, wrong)


def test_a_prefix_as_long_as_the_source_is_still_a_prefix(bart):
    """Three tokens of padding, which nobody sees, break the coincidence of the lengths.

    Would catch: cross keys taken for a cache of the source because there are as many of them.
    """
    source, target = texts(S=9, T=9)
    prefix = some_prefix(bart, 9, 9, 9)
    padded = torch.cat((source, source[:, :3]), 1)                              # (B, S+3)
    mask = torch.arange(12).expand(2, -1) < 9                                   # (B, S+3)
    same, other = logits(bart, source, target, prefix), logits(bart, padded, target, prefix, mask)
    assert (same - other).abs().max() < EXACT
    assert (same - logits(bart, source, target)).abs().max() > 0.01


def test_positions_are_not_shifted(bart):
    """What goes into the first layers is the same with a prefix. Would catch: GPT-2's rule here."""
    seen = []
    for stack in (bart.encoder, bart.decoder):
        stack.layernorm_embedding.register_forward_hook(lambda layer, args, out: seen.append(out))
    for prefix in (None, some_prefix(bart)):
        logits(bart, *texts(), prefix)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_padding_is_invisible(bart):
    """Would catch: a source that sees its padding, or a decoder that sees it."""
    prefix, target = some_prefix(bart), texts(B=3)[1]
    sources = [torch.randint(261, (n,)) for n in (9, 4, 1)]
    ids, mask = torch.randint(261, (3, 9)), torch.zeros(3, 9, dtype=torch.bool)     # noise
    for row, source in enumerate(sources):
        ids[row, :len(source)], mask[row, :len(source)] = source, True
    together = logits(bart, ids, target, prefix, mask)
    for row, source in enumerate(sources):
        alone = logits(bart, source[None], target[row:row + 1], prefix)[0]
        assert (together[row] - alone).abs().max() < EXACT


def test_a_row_of_prefixes_serves_each_its_own(bart):
    """Would catch: a batch that is read with the first row's prefix."""
    (source, target), prefix = texts(), some_prefix(bart, rows=2)
    together = logits(bart, source, target, prefix)
    for row in range(2):
        own = ThreePrefixes(*(part[:, :, row:row + 1] for part in prefix))
        alone = logits(bart, source[row:row + 1], target[row:row + 1], own)[0]
        assert (together[row] - alone).abs().max() < EXACT


def test_the_future_of_the_target_is_invisible_and_that_of_the_source_is_not(bart):
    """Would catch: a triangle in the encoder, or none in the decoder."""
    (source, target), prefix = texts(), some_prefix(bart)
    changed, later = target.clone(), source.clone()
    changed[:, 4:], later[:, 8:] = 3, 3
    before, after = logits(bart, source, target, prefix), logits(bart, source, changed, prefix)
    assert (before[:, :4] - after[:, :4]).abs().max() < EXACT
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 0.01
    assert (before - logits(bart, later, target, prefix))[:, 0].abs().max() > 0.01


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5), (4,)])
def test_reading_in_pieces_is_reading_at_once(bart, cuts):
    """The source is read once. Would catch: a cache that takes in the source, a wrong position."""
    (source, target), prefix = texts(), some_prefix(bart)
    encoded, start, pieces = bart.encode(source, prefix=prefix), 0, []
    cache = KVCache(bart.empty_prefix().decoder, 2, 6)
    for end in (*cuts, 6):
        pieces.append(bart.hidden_states(target[:, start:end], prefix=prefix, cache=cache,
                                         encoded=encoded))
        start = end
    whole = bart.hidden_states(target, prefix=prefix, encoded=encoded)
    assert (torch.cat(pieces, 1) - whole).abs().max() < EXACT


def test_a_prefix_in_the_cache_is_the_prefix(bart):
    """Would catch: keys of the decoder's prefix that are counted as tokens, or twice."""
    (source, target), prefix = texts(), some_prefix(bart)
    encoded, cache = bart.encode(source, prefix=prefix), KVCache(prefix.decoder, 2, 6)
    rest = prefix._replace(decoder=bart.empty_prefix().decoder)
    pieces = [bart.hidden_states(part, prefix=rest, cache=cache, encoded=encoded)
              for part in target.split(2, 1)]
    whole = bart.hidden_states(target, prefix=prefix, encoded=encoded)
    assert (torch.cat(pieces, 1) - whole).abs().max() < EXACT


def test_a_target_that_branches_is_each_of_its_branches(bart):
    """Two last tokens side by side, each behind the same past, as beam search has them.

    Would catch: the second branch at the first one's position plus one, or in sight of it.
    """
    (source, target), prefix = texts(B=1, T=4), some_prefix(bart)
    encoded, cache = bart.encode(source, prefix=prefix), KVCache(bart.empty_prefix().decoder, 1, 4)
    bart.hidden_states(target[:, :2], prefix=prefix, cache=cache, encoded=encoded)
    key_mask = torch.ones(1, prefix.decoder.size(4) + 4, dtype=torch.bool)      # (B, P+4)
    tree = torch.eye(2, dtype=torch.bool)[None]                                 # (B, T, 2)
    both = bart.hidden_states(target[:, 2:], prefix=prefix, key_mask=key_mask, cache=cache,
                              tree=tree, encoded=encoded)                       # (B, 2, C)
    for branch in range(2):
        ids = torch.cat((target[:, :2], target[:, 2 + branch:3 + branch]), 1)
        alone = bart.hidden_states(ids, prefix=prefix, encoded=encoded)[0, -1]
        assert (both[0, branch] - alone).abs().max() < EXACT


def test_length_zero_is_the_frozen_model(bart):
    """Would catch: a mask or positions that change when a prefix is merely possible."""
    assert torch.equal(logits(bart, *texts()), logits(bart, *texts(), bart.empty_prefix()))


@pytest.mark.parametrize("mid_dim", [16, 0])
def test_folding_changes_nothing(bart, mid_dim):
    """Would catch: a fold that loses the order of layers, heads, keys and values, or of places."""
    prefix = fresh_prefix(bart, dict(encoder=3, cross=5), mid_dim).double()
    assert torch.equal(logits(bart, *texts(), prefix()), logits(bart, *texts(), prefix.fold()))
    assert not any(part.requires_grad for part in prefix.fold())


def test_a_cross_prefix_made_of_words_is_a_source_that_begins_with_them(bart):
    """Would catch: keys of another layer, keys and values swapped, keys of the decoder's words."""
    (source, target), words = texts(), [5, 200, 31, 7]
    made, encoded = bart.prefix_from_tokens(words), bart.encode(source)
    first = bart.encode(torch.tensor([words])).kv.expand(-1, -1, 2, -1, -1, -1)
    longer = EncodedSource(torch.cat((first, encoded.kv), 4), torch.ones(2, 13, dtype=torch.bool))
    cross = bart.empty_prefix()._replace(cross=made.cross)
    assert (bart.hidden_states(target, encoded=longer)
            - bart.hidden_states(target, prefix=cross, encoded=encoded)).abs().max() < EXACT


def test_a_prefix_made_of_words_holds_what_the_frozen_model_computes_for_them(bart):
    """Would catch: a start from other tensors than the attention's own keys and values."""
    words = torch.tensor([[5, 200, 31, 7]])
    made, encoded = bart.prefix_from_tokens(words[0].tolist()), bart.encode(words)
    cache = KVCache(bart.empty_prefix().decoder, 1, 4)
    bart.hidden_states(words, cache=cache, encoded=encoded)
    assert (made.decoder - cache.kv).abs().max() < EXACT
    assert (made.cross - encoded.kv).abs().max() < EXACT
    attention = ExplicitAttention()
    mask = attention.mask(torch.ones(1, 4, dtype=torch.bool), 4, causal=False)
    x = bart.encoder.embed(bart.shared(words), torch.arange(4), 4)
    for layer, block in enumerate(bart.encoder.layers):
        k, v = block.self_attn.keys_and_values(x)
        assert (made.encoder[layer, 0] - k).abs().max() < EXACT
        assert (made.encoder[layer, 1] - v).abs().max() < EXACT
        nothing = k.new_empty(2, 1, 2, 0, 12)
        x = block(x, nothing, attention, mask)


def test_words_are_started_from_at_each_place(bart):
    """Would catch: all prefixes fitted to one place's words, or one of them left at random."""
    torch.manual_seed(0)
    words = bart.prefix_from_tokens([72, 101, 121])
    exact = fresh_prefix(bart, dict.fromkeys(PLACES, 3), mid_dim=0).double()
    assert exact.initialize(words) == 0
    for part, target in zip(exact(), words):
        assert (part - target).abs().max() < 1e-6       # the table was filled through fp32
    fitted = fresh_prefix(bart, dict.fromkeys(PLACES, 3), mid_dim=16)
    before = [(part - target).square().mean() for part, target in zip(fitted(), words)]
    fitted.initialize(words, steps=60, lr=3e-2)
    for part, target, old in zip(fitted(), words, before):
        assert (part - target).square().mean() < 0.05 * old


def test_prefixes_are_saved_and_come_back(bart, tmp_path):
    """Would catch: numbers lost on the way, places exchanged, an MLP that is shipped along."""
    folded = fresh_prefix(bart, dict(encoder=3, cross=5), mid_dim=16).fold()
    save_prefix(tmp_path / "prefix.pt", folded, bart)
    again = load_prefix(tmp_path / "prefix.pt", bart)
    for place in PLACES:
        assert torch.equal(getattr(again, place), getattr(folded, place).double())
    assert (tmp_path / "prefix.pt").stat().st_size < 4 * sum(p.numel() for p in folded) + 8192


def test_a_prefix_of_another_model_is_refused(bart, tmp_path):
    """Would catch: fluent nonsense, or a traceback where GPT-2's prefix meets BART."""
    one, three = tmp_path / "one.pt", tmp_path / "three.pt"
    gpt2 = random_gpt2()
    save_prefix(three, fresh_prefix(bart, {"cross": 5}, mid_dim=16).fold(), bart)
    save_prefix(one, Prefix.for_model(gpt2, 5, 16).fold(), gpt2)
    with pytest.raises(ValueError, match="'random BART 0', expected one for .*'random BART 1'"):
        load_prefix(three, random_bart(seed=1))
    for path, other, words in ((one, bart, "'random 0', expected one for .*'random BART 0'"),
                               (three, gpt2, "'random BART 0', expected one for .*'random 0'")):
        with pytest.raises(ValueError, match=f"{words}; load the one it was trained with"):
            load_prefix(path, other)
    fewer = random_bart(decoder_layers=2)
    fewer.fingerprint = bart.fingerprint
    with pytest.raises(ValueError, match=r"shape \(3, 2, 1, 4, 0, 6\), expected \(2, 2"):
        load_prefix(three, fewer)


def test_a_saved_bart_comes_back_frozen_and_the_same(bart, tmp_path):
    """Would catch: the bias of the logits forgotten, settings of decoding that are lost."""
    bart.generation_config = {"forced_bos_token_id": 0}
    save(bart, tmp_path)
    again = load(tmp_path, dtype=torch.float64)
    assert again.config == bart.config and not any(p.requires_grad for p in again.parameters())
    assert again.generation_config == {"forced_bos_token_id": 0}
    assert torch.equal(logits(again, *texts()), logits(bart, *texts()))


def test_a_text_that_is_too_long_is_refused(bart):
    """Would catch: an index error deep in an embedding; and a prefix that takes positions up."""
    source, target = torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, 65, dtype=torch.long)
    bart.encode(source, prefix=some_prefix(bart, encoder=70))
    with pytest.raises(ValueError, match="got a text of 65 tokens; expected at most 64"):
        bart.encode(target)
    with pytest.raises(ValueError, match="got a text of 65 tokens; expected at most 64"):
        bart.hidden_states(target, source)
    with pytest.raises(ValueError, match="got width 10 and 3 heads"):
        BART(BARTConfig(d_model=10, encoder_attention_heads=2, decoder_attention_heads=3))


def test_the_numbers_of_the_paper_are_counted():
    """BART-large, P = 100 at three places: 7,372,800 numbers are stored, the paper's 2 %.

    Would catch: a count of one place only.
    """
    with torch.device("meta"):
        large = BART(BARTConfig())
        prefix = fresh_prefix(large, dict.fromkeys(PLACES, 100), mid_dim=800)
        line = summarize_parameters(prefix, large.requires_grad_(False))
    assert "to store: 7,372,800, 1.81% of the model" in line
    total = 406_291_456 + sum(p.numel() for p in prefix.parameters())
    assert f"all params: {total:,}" in line
