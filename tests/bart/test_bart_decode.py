"""Decoding with BART: the source is read once, ragged batches, beams, what its makers force."""
import json

import pytest
import torch
from conftest import random_bart
from test_bart import some_prefix

import sample
from bart.model import BART, BARTConfig, ThreePrefixes
from bart.prefix import BARTPrefix
from decoding.beam import beam_search
from decoding.constraints import Constraints
from decoding.state import DecodingState
from model import ExplicitAttention
from pretrained.load import load_model
from pretrained.run_directory import save_prefix
from sample import generate, sample_token

EOS, LENGTHS = 2, (7, 1, 12, 4)


@pytest.fixture
def sources():
    torch.manual_seed(4)
    return [torch.randint(3, 262, (n,)).tolist() for n in LENGTHS]


def recomputed(bart, source, prefix, max_new_tokens):
    """One source, alone, without a cache: everything again for every token."""
    ids = [bart.config.decoder_start_token_id]
    for _ in range(max_new_tokens):
        hidden = bart.hidden_states(torch.tensor([ids]), torch.tensor([source]),
                                    prefix=prefix)[:, -1]                       # (1, C)
        ids.append(sample_token(bart.head(hidden)).item())
        if ids[-1] == EOS:
            return ids[1:-1]
    return ids[1:]


def search(bart, sources, prefix, constraints, num_beams, **options):
    """Beam search over some sources: [(tokens, log p)]."""
    state = DecodingState(bart, sources, prefix, constraints.max_new_tokens, num_beams)
    return beam_search(state, constraints, num_beams, **options)


def test_cached_decoding_is_recomputation(bart, sources):
    """Would catch: a cache, a mask or a position off by one, padding of the source that is seen,
    a prefix that is there in the first step only.
    """
    for prefix in (None, some_prefix(bart)):
        together = generate(bart, sources, Constraints(EOS, 20), prefix)
        for source, row in zip(sources, together):
            assert row == recomputed(bart, source, prefix, 20)
    assert together != generate(bart, sources, Constraints(EOS, 20))


def test_the_source_is_read_once(bart, sources):
    """Would catch: an encoder that runs for every token, cross keys that are made anew."""
    calls = []
    for name, layer in bart.named_modules():
        if name in ("encoder.layers.0", "decoder.layers.0.encoder_attn.k_proj", "decoder.layers.0"):
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    generate(bart, sources, Constraints(EOS, 20, 20), some_prefix(bart))
    assert calls.count("encoder.layers.0") == 1
    assert calls.count("decoder.layers.0.encoder_attn.k_proj") == 1
    assert calls.count("decoder.layers.0") == 20


def test_beam_of_one_is_greedy_and_a_batch_is_each_alone(bart, sources):
    """Would catch: beams at positions that count their neighbours', a row's mask for another's."""
    prefix = some_prefix(bart)
    one = search(bart, sources, prefix, Constraints(EOS, 12), 1)
    assert [row for row, _ in one] == generate(bart, sources, Constraints(EOS, 12), prefix)
    together = search(bart, sources, prefix, Constraints(EOS, 12), 4)
    for source, (row, log_p) in zip(sources, together):
        (alone, its), = search(bart, [source], prefix, Constraints(EOS, 12), 4)
        assert row == alone and log_p == pytest.approx(its, rel=1e-10)
        ids = torch.tensor([[EOS, *row, EOS][:13]])     # </s>, and what was generated
        hidden = bart.hidden_states(ids[:, :-1], torch.tensor([source]), prefix=prefix)
        log_probs = bart.head(hidden)[0].log_softmax(-1)                        # (T, V)
        total = log_probs.gather(1, ids[0, 1:, None]).sum().item()
        assert log_p == pytest.approx(total, rel=1e-10)


def ragged(lengths=((3, 5, 2), (0, 1, 9), (14, 0, 0), (1, 4, 4))):
    """`ThreePrefixes` of every length, for one source each; some have none at some place."""
    torch.manual_seed(6)
    like = some_prefix(random_bart().double())
    return [ThreePrefixes(*(torch.randn(*p.shape[:4], P, p.size(5), dtype=p.dtype)
                            for p, P in zip(like, own, strict=True))) for own in lengths]


class SeparateAttention(ExplicitAttention):
    """The same function, which is handed the prefix apart from the cache, as a kernel is."""
    joins_prefix = False


def test_a_list_of_prefixes_serves_each_its_own(bart, sources):
    """Would catch: the first run's prefix for all rows; a position, a mask or a branch that counts
    the columns that a longer prefix needs.
    """
    own = ragged()
    together = generate(bart, sources, Constraints(EOS, 10), own)
    beams = search(bart, sources, own, Constraints(EOS, 10), 3)
    for b, (source, prefix) in enumerate(zip(sources, own, strict=True)):
        assert together[b] == recomputed(bart, source, prefix, 10)
        (row, log_p), = search(bart, [source], prefix, Constraints(EOS, 10), 3)
        assert beams[b][0] == row and beams[b][1] == pytest.approx(log_p, rel=1e-10)
        alone = DecodingState(bart, [source], prefix).logits[0]                 # (V,)
        for form in (ExplicitAttention(), SeparateAttention()):
            bart.attention = form
            row = DecodingState(bart, sources, own).logits[b]                   # (V,)
            assert (row - alone).abs().max() < 1e-10
        bart.attention = ExplicitAttention()
    assert together != generate(bart, sources, Constraints(EOS, 10), own[0])


