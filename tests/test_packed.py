"""Packed weights are the same weights: another order in memory, the same logits."""
import pytest
import torch
from conftest import random_gpt2

import sample
from checkpoint import load

packed = pytest.importorskip("packed", reason="packed.py, a side door, is not here")

if packed.possible(random_gpt2().float()):
    pytest.skip(packed.possible(random_gpt2().float()), allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_weights_change_no_logit(dtype):
    """Would catch: a bias or a transpose lost, a layer left out; with batches of several sizes."""
    plain, fast = random_gpt2().to(dtype), random_gpt2().to(dtype)
    packed.pack(fast)
    assert not [m for m in fast.modules() if isinstance(m, torch.nn.Linear)]
    exact = random_gpt2().to(dtype).double()            # the same rounded weights, exactly added
    for B, T in ((1, 1), (3, 1), (4, 1), (1, 17), (9, 30)):
        torch.manual_seed(B)
        ids = torch.randint(256, (B, T))                                        # (B, T)
        wanted = exact.head(exact(ids))                                         # (B, T, V)
        errors = [(m.head(m(ids)).double() - wanted).abs().max() for m in (plain, fast)]
        # As good as the plain form: twice its own rounding error, and 1e-6 of the range for fp32.
        assert errors[1] <= 2 * errors[0] + 1e-6 * wanted.abs().max()


def test_pack_is_done_or_refused_aloud(model_directory):
    """Would catch: --pack yes that does nothing, or float64 that is packed and fails later."""
    def speaker(pack, dtype):
        return sample.Speaker(sample.Settings(model=str(model_directory), device="cpu",
                                              pack=pack, dtype=dtype))
    for pack, dtype, expected in (("auto", "fp32", True), ("no", "fp32", False),
                                  ("yes", "bf16", True), ("auto", "fp64", False)):
        layer = speaker(pack, dtype).model.h[0].mlp.c_fc
        assert isinstance(layer, packed.Packed) == expected
    with pytest.raises(ValueError, match="got --pack yes, but its weights are torch.float64"):
        speaker("yes", "fp64")
    assert load(model_directory).h[0].mlp.c_fc.weight.shape == (96, 24)
