"""What the tests of the forms of attention share: unfriendly shapes, and who is as good as whom."""
import torch

from model import ExplicitAttention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ATOL = 1e-6     # fp32 sums of up to 100 numbers of order 1, in another order: some 1e-7
EXPLICIT = ExplicitAttention()
SHAPES = {  # T, S, P, D
    "no prefix": (5, 5, 0, 64),
    "no text": (4, 0, 7, 16),
    "one query": (1, 9, 20, 64),
    "a prefix longer than the text": (6, 6, 40, 64),
    "a prefix as long as the text": (16, 16, 16, 32),
    "no multiple of a tile": (35, 35, 5, 64),
    "keys read before": (20, 50, 3, 24),
    "more queries than keys": (23, 4, 2, 16),
    "a prefix of two tiles": (7, 7, 70, 80),
    "the last key alone in its tile": (32, 32, 33, 64),
    "a narrow head": (9, 9, 4, 6),
}
MASKS = [(False, True, 1), (True, False, 1), (True, True, 2)]       # padded, causal, rows of prefix


def tensors(T, S, P, D, rows=1, dtype=torch.float32, B=2, H=2):
    """q, k, v, pk and pv, which want gradients."""
    torch.manual_seed(1)
    shapes = (B, H, T, D), (B, H, S, D), (B, H, S, D), (rows, H, P, D), (rows, H, P, D)
    return [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


def all_seen(K, B=1):
    return torch.ones(B, K, dtype=torch.bool, device=DEVICE)


def ragged(B, K):
    """A key mask: some are missing, all at the front of row 0 and at the end of row 1."""
    key_mask = torch.rand(B, K) < 0.8
    key_mask[0, :(K + 1) // 2], key_mask[1, K // 2:] = False, False
    return key_mask.to(DEVICE)


def call(form, inputs, key_mask, causal, tree=None):
    return form(*inputs, form.mask(key_mask, inputs[0].size(2), causal, tree))


def answers(form, inputs, key_mask, causal, g, tree=None):
    """The output, and the gradient of each input for the output's gradient g."""
    out = call(form, inputs, key_mask, causal, tree)
    return out, *torch.autograd.grad(out, inputs, g.to(out.dtype), materialize_grads=True)


def assert_as_good_as_the_explicit_form(form, inputs, key_mask, causal, tree=None):
    """No further from the truth, which is float64, than twice what model.attend is in this dtype.

    Twice, because Triton's interpreter cuts bf16 off where a GPU rounds it: double the error.
    """
    g = torch.randn(inputs[0].shape, device=DEVICE).to(inputs[0].dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = answers(EXPLICIT, doubles, key_mask, causal, g, tree)
    ours, plain = (answers(f, inputs, key_mask, causal, g, tree) for f in (form, EXPLICIT))
    for name, x, y, truth in zip(("out", "q", "k", "v", "pk", "pv"), ours, plain, exact):
        assert x.shape == truth.shape and x.dtype == inputs[0].dtype and x.isfinite().all(), name
        if truth.numel():
            error, allowed = ((z.double() - truth).square().mean().sqrt() for z in (x, y))
            assert error <= 2 * allowed + ATOL, f"{name}: {error:.1e}, explicit form {allowed:.1e}"


def assert_a_query_that_sees_nothing_gets_zero(form):
    """Row by row: no prefix, and the text begins at its third token."""
    inputs, key_mask = tensors(5, 5, 3, 16), all_seen(8, B=2)
    key_mask[:, :5] = False
    out = call(form, inputs, key_mask, True)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in grads)
    assert torch.equal(grads[0][:, :, :2], torch.zeros_like(out[:, :, :2]))
    assert not grads[3].any() and not grads[4].any()        # a prefix that no query saw
