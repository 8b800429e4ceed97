"""Our decoding is `generate` of the transformers library: the same tokens from the same weights.

Random checkpoints in fp32, ragged prompts. The end is made likely enough that about half of the
texts reach it by themselves.
"""
import pytest
import torch

from decoding.beam import beam_search
from decoding.constraints import Constraints
from decoding.state import DecodingState
from model import GPT2, GPT2Config
from pretrained.architectures import architecture
from sample import generate

transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers")

EOS, PAD, MAX_NEW, V = 1, 0, 16, 97
TRANSPOSED = architecture("gpt2").transposed
EARLY_STOPPING = {False: "false", True: "true", "never": "never"}     # theirs: ours
OPTIONS = {     # theirs; ours
    "free": ({}, {}),
    # Padding counts as text in their n-grams: with PAD banned as a word it cannot matter.
    "no repeats": (dict(no_repeat_ngram_size=2, min_new_tokens=5, bad_words_ids=[[PAD], [9]]),
                   dict(no_repeat_ngram_size=2, min_new_tokens=5, banned_tokens=(PAD, 9))),
    "forced end": (dict(forced_eos_token_id=EOS), dict(forced_eos_token_id=EOS)),
}


def both(seed):
    """The same random weights in their GPT-2 and in ours."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=V, n_positions=80, n_embd=24, n_layer=2, n_head=4,
                                     bos_token_id=PAD, eos_token_id=EOS, pad_token_id=PAD)
    theirs = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    middle = theirs.transformer.ln_f.bias
    theirs.transformer.wte.weight.data[EOS] += (0.5 + 0.1 * seed) * middle / middle.norm()
    ours = GPT2(GPT2Config(V, 80, 24, 2, 4)).eval().requires_grad_(False)
    state = {name.removeprefix("transformer."): x for name, x in theirs.state_dict().items()}
    del state["lm_head.weight"]
    ours.load_state_dict({name: x.T if name.endswith(TRANSPOSED) else x
                          for name, x in state.items()})
    return theirs, ours


def their_texts(model, prompts, **options):
    """What their `generate` makes of each prompt, padded on the left, without the end."""
    T = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (T - len(p)) + p for p in prompts])                 # (B, T)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])       # (B, T)
    rows = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW,
                          **options)[:, T:].tolist()
    return [row[:row.index(EOS)] if EOS in row else row for row in rows]


@pytest.fixture
def prompts():
    torch.manual_seed(4)
    return [torch.randint(2, V, (n,)).tolist() for n in (7, 1, 12, 4)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
def test_greedy_decoding_is_theirs(prompts, option, padded):
    """Would catch: a constraint that holds a token too early or too late, padding that is seen."""
    theirs_options, our_options = OPTIONS[option]
    for seed in (0, 9):
        theirs, ours = both(seed)
        for batch in [prompts] if padded else [[p] for p in prompts]:
            texts = generate(ours, batch, Constraints(EOS, MAX_NEW, **our_options))
            assert texts == their_texts(theirs, batch, **theirs_options)


GRID = [(size, penalty, option, stop) for size, penalty in ((2, 1.0), (3, 0.8), (5, 1.2), (6, 0.0))
        for option in OPTIONS for stop in EARLY_STOPPING]
QUICK = [(2, 1.0, "free", False), (3, 0.8, "no repeats", "never"), (5, 1.2, "forced end", True),
         (6, 0.0, "free", "never")]


@pytest.mark.parametrize("size, penalty, option, stop", [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in GRID])
def test_beam_search_is_theirs(prompts, size, penalty, option, stop):
    """Would catch: a beam's past mixed up, an end that is taken or left at the wrong moment, a
    length off by one in the penalty, another moment to stop.
    """
    theirs_options, our_options = OPTIONS[option]
    constraints, ended = Constraints(EOS, MAX_NEW, **our_options), 0
    for seed in (3, 9):
        theirs, ours = both(seed)
        for batch in (prompts, prompts[1:2]):
            expected = their_texts(theirs, batch, num_beams=size, length_penalty=penalty,
                                   early_stopping=stop, **theirs_options)
            state = DecodingState(ours, batch, None, MAX_NEW, size)
            found = beam_search(state, constraints, size, penalty, EARLY_STOPPING[stop])
            texts = [row for row, _ in found]
            assert texts == expected
            ended += sum(len(row) < MAX_NEW - 1 for row in texts)
    assert ended                                # not every text was as long as it may be