def test_a_prefix_apart_from_the_cache_decodes_the_same(bart, sources):
    """Would catch: a form that takes the prefix by itself and is handed it twice, or after the
    first step no more.
    """
    together = generate(bart, sources, Constraints(EOS, 10, 10), ragged())
    beams = search(bart, sources, ragged(), Constraints(EOS, 10), 3)
    bart.attention = SeparateAttention()
    assert generate(bart, sources, Constraints(EOS, 10, 10), ragged()) == together
    apart = search(bart, sources, ragged(), Constraints(EOS, 10), 3)
    assert [row for row, _ in apart] == [row for row, _ in beams]


def test_what_cannot_be_read_is_refused(bart):
    """Would catch: an index error deep in an embedding."""
    for sources in ([], [[]], [[3], []]):
        with pytest.raises(ValueError, match="got an empty prompt, or none; expected a token"):
            generate(bart, sources, Constraints(EOS))
    with pytest.raises(ValueError, match="got a text of 65 tokens; expected at most 64"):
        generate(bart, [[3] * 65], Constraints(EOS))
    row, = generate(bart, [[3] * 64], Constraints(EOS, 100, 100))
    assert len(row) == 63                                   # 64 positions, </s> in the first


# ---- as transformers does it

OPTIONS = {     # theirs; ours
    "free": ({}, {}),
    "forced": (dict(forced_bos_token_id=0, forced_eos_token_id=2),
               dict(forced_bos_token_id=0, forced_eos_token_id=2)),
    "no repeats": (dict(no_repeat_ngram_size=2, min_new_tokens=5),
                   dict(no_repeat_ngram_size=2, min_new_tokens=5)),
}
SHAPE = dict(vocab_size=83, max_position_embeddings=40, d_model=24, encoder_layers=2,
             decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=4,
             encoder_ffn_dim=20, decoder_ffn_dim=28)


def both(seed):
    """The same random weights in their BART and in ours; the end is made rather likely."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(seed)
    theirs = transformers.BartForConditionalGeneration(transformers.BartConfig(
        **SHAPE, forced_eos_token_id=None)).eval().requires_grad_(False)
    theirs.generation_config.forced_eos_token_id = None
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    # Not the same token for ever: attention that decides, and nothing constant around it.
    for layer in theirs.model.decoder.layers:
        for part in (layer.self_attn, layer.encoder_attn):
            part.q_proj.weight *= 8
            part.out_proj.bias.zero_()
        for part in (layer.fc1, layer.fc2, layer.self_attn_layer_norm,
                     layer.encoder_attn_layer_norm, layer.final_layer_norm):
            part.bias.zero_()
    theirs.final_logits_bias[0, 2] += 2.5
    ours = BART(BARTConfig(**SHAPE)).eval().requires_grad_(False)
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    return theirs, ours


def their_texts(theirs, sources, **options):
    """What `generate` returns, without the token it starts from and without the end."""
    S = max(map(len, sources))
    ids = torch.tensor([s + [1] * (S - len(s)) for s in sources])                   # (B, S)
    mask = torch.tensor([[1] * len(s) + [0] * (S - len(s)) for s in sources])       # (B, S)
    rows = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=14,
                           **options)[:, 1:].tolist()
    return [row[:row.index(2)] if 2 in row else row for row in rows]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", [1, 4])
def test_decoding_is_that_of_transformers(option, size):
    """Would catch: a first token that counts twice, an end forced too late, beams mixed up."""
    theirs_options, our_options = OPTIONS[option]
    torch.manual_seed(4)
    sources = [torch.randint(3, 83, (n,)).tolist() for n in LENGTHS]
    ended = 0
    for seed in (1, 6, 7):          # these generate several words
        theirs, ours = both(seed)
        constraints = Constraints(EOS, 14, **our_options)
        rows = (generate(ours, sources, constraints) if size == 1 else
                [row for row, _ in search(ours, sources, None, constraints, size,
                                          early_stopping="false")])
        assert rows == their_texts(theirs, sources, num_beams=size, length_penalty=1.0,
                                   early_stopping=False, **theirs_options)
        ended += sum(len(row) < 13 for row in rows)
    assert 2 <= ended <= 10, "of 12 texts some have to end by themselves, and some not"


# ---- the program

@pytest.fixture
def run(tmp_path, bart_directory):
    """A run on disk, with prefixes at two places."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"model": str(bart_directory), "data": "xsum", "max_source": 10}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    bart = random_bart()
    bart.fingerprint = load_model(str(bart_directory), "cpu", "fp32")[0].fingerprint
    torch.manual_seed(1)
    prefix = BARTPrefix(bart.empty_prefix(), bart.width, dict(encoder=3, cross=2), 16).fold()
    save_prefix(folder / "prefix.pt", prefix, bart)
    return folder


def test_the_program_frames_and_cuts_sources_as_in_training(run, bart_directory, capsys):
    """Would catch: GPT-2's frame, a source longer than those learned from, <s> in the output."""
    common = ["--device", "cpu", "--max-new-tokens", "8", "--min-new-tokens", "4"]
    sample.main(["--run", str(run), "a table of contents", *common])
    out, err = capsys.readouterr()
    assert "cut 11 tokens of 'a table" in err and "<s>" not in out
    sample.main(["--run", str(run), "a table ", *common])
    assert out == capsys.readouterr().out                  # <s>, 8 bytes and </s>: 10 tokens
    sample.main(["--model", str(bart_directory), "a table ", *common, "--num-beams", "3"])
    assert capsys.readouterr().out.strip()
    settings = sample.Generator(sample.Settings(run=[str(run)], device="cpu")).settings
    assert (settings.num_beams, settings.length_penalty) == (6, 0.8)                # XSum's
