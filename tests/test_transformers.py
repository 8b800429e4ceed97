"""Our GPT-2 is the one of the transformers library: the same logits from the same files.

Every comparison goes the way a user goes: from a checkpoint of transformers, over convert, to load.
The weights are random and the shapes unusual, for square matrices and even sizes hide mistakes.
"""
import pytest
import torch

from model import GPT2, GPT2Config
from pretrained.checkpoint import load
from pretrained.hugging_face import convert

transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers")

SHAPES = {
    "one head, five layers": dict(vocab_size=61, n_positions=33, n_embd=18, n_layer=5, n_head=1),
    "odd head size": dict(vocab_size=127, n_positions=29, n_embd=35, n_layer=2, n_head=5),
    "heads of size one": dict(vocab_size=7, n_positions=40, n_embd=6, n_layer=3, n_head=6),
    "another epsilon": dict(vocab_size=53, n_positions=21, n_embd=33, n_layer=1, n_head=3,
                            layer_norm_epsilon=0.3),
}
# The largest difference, relative to the range of the logits. fp32 adds in another order in either
# library; float64 has room to show that nothing but the order differs.
LIMIT = {torch.float32: 1e-4, torch.float64: 1e-10}


def oracle(shape, dtype, seed=0):
    """A random GPT-2 of transformers whose weights, biases and gains are all far from 0 and 1."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def write(theirs, directory, form):
    """Save `theirs` as transformers does now, or as the old uploads are: a pickle with buffers."""
    theirs.save_pretrained(directory)
    if form == "safetensors":
        pytest.importorskip("safetensors", reason="transformers writes it: pip install safetensors")
        return
    (directory / "model.safetensors").unlink()
    state = theirs.state_dict()
    n = theirs.config.n_positions
    for layer in range(theirs.config.n_layer):
        mask = torch.ones(n, n, dtype=torch.uint8).tril().view(1, 1, n, n)
        state[f"transformer.h.{layer}.attn.bias"] = mask
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if form == "legacy, no root":
        state = {k.removeprefix("transformer."): v for k, v in state.items() if "lm_head" not in k}
    torch.save(state, directory / "pytorch_model.bin",
               _use_new_zipfile_serialization=form == "zip")


def converted(theirs, directory, form="safetensors"):
    """`theirs`, through the files, as our model."""
    write(theirs, directory / "hf", form)
    convert(directory / "hf", directory / "ours")
    return load(directory / "ours", dtype=theirs.dtype)


def difference(ours, theirs, mask):
    """The largest difference of logits (B, T, V) where no padding is, relative to their range."""
    ours, theirs = ours[mask], theirs[mask]                                         # (N, V)
    return ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item()


def padded(shape, side):
    """Tokens (3, T) of a batch that fills the positions, and its mask, False at padding."""
    torch.manual_seed(1)
    T = shape["n_positions"]
    ids = torch.randint(shape["vocab_size"], (3, T))                                # (B, T)
    mask = torch.ones(3, T, dtype=torch.bool)                                       # (B, T)
    for row, length in enumerate((T, T - 4, 1)):
        if side == "right":
            mask[row, length:] = False
        elif side == "left":
            mask[row, :T - length] = False
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_transformers(tmp_path, shape, dtype):
    """Catches a wrong transpose, GELU, epsilon, scale or position, with padding on either side."""
    theirs = oracle(shape, dtype)
    ours = converted(theirs, tmp_path)
    assert ours.config == GPT2Config(**shape)
    for side in ("no", "right", "left"):
        ids, mask = padded(shape, side)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)                        # (B, T)
        wanted = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
        worst = difference(ours.head(ours.hidden_states(ids, key_mask=mask)), wanted, mask)
        print(f"{side} padding, {dtype}: {worst:.1e}")          # python -m pytest -rP shows it
        assert worst < LIMIT[dtype], f"{side} padding"


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "legacy, no root"])
def test_every_file_that_transformers_ever_wrote_is_read(tmp_path, form):
    """Catches a format, a root of the names or an old buffer that we do not know."""
    shape = SHAPES["odd head size"]
    theirs = oracle(shape, torch.float64)
    ours = converted(theirs, tmp_path, form)
    ids, mask = padded(shape, "no")
    worst = difference(ours.head(ours.hidden_states(ids)), theirs(ids).logits, mask)
    assert worst < LIMIT[torch.float64]


@pytest.mark.parametrize("P", [1, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_prefix_is_past_keys_and_values(tmp_path, shape, P):
    """Catches keys and values swapped, a layer off by one, a prefix that causality hides, and text
    that does not start at position P; with padding, and one prefix per row or for all rows.
    """
    theirs = oracle(shape, torch.float64)
    ours = converted(theirs, tmp_path)
    c, worst = ours.config, 0.0
    for side in ("no", "right", "left"):
        for rows in (1, 3):
            ids, mask = padded(shape | {"n_positions": c.n_positions - P}, side)
            shape_of_prefix = (c.n_layer, 2, rows, c.n_head, P, c.n_embd // c.n_head)
            prefix = torch.randn(shape_of_prefix, dtype=torch.float64)  # (L, 2, 1 or B, H, P, D)
            past = transformers.DynamicCache()
            for layer, (k, v) in enumerate(prefix.expand(-1, -1, 3, -1, -1, -1)):
                past.update(k.clone(), v.clone(), layer)                # (B, H, P, D) each
            keys = torch.cat((torch.ones(3, P, dtype=torch.bool), mask), 1)         # (B, P+S)
            positions = P + (mask.long().cumsum(1) - 1).clamp(min=0)                # (B, T)
            wanted = theirs(ids, attention_mask=keys.long(), position_ids=positions,
                            past_key_values=past).logits
            got = ours.head(ours.hidden_states(ids, prefix, keys))
            worst = max(worst, difference(got, wanted, mask))
            assert worst < LIMIT[torch.float64], (side, rows)
            without = ours.head(ours.hidden_states(ids, key_mask=mask))
            assert difference(without, wanted, mask) > 1e-3, "the prefix changes nothing"
    print(f"with a prefix: {worst:.1e}")


def test_half_precision_weights_are_the_same_numbers(tmp_path):
    """Catches a conversion that rounds: a bf16 checkpoint, computed in float64 by both."""
    shape = SHAPES["one head, five layers"]
    theirs = oracle(shape, torch.bfloat16)
    converted(theirs, tmp_path)
    ours = load(tmp_path / "ours", dtype=torch.float64)
    ids, mask = padded(shape, "no")
    worst = difference(ours.head(ours.hidden_states(ids)), theirs.double()(ids).logits, mask)
    assert worst < LIMIT[torch.float64]


@pytest.mark.parametrize("option", [
    {"activation_function": "gelu"}, {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True}, {"n_inner": 50}, {"tie_word_embeddings": False}])
def test_what_our_model_cannot_do_is_refused(tmp_path, option):
    """Catches a model of transformers with another function, converted without a word."""
    theirs = oracle(SHAPES["odd head size"] | option, torch.float32)
    with pytest.raises(ValueError, match="^got .*; expected .*; "):
        converted(theirs, tmp_path)
    assert not (tmp_path / "ours").exists()


def test_other_models_of_transformers_are_refused(tmp_path):
    """Catches BERT, and GPT-2 with another head on it, taken for a language model."""
    small = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, **small))
    with pytest.raises(ValueError, match="model_type 'bert'"):
        converted(bert, tmp_path / "bert")
    config = transformers.GPT2Config(**SHAPES["odd head size"], num_labels=3)
    with pytest.raises(ValueError, match="score.weight"):
        converted(transformers.GPT2ForSequenceClassification(config), tmp_path / "classifier")


@pytest.mark.parametrize("count, n_layer, n_embd, n_head", [
    (124_439_808, 12, 768, 12), (354_823_168, 24, 1024, 16),
    (774_030_080, 36, 1280, 20), (1_557_611_200, 48, 1600, 25)])
def test_the_four_sizes_have_the_published_number_of_parameters(count, n_layer, n_embd, n_head):
    """Catches a layer too many, an untied head, a missing bias; the numbers are transformers'."""
    with torch.device("meta"):
        ours = GPT2(GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head))
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=n_layer, n_embd=n_embd, n_head=n_head))
    assert sum(p.numel() for p in ours.parameters()) == count
    assert sum(p.numel() for p in theirs.parameters()) == count
