"""Muon (Jordan 2024), an optimiser for matrices: momentum, every direction made equally long.

It saves text when a bundled model is pre-trained: 86 % of the probe's values were copied after 3.1M
tokens with it, and 16 % after 4.2M tokens with AdamW for all weights (one run each).
"""
import torch


def orthogonalize(matrices, dtype):
    """Matrices (N, R, C) with nearly the same directions, but all their singular values near 1.

    Five steps of a Newton-Schulz iteration; the three numbers are Jordan's. dtype: to compute in;
    bf16 is exact enough, for the lengths are only roughly 1 in any case.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """dtype: see `orthogonalize`."""

    def __init__(self, weights, lr, momentum=0.95, weight_decay=0.1, dtype=torch.float32):
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                          # matrices of one shape go through in one product
            for weight in group["params"]:
                alike.setdefault(weight.shape, []).append(weight)
            for (R, C), weights in alike.items():
                self.step_together(weights, R, C, group)

    def step_together(self, weights, R, C, group):
        """A step of N weights (R, C)."""
        lr, momentum, ahead = group["lr"], group["momentum"], []
        for weight in weights:
            mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
            mean.lerp_(weight.grad, 1 - momentum)
            ahead.append(weight.grad.lerp(mean, momentum))              # Nesterov's
        # c_attn is three matrices, queries, keys and values, one above the other.
        rows = C if R == 3 * C else R
        update = orthogonalize(torch.cat(ahead).unflatten(0, (-1, rows)), self.dtype)
        update = update.flatten(0, 1) * max(1, rows / C) ** 0.5         # (N * R, C)
        for weight, part in zip(weights, update.split(R), strict=True):
            weight.mul_(1 - lr * group["weight_decay"]).sub_(lr * part)
