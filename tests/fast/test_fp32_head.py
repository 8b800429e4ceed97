"""Logits in one product: the same function as the plain head's."""
import pytest
import torch

from fast import fp32_head
from model import linear_in_fp32


def test_the_product_of_a_gpu_has_an_fp32_result_and_a_gradient_of_the_hidden_states():
    """On the device "meta", which knows dtypes and shapes; a GPU compares the numbers. Would catch:
    a result in bf16, a gradient in fp32.
    """
    weight = torch.empty(257, 24, dtype=torch.bfloat16, device="meta")
    x = torch.empty(2, 5, 24, dtype=torch.bfloat16, device="meta", requires_grad=True)
    logits = fp32_head.linear_in_fp32(x, weight, weight[:, 0])
    assert logits.dtype == torch.float32 and logits.shape == (2, 5, 257)
    logits.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_product_of_a_gpu_is_the_plain_one(dtype):
    """Would catch: sums in half precision, another transpose in the gradient."""
    torch.manual_seed(3)
    weight, x = (torch.randn(n, 64, device="cuda").to(dtype) for n in (5000, 300))
    grad, found = torch.randn(300, 5000, device="cuda"), []
    for form in (linear_in_fp32, fp32_head.linear_in_fp32):
        x = x.detach().requires_grad_()
        y = form(x, weight, weight[:, 0])
        found += [y.detach(), torch.autograd.grad(y, x, grad)[0]]
    y, its_gradient, y_fast, gradient = found
    assert (y_fast - y).abs().max() < 1e-5 * y.abs().max()                      # sums of 64, fp32
    assert (gradient - its_gradient).float().norm() < 2 * torch.finfo(dtype).eps * \
        its_gradient.float().norm()
