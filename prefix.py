"""The paper: a prefix of P learned keys and values in front of every layer of a frozen language
model.

Li & Liang 2021, section 4. Equation 3: h_i = P_theta[i, :] where i is a prefix position, and
LM_phi(z_i, h_<i) elsewhere; only theta learns. Section 4.3: P_theta[i, :] = MLP_theta(P'_theta[i,
:]), which is easier to train than P_theta itself; afterwards only P_theta is kept (`fold`). A
prefix is plain data to the model: a tensor (L, 2, 1, H, P, D), the keys (0) and values (1) of every
layer. train.py trains one, sample.py puts one in front. Not here: the loop, attention (model.py).
Letters as in model.py.
"""
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from model import UNREADABLE, Cache, why
from plumbing import whole_file

FORMAT = "prefix-tuning 1"


class Prefix(nn.Module):
    """P_theta. Calling it evaluates the MLP once and gives the keys and values of all layers.

    config: the frozen model's. length: P. mid_dim: k, the MLP's hidden width (512 for tables, 800
    for XSum in the paper); 0 leaves the MLP out and learns the P x 2LC numbers directly. init:
    "random" draws the table from N(0, 1), PyTorch's default for an embedding; "uniform" from U(0,
    1), the paper's random initialisation for low data. `start_from` starts from real words.
    """

    def __init__(self, config, length, mid_dim=512, init="random"):
        super().__init__()
        if length < 1 or mid_dim < 0:
            raise ValueError(f"got a prefix of length {length} with an MLP of width {mid_dim}; "
                             "expected at least 1, and at least 0 (0: no MLP)")
        L, C = config.n_layer, config.n_embd
        self.split = (L, 2, config.n_head, C // config.n_head)          # (L, 2, H, D)
        draw = {"random": torch.randn, "uniform": torch.rand}[init]
        # The paper makes P' narrow (k wide); its official code makes it as wide as the model, and k
        # the width of the hidden layer. Differs from the paper: this is the form of the code, which
        # gave the paper's numbers.
        self.table = nn.Parameter(draw(length, C if mid_dim else 2 * L * C))
        self.mlp = None
        if mid_dim:
            self.mlp = nn.Sequential(
                nn.Linear(C, mid_dim), nn.Tanh(), nn.Linear(mid_dim, 2 * L * C))

    def forward(self):
        """P_theta as the model takes it: (L, 2, 1, H, P, D), one copy for the whole batch."""
        flat = self.table if self.mlp is None else self.mlp(self.table)          # (P, 2LC)
        # Column ((2 * layer + {K: 0, V: 1}) * H + head) * D + i: the order of the official code and
        # PEFT.
        heads = flat.unflatten(1, self.split)                                   # (P, L, 2, H, D)
        return heads.permute(1, 2, 3, 0, 4).unsqueeze(2)                        # (L, 2, 1, H, P, D)

    def fold(self):
        """P_theta without theta's MLP: what is stored and decoded with. It changes no logit."""
        with torch.no_grad():
            return self().clone(memory_format=torch.contiguous_format)          # (L, 2, 1, H, P, D)

    def stored(self):
        """How many numbers a task takes up on disk: those of the folded prefix."""
        return self.fold().numel()

    def keep(self, directory, model):
        """Write the prefix as it is now, folded, to DIRECTORY/prefix.pt."""
        save_prefix(Path(directory) / "prefix.pt", self.fold(), model)

    def kept(self, directory, model):
        """(model, prefix) as `keep` wrote it, to decode with."""
        return model, load_prefix(Path(directory) / "prefix.pt", model)

    def start_from(self, target, steps=500, lr=1e-4):
        """Start at the keys and values `target` (L, 2, 1, H, P, D), not at random (section 7.4).

        Without an MLP they are copied. With one, theta is fitted to them: 500 steps of Adam on the
        mean squared error, as in the official low-data code. Returns the error that is left.
        """
        flat = target.squeeze(2).permute(3, 0, 1, 2, 4).flatten(1).float()       # (P, 2LC)
        if self.mlp is None:
            self.table.data.copy_(flat)
            return 0.0
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for _ in range(steps):
            loss = F.mse_loss(self.mlp(self.table), flat)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return F.mse_loss(self.mlp(self.table), flat).item()


@torch.no_grad()
def keys_and_values(model, ids):
    """What the frozen model itself computes for the words `ids`, a list of P tokens: (L, 2, 1, H,
    P, D).

    As a prefix it is exactly those words put in front of the text (a hard prompt): attention sees
    nothing of a token but its key and value, and the text's positions start at P either way.
    """
    cache = Cache(model, batch=1, room=len(ids))
    model(torch.tensor([ids], device=model.wte.weight.device), cache=cache)
    return cache.kv


def stacked(prefixes, B):
    """Prefixes of different lengths as one of B rows (L, 2, B, H, P, D), and which of its keys are
    real, (B, P).

    prefixes: a list of B folded ones (L, 2, 1, H, P_b, D), or one (L, 2, 1 or B, H, P, D), which
    stays as it is. A shorter one stands on the right, next to the text; what is in front of it is
    no key, so every row gets what it would get alone.
    """
    if not isinstance(prefixes, list):
        return prefixes, prefixes.new_ones(B, prefixes.size(4), dtype=torch.bool)
    P = max(p.size(4) for p in prefixes)
    wide = [F.pad(p, (0, 0, P - p.size(4), 0)) for p in prefixes]       # (L, 2, 1, H, P, D)
    gap = torch.tensor([[P - p.size(4)] for p in prefixes], device=prefixes[0].device)  # (B, 1)
    # (L, 2, B, H, P, D) and (B, P)
    return torch.cat(wide, 2), torch.arange(P, device=gap.device) >= gap


def counts(learner, model):
    """One line: how many numbers are trained and stored, and their share of the model's."""
    trained = sum(p.numel() for p in learner.parameters())
    stored, whole = learner.stored(), sum(p.numel() for p in model.parameters())
    return (f"{trained:,} numbers trained ({trained / whole:.2%} of the model's {whole:,}), "
            f"{stored:,} stored ({stored / whole:.2%})")


def save_prefix(path, folded, model):
    """Write a folded prefix (L, 2, 1, H, P, D) and the fingerprint of the model it belongs to."""
    with whole_file(path) as file:
        torch.save({"format": FORMAT, "fingerprint": model.fingerprint,
                    "prefix": folded.float().cpu()}, file)


def load_prefix(path, model):
    """The folded prefix in `path`, on the model's device and in its dtype: (L, 2, 1, H, P, D).

    Raises ValueError for a file that is not a prefix, or a prefix trained with other weights: keys
    and values mean nothing to a model that did not help to find them.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise KeyError("format")
        mark, prefix = saved["fingerprint"], saved["prefix"]
        wanted, P = model.no_prefix().shape, prefix.size(4)     # (L, 2, 1, H, 0, D)
    except UNREADABLE as error:
        raise ValueError(f"got {path}, which is no prefix ({why(error)}); expected the prefix.pt "
                         "of a run of train.py") from error
    if mark != model.fingerprint:
        raise ValueError(f"got {path}, a prefix for the model {mark!r}, expected one for the model "
                         f"that is loaded, {model.fingerprint!r}; load the one it was trained with")
    if prefix.shape != (*wanted[:4], P, wanted[5]):
        raise ValueError(f"got {path} with a prefix of shape {tuple(prefix.shape)}, expected "
                         f"{tuple(wanted[:4])} + (P, {wanted[5]}); train it again")
    return prefix.to(model.wte.weight)
