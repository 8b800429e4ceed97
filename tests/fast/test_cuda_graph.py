"""Recorded steps are sample.generate. On a CPU they run one by one, on a GPU they are replayed.

What a recording must not do, to move a tensor or to let Python decide, is looked for here as well.
"""
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import random_bart, random_gpt2

import sample
from decoding.constraints import Constraints
from decoding.state import DecodingState
from fast import cuda_graph, forms
from fast.cuda_graph import RecordedGenerate, Step, round_up_source
from model import ExplicitAttention
from sample import generate, sample_token

EOS = 2
GPU = torch.cuda.is_available()


class Apart(ExplicitAttention):
    """So the prefix is left outside the cache, as for the fused kernel."""
    joins_prefix = False


class NoTree(Apart):
    supports_tree = False


def prompts(seed, lengths=(7, 1, 12, 4)):
    torch.manual_seed(seed)
    return [torch.randint(3, 256, (n,)).tolist() for n in lengths]


def gpt2_prefixes():
    torch.manual_seed(5)
    return [torch.randn(3, 2, 1, 4, P, 6, dtype=torch.float64) for P in (5, 0, 9, 2)]


def bart_prefixes(lengths=((3, 5, 2), (0, 1, 9), (14, 0, 0), (1, 4, 4))):
    """`ThreePrefixes` of every length, for one source each; some have none in some place."""
    torch.manual_seed(6)
    empty = random_bart().empty_prefix()
    return [type(empty)(*(torch.randn(*part.shape[:4], P, part.size(5), dtype=part.dtype)
                          for part, P in zip(empty, own))) for own in lengths]


NOISE = torch.Generator()


def draw(logits):
    return sample_token(logits, 2.0, 50, 0.9, NOISE)                            # (B,)


def drawn(decode, model, texts, rules, prefix):
    """What `decode` generates; drawn, for a random model's likeliest tokens are always the same."""
    NOISE.manual_seed(6)
    return decode(model, texts, rules, prefix, draw)


CASES = {   # model, prefix, attention
    "gpt2": (random_gpt2, lambda: None, ExplicitAttention),
    "gpt2, one prefix": (random_gpt2, lambda: gpt2_prefixes()[0], ExplicitAttention),
    "gpt2, prefixes of four lengths": (random_gpt2, gpt2_prefixes, ExplicitAttention),
    "gpt2, one prefix apart": (random_gpt2, lambda: gpt2_prefixes()[0], Apart),
    "gpt2, four prefixes apart": (random_gpt2, gpt2_prefixes, Apart),
    "bart": (random_bart, lambda: None, ExplicitAttention),
    "bart, prefixes of four lengths": (random_bart, bart_prefixes, ExplicitAttention),
    "bart, four prefixes apart": (random_bart, bart_prefixes, Apart),
    "gpt2, four prefixes, no tree": (random_gpt2, gpt2_prefixes, NoTree),
}
RULES = {"free": {}, "least": dict(min_new_tokens=9),
         "forced": dict(forced_bos_token_id=7, forced_eos_token_id=8),
         "one token": dict(max_new_tokens=1, forced_bos_token_id=7),
         "nothing": dict(max_new_tokens=0)}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_give_the_tokens_of_generate(case, rules):
    """Token for token, in ragged batches, three in turn through the same tensors.

    Would catch: a column or a position off by one, the texts before that are still seen, a rule
    that holds one token too early or too late, a prefix of another row.
    """
    kind, prefix, attention = CASES[case]
    model, prefix, decode, texts = kind(), prefix(), RecordedGenerate(None), []
    model.attention = attention()
    # Banned are tokens that would come, and the end is one that then comes: so both matter.
    free = drawn(generate, model, prompts(4), Constraints(EOS, 20), prefix)
    banned = tuple({row[1] for row in free})
    free = drawn(generate, model, prompts(4), Constraints(EOS, 20, banned_tokens=banned), prefix)
    constraints = Constraints(**dict(eos_token_id=free[0][6], max_new_tokens=20,
                                     banned_tokens=banned) | RULES[rules])
    for seed in (4, 6, 4):
        texts.append(drawn(decode, model, prompts(seed), constraints, prefix))
        assert texts[-1] == drawn(generate, model, prompts(seed), constraints, prefix)
    assert len(decode.steps) == 1
    if constraints.max_new_tokens > 1:
        assert texts[0] == texts[2] != texts[1]
    if rules == "free":                                             # some end before others
        assert len({len(row) for row in texts[0] + texts[1]}) > 1


def test_a_draw_is_that_of_multinomial():
    """Would catch: a division upside down, noise of another kind."""
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    order = logits.argsort(-1, descending=True)
    p = logits.softmax(-1).gather(1, order)
    pick = torch.multinomial(p / p.sum(-1, True), 1, generator=torch.Generator().manual_seed(2))
    ours = sample_token(logits, 1.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ours, order.gather(1, pick)[:, 0])


