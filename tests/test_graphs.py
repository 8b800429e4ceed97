"""Recorded steps are sample.generate. On a CPU they run one by one, on a GPU they are replayed.

What a recording must not do, to move a tensor or to let Python decide, is looked for here as well.
"""
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import random_bart, random_gpt2
from test_bart_decode import ragged

import graphs
import sample
from beam import Rules
from model import attend
from reader import reader_of
from sample import choose, generate

EOS = 2
GPU = torch.cuda.is_available()


def apart(q, k, v, pk, pv, real, causal):
    """Not the explicit form itself, so the readers leave the prefix outside the cache."""
    return attend(q, k, v, pk, pv, real, causal)


def prompts(seed, lengths=(7, 1, 12, 4)):
    torch.manual_seed(seed)
    return [torch.randint(3, 256, (n,)).tolist() for n in lengths]


def gpt2_prefixes():
    torch.manual_seed(5)
    return [torch.randn(3, 2, 1, 4, P, 6, dtype=torch.float64) for P in (5, 0, 9, 2)]


def drawn(decode, model, texts, rules, prefix, form):
    """What `decode` says; drawn, for the likeliest words of a random model are always the same."""
    NOISE.manual_seed(6)
    return decode(model, texts, rules, prefix, draw, form)


NOISE = torch.Generator()


def draw(logits):
    return choose(logits, 2.0, 50, 0.9, NOISE)                                  # (B,)


CASES = {   # model, prefix, attention
    "gpt2": (random_gpt2, lambda: None, attend),
    "gpt2, one prefix": (random_gpt2, lambda: gpt2_prefixes()[0], attend),
    "gpt2, prefixes of four lengths": (random_gpt2, gpt2_prefixes, attend),
    "gpt2, one prefix apart": (random_gpt2, lambda: gpt2_prefixes()[0], apart),
    "gpt2, four prefixes apart": (random_gpt2, gpt2_prefixes, apart),
    "bart": (random_bart, lambda: None, attend),
    "bart, prefixes of four lengths": (random_bart, ragged, attend),
}
RULES = {"free": {}, "least": dict(min_new=9), "forced": dict(first=7, last=8),
         "one token": dict(max_new=1, first=7), "nothing": dict(max_new=0)}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_say_what_generate_says(case, rules):
    """Token for token, in ragged batches, three in turn through the same tensors.

    Would catch: a column or a position off by one, the texts before that are still seen, a rule
    that holds one token too early or too late, a prefix of another row.
    """
    kind, prefix, form = CASES[case]
    model, prefix, decode, said = kind(), prefix(), graphs.Generate(None), []
    # Banned are words that would be said, and the end is one that then is said: so both matter.
    free = drawn(generate, model, prompts(4), Rules(EOS, 20), prefix, form)
    banned = tuple({row[1] for row in free})
    free = drawn(generate, model, prompts(4), Rules(EOS, 20, banned=banned), prefix, form)
    rule = Rules(**dict(eos=free[0][6], max_new=20, banned=banned) | RULES[rules])
    for seed in (4, 6, 4):
        said.append(drawn(decode, model, prompts(seed), rule, prefix, form))
        assert said[-1] == drawn(generate, model, prompts(seed), rule, prefix, form)
    assert len(decode.steps) == 1
    if rule.max_new > 1:
        assert said[0] == said[2] != said[1]
    if rules == "free":                                             # some end before others
        assert len({len(row) for row in said[0] + said[1]}) > 1


def test_a_draw_is_that_of_multinomial():
    """Would catch: a division upside down, noise of another kind."""
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    order = logits.argsort(-1, descending=True)
    p = logits.softmax(-1).gather(1, order)
    pick = torch.multinomial(p / p.sum(-1, True), 1, generator=torch.Generator().manual_seed(2))
    ours = choose(logits, 1.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ours, order.gather(1, pick)[:, 0])


