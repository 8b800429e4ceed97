"""The faster forms of fast/, and prefixes side by side, with grouped and rotated keys."""
import pytest
import torch
from conftest import (
    batch_of,
    loss_and_gradients,
    random_llama,
    shared_pairs,
    some_pairs,
    some_prefix,
    some_trainer,
)

from data.batches import Pair
from decoding.beam import beam_search
from decoding.constraints import Constraints
from decoding.state import DecodingState
from model import ExplicitAttention
from prefix import target_loss
from pretrained.architectures import new_prefix
from sample import generate, sample_token

pytest.importorskip("fast.forms", reason="the folder fast/ is not here")
from fast import tries  # noqa: E402
from fast.checkpointing import checkpoint_blocks  # noqa: E402
from fast.cuda_graph import RecordedGenerate  # noqa: E402
from fast.frozen_head import frozen_target_loss  # noqa: E402
from fast.sdpa_attention import SDPAAttention  # noqa: E402

EOS = 256
CLOSE = dict(rtol=1e-9)         # sums in float64, in another order; the angles are the same


class Apart(ExplicitAttention):
    """So the prefix is left outside the cache, as for the fused kernel."""
    joins_prefix = False


@pytest.fixture
def model():
    return random_llama()


@pytest.fixture
def prompts():
    torch.manual_seed(4)
    return [torch.randint(256, (n,)).tolist() for n in (7, 1, 12, 4)]


@pytest.fixture
def prefixes():
    """One for each prompt, of different lengths; one is of length 0."""
    torch.manual_seed(5)
    return [torch.randn(3, 2, 1, 2, P, 4, dtype=torch.float64) for P in (5, 0, 11, 1)]


def ending_often():
    """A Llama with a head of its own that ends its texts now and then."""
    from llama.model import Llama, LlamaConfig
    torch.manual_seed(1)
    model = Llama(LlamaConfig(257, 64, 20, 28, 3, 6, 2, 4, tie_word_embeddings=False)).double()
    for name, weight in model.named_parameters():
        weight.data += 0 if name == "lm_head.weight" else 0.3 * torch.randn_like(weight)
    model.lm_head.weight.data[EOS] *= 2.5
    return model.requires_grad_(False).eval()


def same(got, want):
    assert len(got) == len(want)
    for x, y in zip(got, want):
        assert torch.allclose(x, y, **CLOSE, atol=1e-9 * y.abs().max())


def searched(model, prompts, prefix, constraints, num_beams):
    state = DecodingState(model, prompts, prefix, constraints.max_new_tokens, num_beams)
    return beam_search(state, constraints, num_beams)


# ---- decoding

def test_many_prefixes_in_one_batch_are_each_alone(model, prompts, prefixes):
    """Would catch: a gap in front of a short prefix that is seen, or that turns the text further.
    """
    together = DecodingState(model, prompts, prefixes, 8)
    alone = [DecodingState(model, [p], prefix, 8) for p, prefix in zip(prompts, prefixes)]
    for _ in range(5):
        for row, one in enumerate(alone):
            same([together.logits[row]], [one.logits[0]])
        newest = together.logits.argmax(-1)[:, None]                            # (B, 1)
        together.logits = together.step(newest)[:, 0]
        for row, one in enumerate(alone):
            one.logits = one.step(newest[row:row + 1])[:, 0]


def test_beam_of_one_is_greedy_and_beams_in_a_batch_are_each_alone(prompts, prefixes):
    """Would catch: beams that are rotated by the column they stand in, a tree that mixes rows."""
    model, rules = ending_often(), Constraints(EOS, 20)
    greedy = generate(model, prompts, rules, prefixes)
    assert [row for row, _ in searched(model, prompts, prefixes, rules, 1)] == greedy
    assert len({len(row) for row in greedy}) > 1                # some ended by themselves
    together = searched(model, prompts, prefixes, rules, 4)
    for (text, score), prompt, prefix in zip(together, prompts, prefixes):
        (alone, its), = searched(model, [prompt], prefix, rules, 4)
        assert text == alone and abs(score - its) < 1e-8        # float64, 20 tokens


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
@pytest.mark.parametrize("ends", [(), (7, 200, 31)], ids=["one end", "several ends"])
def test_recorded_steps_give_the_tokens_of_generate(prompts, prefixes, joined, ends):
    """Would catch: a cache of query heads, a key that is rotated by its column in a wider cache, a
    text that goes on behind an end that was not learned.
    """
    model, lengths = ending_often(), set()
    model.lm_head.weight.data[list(ends)] *= 2
    if not joined:
        model.attention = Apart()
    rules, decode = Constraints(EOS, 20, 2, (5,), more_ends=ends), RecordedGenerate(None)
    for texts in (prompts, [[9, 8], [7], [6, 5, 4], [3] * 9]):
        rows = generate(model, texts, rules, prefixes)
        assert decode(model, texts, rules, prefixes, sample_token) == rows
        assert not {EOS, *ends} & {token for row in rows for token in row}
        lengths |= set(map(len, rows))
    assert len(lengths) > 2 and len(decode.steps) == 1


# ---- learning