def test_decoding_stops_where_the_positions_end():
    """64 positions, P = 5, a prompt of 50: 9 tokens. Would catch: a cache that is rounded up to
    more than there are positions and used to its end.
    """
    row, = RecordedGenerate(None)(random_gpt2(), [[1] * 50], Constraints(256, 100, 100),
                                  gpt2_prefixes()[0], sample_token)
    assert len(row) == 9


def some_step(kind, constraints):
    state = DecodingState(kind(), prompts(4), None, 9)
    inputs = round_up_source(state.inputs)
    return state, inputs, Step(state, inputs, 64, constraints, sample_token)


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_a_step_moves_no_tensor(kind):
    """Would catch: a tensor that is made anew where it should be written to. A graph would go on
    reading the old one.
    """
    state, inputs, step = some_step(kind, Constraints(EOS, 9))

    def addresses():
        found = {**vars(step), "kv": step.cache.kv, "newest": step.cache.newest}
        found |= {f"{name} {i}": x for name, own in step.inputs.items()
                  for i, x in enumerate(cuda_graph.tensors_of(own))}
        return {name: x.data_ptr() for name, x in found.items() if isinstance(x, torch.Tensor)}
    before = addresses()
    step.begin(state, inputs, sample_token(state.logits))
    step.take()
    assert addresses() == before and {"tokens", "n", "done", "key_mask", "prefix 0"} <= set(before)


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_a_step_asks_no_tensor_for_a_number(kind, monkeypatch):
    """Would catch: an `if` on a tensor, which waits for the GPU and would be recorded one way."""
    state, inputs, step = some_step(kind, Constraints(EOS, 9, 3, (5,), forced_eos_token_id=EOS))
    step.begin(state, inputs, sample_token(state.logits))

    def refuse(*_):
        raise AssertionError("a number was asked for")
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    step.take()


def test_the_program_records_where_it_is_asked_to(model_directory, monkeypatch):
    """Would catch: a flag without effect, other tokens with it, a rule that is lost."""
    def generator(**given):
        return sample.Generator(sample.Settings(model=str(model_directory), device="cpu",
                                                max_new_tokens=20, **given))
    plain = generator()
    assert plain.decode is generate
    with pytest.raises(ValueError, match="got --graph, but the model is on cpu; expected a CUDA"):
        generator(graph=True)
    monkeypatch.setattr(forms, "why_not_recordable", lambda *_: "")
    recorded = generator(graph=True)
    assert isinstance(recorded.decode, RecordedGenerate)
    assert recorded.generate(["a name", "b"]) == plain.generate(["a name", "b"])


def test_what_cannot_be_recorded_is_told():
    """Would catch: a repetition allowed, beams that are dropped, a BART at wrong positions, without
    a word.
    """
    rules, on_gpu = Constraints(EOS), SimpleNamespace(
        device=torch.device("cuda"), is_encoder_decoder=False, attention=NoTree())
    assert "cpu" in cuda_graph.why_not_recordable(random_gpt2(), rules)
    assert cuda_graph.why_not_recordable(on_gpu, rules) == ""           # as if it were on a GPU
    on_gpu.is_encoder_decoder = True
    assert "BART" in cuda_graph.why_not_recordable(on_gpu, rules)
    on_gpu.attention = Apart()
    assert cuda_graph.why_not_recordable(on_gpu, rules) == ""
    assert "4 beams" in cuda_graph.why_not_recordable(on_gpu, rules, 4)
    rules = dataclasses.replace(rules, no_repeat_ngram_size=3)
    assert "repeat" in cuda_graph.why_not_recordable(on_gpu, rules)


@pytest.mark.skipif(not GPU, reason="no CUDA GPU here: nothing can be recorded")
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_give_the_tokens_of_generate(case):
    """Would catch: what a recording leaves out, a second batch that reads the first one's tensors.

    In float64, where two ways to add up cannot change which token is the likeliest.
    """
    kind, prefix, attention = CASES[case]
    model, decode, rules = kind().cuda(), RecordedGenerate(torch.Generator("cuda")), Constraints(
        EOS, 20)
    model.attention, prefix = attention(), prefix()
    if isinstance(prefix, list):
        prefix = [p.cuda() if isinstance(p, torch.Tensor) else p._make(x.cuda() for x in p)
                  for p in prefix]
    elif prefix is not None:
        prefix = prefix.cuda()
    for seed in (4, 6, 4):
        assert (decode(model, prompts(seed), rules, prefix, sample_token)
                == generate(model, prompts(seed), rules, prefix))
    assert len(decode.steps) == 1


@pytest.mark.skipif(not GPU, reason="no CUDA GPU here: nothing can be recorded")
def test_a_replayed_draw_is_a_new_draw():
    """Would catch: a generator that is not part of the recording: the same noise at every step."""
    model, generator = random_gpt2().cuda(), torch.Generator("cuda").manual_seed(3)
    model.wte.weight.zero_()                            # every word is as likely as every other

    def draw(logits):
        return sample_token(logits, 1.0, generator=generator)
    row, = RecordedGenerate(generator)(model, [[1]], Constraints(256, 40, 40), None, draw)
    assert len(set(row)) > 20