def test_decoding_stops_where_the_positions_end():
    """64 positions, P = 5, a prompt of 50: 9 tokens. Would catch: a cache that is rounded up to
    more than there are positions and used to its end.
    """
    row, = graphs.Generate(None)(random_gpt2(), [[1] * 50], Rules(256, 100, 100),
                                 gpt2_prefixes()[0], choose)
    assert len(row) == 9


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_a_step_moves_no_tensor(kind):
    """Would catch: a tensor that is made anew where it should be written to. A graph would go on
    reading the old one.
    """
    model = kind()
    reader = reader_of(model, prompts(4), None, 9)
    step = graphs.Step(reader, graphs.beside(reader), 64, Rules(EOS, 9), choose)

    def addresses():
        found = {**vars(step), "kv": step.cache.kv, "newest": step.cache.newest}
        found |= {f"beside {i}": x for i, x in enumerate(step.beside)}
        return {name: x.data_ptr() for name, x in found.items() if isinstance(x, torch.Tensor)}
    before = addresses()
    step.begin(reader, graphs.beside(reader), choose(reader.logits))
    step.take()
    assert addresses() == before and {"said", "n", "done", "real"} <= set(before)


@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_a_step_asks_no_tensor_for_a_number(kind, monkeypatch):
    """Would catch: an `if` on a tensor, which waits for the GPU and would be recorded one way."""
    model = kind()
    reader = reader_of(model, prompts(4), None, 9)
    step = graphs.Step(reader, graphs.beside(reader), 64, Rules(EOS, 9, 3, (5,), last=EOS), choose)
    step.begin(reader, graphs.beside(reader), choose(reader.logits))

    def refuse(*_):
        raise AssertionError("a number was asked for")
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    step.take()


def test_the_program_records_where_it_is_asked_to(model_directory, monkeypatch):
    """Would catch: a flag without effect, other words with it, a rule that is lost."""
    def speaker(**given):
        return sample.Speaker(sample.Settings(model=str(model_directory), device="cpu", max_new=20,
                                              **given))
    plain = speaker()
    assert plain.generate is generate
    with pytest.raises(ValueError, match="got --graph, but the model is on cpu; expected a CUDA"):
        speaker(graph=True)
    monkeypatch.setattr(graphs, "impossible", lambda *_: "")
    recorded = speaker(graph=True)
    assert isinstance(recorded.generate, graphs.Generate)
    assert recorded.say(["a name", "b"]) == plain.say(["a name", "b"])


def test_what_cannot_be_recorded_is_told():
    """Would catch: a repetition allowed, a BART at wrong positions, without a word."""
    rules, weight = Rules(EOS), SimpleNamespace(device=torch.device("cuda"))
    seen = [SimpleNamespace(architecture=name, wte=SimpleNamespace(weight=weight))
            for name in ("gpt2", "bart")]                       # as if they were on a GPU
    assert "cpu" in graphs.impossible(random_gpt2(), rules, attend)
    assert graphs.impossible(seen[0], rules, apart) == ""
    assert graphs.impossible(seen[1], rules, attend) == ""
    assert "BART" in graphs.impossible(seen[1], rules, apart)
    assert "4 beams" in graphs.impossible(seen[0], rules, attend, 4)
    assert "repeat" in graphs.impossible(seen[0], dataclasses.replace(rules, no_repeat=3), attend)


@pytest.mark.skipif(not GPU, reason="no CUDA GPU here: nothing can be recorded")
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_say_what_generate_says(case):
    """Would catch: what a recording leaves out, a second batch that reads the first one's tensors.

    In float64, where two ways to add up cannot change which word is the likeliest.
    """
    kind, prefix, form = CASES[case]
    model, decode, rules = kind().cuda(), graphs.Generate(torch.Generator("cuda")), Rules(EOS, 20)
    prefix = prefix()
    if isinstance(prefix, list):
        prefix = [p.cuda() if isinstance(p, torch.Tensor) else type(p)(*(x.cuda() for x in p))
                  for p in prefix]
    elif prefix is not None:
        prefix = prefix.cuda()
    for seed in (4, 6, 4):
        said = decode(model, prompts(seed), rules, prefix, choose, form)
        assert said == generate(model, prompts(seed), rules, prefix, attend=form)
    assert len(decode.steps) == 1


@pytest.mark.skipif(not GPU, reason="no CUDA GPU here: nothing can be recorded")
def test_a_replayed_draw_is_a_new_draw():
    """Would catch: a generator that is not part of the recording: the same noise at every step."""
    model, generator = random_gpt2().cuda(), torch.Generator("cuda").manual_seed(3)
    model.wte.weight.zero_()                            # every word is as likely as every other

    def draw(logits):
        return choose(logits, 1.0, generator=generator)
    row, = graphs.Generate(generator)(model, [[1]], Rules(256, 40, 40), None, draw)
    assert len(set(row)) > 20