def test_pairs_that_share_a_source_have_the_gradient_they_have_alone(model):
    """Would catch: a token that is rotated by its place in the row and not by what it sees, also
    where the blocks are computed twice.
    """
    learner, pairs = some_prefix(model), shared_pairs()
    alone = loss_and_gradients(model, learner, batch_of(model, pairs))
    batch = tries.collate(pairs, model)
    assert batch.inputs["ids"].numel() < 0.5 * batch_of(model, pairs).inputs["ids"].numel()
    same(loss_and_gradients(model, learner, batch), alone)
    checkpoint_blocks(model)
    same(loss_and_gradients(model, learner, batch), alone)
    same(loss_and_gradients(model, learner, batch_of(model, pairs)), alone)


def test_the_dev_loss_of_tries_is_that_of_pair_by_pair(model):
    """Would catch: a row of tries longer than the positions that is refused, pairs lost."""
    pairs = shared_pairs() + [Pair([5, 6, 7, *range(40 + n)], 3) for n in range(5)]
    losses = [some_trainer(model, dev=dev).dev_loss() for dev in (
        tries.dev_batches(pairs, 16, model), [batch_of(model, [pair]) for pair in pairs])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("kind", [random_llama, ending_often], ids=["tied", "own head"])
def test_the_frozen_head_is_the_head(kind):
    """Would catch: the word embedding taken for the head of a model that has its own."""
    model = kind()
    learner, batch = some_prefix(model), batch_of(model, shared_pairs())
    same(loss_and_gradients(model, learner, batch, frozen_target_loss),
         loss_and_gradients(model, learner, batch))


@pytest.mark.parametrize("kind", [random_llama, ending_often], ids=["tied", "own head"])
def test_packed_weights_are_the_weights(kind):
    """Would catch: a head of its own that is left out, or packed as the word embedding."""
    from fast.packed import pack, why_not_packable
    model, packed = kind().float(), kind().float()
    if why_not_packable(model):
        pytest.skip(f"nothing can be packed here: {why_not_packable(model)}")
    pack(packed, learning=True)
    learner, batch = some_prefix(model), batch_of(model, some_pairs(4))
    for got, want in zip(loss_and_gradients(packed, learner, batch),
                         loss_and_gradients(model, learner, batch)):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()      # fp32, in another order


def test_a_llama_with_sdpa_is_that_llama(model, prompts, prefixes):
    """Loss and gradients, plain and in tries; tokens, greedy and by beams. Would catch: heads that
    only the explicit form sees repeated.
    """
    fast, learner = random_llama(), some_prefix(model)
    fast.attention = SDPAAttention()
    for batch in (batch_of(model, shared_pairs()), tries.collate(shared_pairs(), model)):
        same(loss_and_gradients(fast, learner, batch), loss_and_gradients(model, learner, batch))
    slow, fast = ending_often(), ending_often()
    fast.attention, rules = SDPAAttention(), Constraints(EOS, 8)
    assert generate(fast, prompts, rules, prefixes) == generate(slow, prompts, rules, prefixes)
    texts = [[row for row, _ in searched(m, prompts, prefixes, rules, 3)] for m in (fast, slow)]
    assert texts[0] == texts[1]


def test_a_llama_with_fused_attention_is_that_llama():
    """Would catch: repeated heads whose strides the kernel misreads, or whose gradients are not
    summed into the few.
    """
    pytest.importorskip("triton", reason="the fused kernels are in Triton: pip install triton")
    from fast.triton_attention import TritonAttention
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs, found = [Pair([3, 5, 7, 2, 16, 8], 2), Pair([4, 1, 9], 1)], []
    for fused, dtype in ((True, torch.float32), (False, torch.float64)):
        model = random_llama(n_layer=2).to(device, dtype)
        torch.manual_seed(4)
        learner = new_prefix(model, 5, 0).to(dtype)
        if fused:
            model.attention = TritonAttention(device, torch.float32)
        _, gradient = loss_and_gradients(model, learner, batch_of(model, pairs))
        found.append(gradient.double())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < 1e-4                 # fp32 through two layers with weights of order 1


def test_in_bf16_forms_are_no_worse_than_the_explicit_form():
    """Measured against float64. Would catch: angles, norms or sums that a form takes in bf16."""
    exact, learner = random_llama(), some_prefix(random_llama(), mid_dim=0)
    half = random_llama().bfloat16()
    for weight, rounded in zip(exact.parameters(), half.parameters()):
        weight.data = rounded.double()          # so that only the arithmetic differs
    prefix = learner.fold().bfloat16()
    pairs = shared_pairs()

    def gradient(model, prefix, batch, loss=target_loss):
        prefix = prefix.clone().requires_grad_()
        return torch.autograd.grad(loss(model, prefix, batch), prefix)[0].double()
    truth = gradient(exact, prefix.double(), batch_of(exact, pairs))
    plain = (gradient(half, prefix, batch_of(half, pairs)) - truth).norm()
    sdpa = random_llama().bfloat16()
    sdpa.attention = SDPAAttention()
    for model, batch, loss in ((sdpa, batch_of(half, pairs), target_loss),
                               (half, tries.collate(pairs, half), target_loss),
                               (half, batch_of(half, pairs), frozen_target_loss)):
        error = (gradient(model, prefix, batch, loss) - truth).norm()
        # Twice, for each of the two is one draw of the same rounding errors.
        assert error <= 2 * plain < 0.5 * truth.norm()
