"""Packed weights are the same weights: another order in memory, the same logits."""
import pytest
import torch
from conftest import batch_of, random_bart, random_gpt2

from data.batches import Pair
from fast import packed
from prefix import target_loss, tensors_of

if packed.why_not_packable(random_gpt2().float()):
    pytest.skip(packed.why_not_packable(random_gpt2().float()), allow_module_level=True)
BF16 = pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.skipif(
    not packed.has_avx512(), reason="this CPU has no AVX-512, which packed bf16 weights want"))
DTYPES = [pytest.param(torch.float32, id="fp32"), BF16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [random_gpt2, random_bart])
def test_packed_weights_change_no_logit(kind, dtype):
    """Would catch: a bias or a transpose lost, a layer or the head left out; with batches of many
    sizes.
    """
    plain, fast = kind().to(dtype), kind().to(dtype)
    packed.pack(fast)
    assert not [m for m in fast.modules() if isinstance(m, torch.nn.Linear)]
    # Of bf16 weights it would give logits in bf16.
    assert (getattr(fast.head, "__self__", None) is not fast) == (dtype == torch.float32)
    exact = kind().to(dtype).double()                   # the same rounded weights, exactly added
    for B, T in ((1, 1), (3, 1), (4, 1), (1, 17), (9, 30)):
        torch.manual_seed(B)
        ids = torch.randint(256, (B, T))                                        # (B, T)
        source = {"source": ids} if kind is random_bart else {}
        logits, ours, wanted = (m.head(m.hidden_states(ids, **source)).double()
                                for m in (plain, fast, exact))                  # (B, T, V)
        errors = [(found - wanted).abs().max() for found in (logits, ours)]
        # As good as the plain form: twice its own rounding error, and 1e-6 of the range for fp32.
        assert errors[1] <= 2 * errors[0] + 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [random_gpt2, random_bart], ids=["gpt2", "bart"])
@pytest.mark.parametrize("pairs", [[Pair([5, 6, 7, 8, 9, 10], 2), Pair([5, 6, 7, 11], 3)],
                                   [Pair([5, 6, 7], 2)]], ids=["two pairs", "a single token"])
def test_packed_weights_change_no_gradient(kind, dtype, pairs):
    """Would catch: a backward pass through the wrong transpose, a bias in it, a layer without one;
    rows too few for the kernel whose gradient is lost, or comes several times.
    """
    plain, fast, exact = kind().to(dtype), kind().to(dtype), kind().to(dtype).double()
    packed.pack(fast, learning=True)
    batch = batch_of(plain, pairs)
    torch.manual_seed(3)
    start = [torch.randn(*part.shape[:4], 4, part.size(5)).to(dtype)
             for part in tensors_of(plain.empty_prefix())]
    gradients = []
    for model in (plain, fast, exact):
        prefix = [part.to(model.dtype).requires_grad_() for part in start]
        whole = type(model.empty_prefix())(*prefix) if kind is random_bart else prefix[0]
        gradients.append(torch.autograd.grad(target_loss(model, whole, batch), prefix))
    for a, b, wanted in zip(*gradients, strict=True):
        errors = [(x.double() - wanted).norm() for x in (a, b)]
        # As good as the plain form: twice its own rounding error, and 1e-6 of the size for fp32.
        assert errors[1] <= 2 * errors[0] + 1e-6 * wanted.norm()


def test_a_head_of_its_own_is_no_word_embedding():
    """Would catch: a model whose head is a layer of its own, and is replaced by the embedding; that
    layer packed once more, where the head reads the weight as it was.
    """
    class Other(type(random_gpt2())):
        head_weight = property(lambda self: self.lm_head.weight)
    model, hidden = random_gpt2().float(), torch.randn(4, 24)
    model.__class__, model.lm_head = Other, torch.nn.Linear(24, 257, bias=False)
    wanted = hidden @ model.lm_head.weight.T
    packed.pack(model)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert torch.allclose(model.head(hidden), wanted, atol=1e-5)        # fp32, in another order


def test_what_cannot_be_packed_is_told_and_what_would_not_help_is_left(monkeypatch):
    """Would catch: float64 that is packed and fails later, bf16 on a CPU whose kernels have none,
    memory spent on a small model that gains nothing, or where it is slower: with AVX2 alone one row
    at a time, and the many of training.
    """
    assert "float64" in packed.why_not_packable(random_gpt2())
    model, half = random_gpt2().float(), random_gpt2().to(torch.bfloat16)
    for capability, large in (("AVX2", False), ("AVX2", True), ("AVX512", False), ("AVX512", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=capability: it)
        monkeypatch.setattr(packed, "LARGE", 1 if large else 2 ** 24)
        for rows, with_avx2 in ((1, False), (8, True), (500, False)):
            avx512 = capability == "AVX512"
            assert packed.helps(model, rows) == (large and (avx512 or with_avx2))
            assert packed.helps(half, rows) == (large and avx512)
        assert not packed.why_not_packable(model)
        assert ("no AVX-512" in packed.why_not_packable(half)) == (capability == "AVX2")
