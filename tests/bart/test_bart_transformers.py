"""Our BART is the one of the transformers library: the same logits from the same files, and with
the prefix's keys and values put into the library's attention from outside.

As in test_transformers.py the weights are random, and no two sizes of a shape are alike.
"""
import json

import pytest
import torch
from torch.nn import functional as F

from bart.model import BART, BARTConfig, ThreePrefixes
from pretrained.checkpoint import load
from pretrained.hugging_face import convert

transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers")

SHAPES = {
    "more heads in the decoder": dict(
        vocab_size=61, max_position_embeddings=23, d_model=18, encoder_layers=3, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=3, encoder_ffn_dim=20,
        decoder_ffn_dim=28),
    "one encoder layer": dict(
        vocab_size=53, max_position_embeddings=19, d_model=35, encoder_layers=1, decoder_layers=4,
        encoder_attention_heads=7, decoder_attention_heads=5, encoder_ffn_dim=31,
        decoder_ffn_dim=17),
}
# The largest difference, relative to the range of the logits. fp32 adds in another order in either
# library; float64 has room to show that nothing but the order differs.
LIMIT = {torch.float32: 1e-4, torch.float64: 1e-10}


def oracle(shape, dtype, seed=0, **options):
    """A random BART of transformers whose weights, biases and gains are all far from 0 and 1."""
    torch.manual_seed(seed)
    config = transformers.BartConfig(**shape | options, attn_implementation="eager")
    theirs = transformers.BartForConditionalGeneration(config).to(dtype).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.final_logits_bias += torch.randn_like(theirs.final_logits_bias)
    return theirs.requires_grad_(False)


def converted(theirs, directory, form="safetensors"):
    """`theirs`, through the files, as our model."""
    theirs.save_pretrained(directory / "hf")
    (directory / "hf" / "vocab.json").write_text("{}")          # kept; nothing is encoded here
    if form == "safetensors":
        pytest.importorskip("safetensors", reason="transformers writes it: pip install safetensors")
    else:
        (directory / "hf" / "model.safetensors").unlink()
        state = theirs.state_dict() | {"model.encoder.version": torch.ones(1)}
        if form == "no root":       # as bart-large lies on the hub: the bare model, without a head
            state = {name.removeprefix("model."): tensor for name, tensor in state.items()
                     if name not in ("lm_head.weight", "final_logits_bias")}
        if form == "encoder's words":
            state = {name: tensor for name, tensor in state.items()
                     if name not in ("model.shared.weight", "lm_head.weight")}
        torch.save(state, directory / "hf" / "pytorch_model.bin")
    convert(directory / "hf", directory / "ours")
    return load(directory / "ours", dtype=theirs.dtype)


def batch(shape, side):
    """Source (3, S) and target (3, T), each with its mask; side: of the padding, or "no"."""
    torch.manual_seed(1)
    limit, tensors = shape["max_position_embeddings"], []
    for longest in (limit, limit - 6):
        ids = torch.randint(shape["vocab_size"], (3, longest))                  # (B, S) or (B, T)
        mask = torch.ones(3, longest, dtype=torch.bool)                         # (B, S) or (B, T)
        for row, length in enumerate((longest, longest - 4, 1)):
            if side == "right":
                mask[row, length:] = False
            elif side == "left":
                mask[row, :longest - length] = False
        tensors += [ids, mask]
    return tensors


def difference(ours, theirs, mask):
    """The largest difference of logits (B, T, V) outside padding, relative to their range."""
    ours, theirs = ours[mask], theirs[mask]                                     # (N, V)
    return ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item()


def their_logits(theirs, source, source_mask, target, mask):
    return theirs(input_ids=source, attention_mask=source_mask.long(), decoder_input_ids=target,
                  decoder_attention_mask=mask.long()).logits                    # (B, T, V)


def our_logits(ours, source, source_mask, target, mask, prefix=None):
    P = 0 if prefix is None else prefix.decoder.size(4)
    key_mask = F.pad(mask, (P, 0), value=True)                                  # (B, P+T)
    return ours.head(ours.hidden_states(target, source, source_mask, prefix, key_mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_transformers(tmp_path, shape, dtype):
    """Catches LayerNorm before the sum, the wrong GELU, a position off by two, a bias left out,
    with padding on either side of the source and the target.
    """
    theirs = oracle(shape, dtype)
    ours = converted(theirs, tmp_path)
    for side in ("no", "right", "left"):
        source, source_mask, target, mask = batch(shape, side)
        wanted = their_logits(theirs, source, source_mask, target, mask)
        worst = difference(our_logits(ours, source, source_mask, target, mask), wanted, mask)
        print(f"{side} padding, {dtype}: {worst:.1e}")          # python -m pytest -rP shows it
        assert worst < LIMIT[dtype], f"{side} padding"


@pytest.mark.parametrize("form", ["bin", "no root", "encoder's words"])
def test_every_layout_of_the_names_is_read(tmp_path, form):
    """Catches a root of the names, a tied copy or an old buffer that is not known."""
    shape = SHAPES["one encoder layer"]
    theirs = oracle(shape, torch.float64)
    ours = converted(theirs, tmp_path, form)
    source, source_mask, target, mask = batch(shape, "right")
    if form == "no root":                   # this file has no bias: it is 0
        theirs.final_logits_bias.zero_()
    wanted = their_logits(theirs, source, source_mask, target, mask)
    got = our_logits(ours, source, source_mask, target, mask)
    assert difference(got, wanted, mask) < LIMIT[torch.float64]


def put_in(monkeypatch, theirs, prefix):
    """Put `prefix` in front of the keys and values in each attention of `theirs`, from outside."""
    from transformers.models.bart import modeling_bart
    attention, where = modeling_bart.eager_attention_forward, {}
    for layer, block in enumerate(theirs.model.encoder.layers):
        where[block.self_attn] = prefix.encoder[layer]
    for layer, block in enumerate(theirs.model.decoder.layers):
        where[block.self_attn] = prefix.decoder[layer]
        where[block.encoder_attn] = prefix.cross[layer]

    def prefixed(module, query, key, value, attention_mask, **rest):
        pk, pv = where[module].expand(-1, len(key), -1, -1, -1)             # (B, H, P, D) each
        if attention_mask is None:                                          # nobody is padded
            attention_mask = query.new_zeros(1, 1, 1, key.size(2))
        mask = F.pad(attention_mask, (pk.size(2), 0))                       # 0 is added: visible
        return attention(module, query, torch.cat((pk, key), 2), torch.cat((pv, value), 2), mask,
                         **rest)
    monkeypatch.setattr(modeling_bart, "eager_attention_forward", prefixed)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (6, 0, 0), (0, 2, 0), (0, 0, 5), (3, 40, 19)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_prefixes_are_keys_and_values_in_transformers_attention(tmp_path, shape, lengths,
                                                                monkeypatch):
    """Catches keys and values swapped, a layer off by one, a prefix at another's place, one that
    the mask hides, and positions that it shifts; one prefix per row or for all rows.
    """
    theirs, worst = oracle(shape, torch.float64), 0.0
    ours = converted(theirs, tmp_path)
    for side in ("no", "right", "left"):
        for rows in (1, 3):
            source, source_mask, target, mask = batch(shape, side)
            empty = ours.empty_prefix()
            shapes = [(*like.shape[:2], rows, like.size(3), P, like.size(5))
                      for like, P in zip(empty, lengths)]
            prefix = ThreePrefixes(*(torch.randn(x, dtype=torch.float64) for x in shapes))
            without = their_logits(theirs, source, source_mask, target, mask)
            with monkeypatch.context() as patched:
                put_in(patched, theirs, prefix)
                wanted = their_logits(theirs, source, source_mask, target, mask)
            got = our_logits(ours, source, source_mask, target, mask, prefix)
            worst = max(worst, difference(got, wanted, mask))
            assert worst < LIMIT[torch.float64], (side, rows)
            assert difference(without, wanted, mask) > 1e-3, "the prefix changes nothing"
    print(f"with prefixes: {worst:.1e}")


def test_the_makers_way_of_decoding_is_kept(tmp_path):
    """Catches `forced_bos_token_id` lost: bart-large then begins its texts with a wrong word."""
    theirs = oracle(SHAPES["one encoder layer"], torch.float64)
    converted(theirs, tmp_path)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"num_beams": 4, "forced_bos_token_id": 7, "length_penalty": None}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "generation_config.json").write_text('{"forced_bos_token_id": 0}')
    convert(tmp_path / "hf", tmp_path / "again")
    assert load(tmp_path / "again").generation_config == {      # the newer file's word counts
        "forced_bos_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
    assert load(tmp_path / "ours").generation_config == {
        "forced_eos_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}


@pytest.mark.parametrize("option", [
    {"activation_function": "relu"}, {"scale_embedding": True}, {"tie_word_embeddings": False},
    {"encoder_attention_heads": 3}, {"decoder_layers": None}, {"decoder_start_token_id": None}])
def test_what_our_bart_cannot_do_is_refused(tmp_path, option):
    """Catches a model of transformers with another function, converted without a word."""
    theirs = oracle(SHAPES["one encoder layer"], torch.float32)
    converted(theirs, tmp_path)
    about = tmp_path / "hf" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | option))
    about.with_name("generation_config.json").unlink()          # it may say what config.json lacks
    with pytest.raises(ValueError, match="^got .*; expected .*; |^got width 35 and 3 heads"):
        convert(tmp_path / "hf", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("count, C, layers, heads", [(139_420_416, 768, 6, 12),
                                                     (406_291_456, 1024, 12, 16)])
def test_the_two_sizes_have_the_published_number_of_parameters(count, C, layers, heads):
    """Catches a layer too many, an untied head, a missing bias; the numbers are transformers'."""
    shape = dict(d_model=C, encoder_layers=layers, decoder_layers=layers,
                 encoder_attention_heads=heads, decoder_attention_heads=heads,
                 encoder_ffn_dim=4 * C, decoder_ffn_dim=4 * C)
    with torch.device("meta"):
        ours = BART(BARTConfig(**shape))
        theirs = transformers.BartForConditionalGeneration(transformers.BartConfig(**shape))
    assert sum(p.numel() for p in ours.parameters()) == count
    assert sum(p.numel() for p in theirs.parameters()) == count
