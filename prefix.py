"""The paper: a prefix of P learned keys and values in front of every layer of a frozen language
model.

Li & Liang 2021, section 4. Equation 3: h_i = P_theta[i, :] where i is a prefix position, and
LM_phi(z_i, h_<i) elsewhere; only theta learns. Section 4.3: P_theta[i, :] = MLP_theta(P'_theta[i,
:]), which is easier to train than P_theta itself; afterwards only P_theta is kept (`fold`). A
prefix is plain data to the model: a tensor (L, 2, 1, H, P, D), the keys (0) and values (1) of every
layer; for BART three of them, its `Places`. train.py trains one, sample.py puts one in front. Not
here: the loop, attention (model.py). Letters as in model.py.
"""
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from checkpoint import UNREADABLE, why
from model import Cache, Places, attend
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


class Prefixes(nn.ModuleDict):
    """BART's: at each place (see `Places`) that is used a `Prefix` with its own table and MLP.

    config: the frozen BART's. lengths: {place: P}; a place that is left out has no prefix.
    """

    def __init__(self, config, lengths, mid_dim=800, init="random"):
        if not lengths or not set(lengths) <= set(Places._fields):
            raise ValueError(f"got prefixes at {', '.join(lengths) or 'no place'}; expected one or "
                             f"more of {', '.join(Places._fields)}")
        super().__init__({place: Prefix(config.at(place), length, mid_dim, init)
                          for place, length in lengths.items()})
        sizes = {place: config.at(place) for place in Places._fields}
        self.nothing = {place: (s.n_layer, 2, 1, s.n_head, 0, s.n_embd // s.n_head)
                        for place, s in sizes.items()}                  # the shape of length 0

    def complete(self, found):
        """`Places` of {place: tensor}; what is not there gets the length 0."""
        like = next(iter(found.values()))
        return Places(*(found.get(place, like.new_empty(shape))
                        for place, shape in self.nothing.items()))

    def forward(self):
        return self.complete({place: prefix() for place, prefix in self.items()})

    def fold(self):
        return self.complete({place: prefix.fold() for place, prefix in self.items()})

    def start_from(self, target, steps=500, lr=1e-4):
        """Start each prefix at its own part of `target`; returns the mean of the errors left."""
        left = [prefix.start_from(getattr(target, place), steps, lr)
                for place, prefix in self.items()]
        return sum(left) / len(left)

    def stored(self):
        return sum(prefix.stored() for prefix in self.values())

    keep, kept = Prefix.keep, Prefix.kept       # one file holds them all


@torch.no_grad()
def keys_and_values(model, ids):
    """What the frozen model itself computes for the words `ids`, a list of P tokens: (L, 2, 1, H,
    P, D), of BART `Places`.

    As a prefix of GPT-2 it is exactly those words put in front of the text (a hard prompt):
    attention sees nothing of a token but its key and value, and the text's positions start at P
    either way. Of BART, "cross" is exactly a source that begins with those words; "encoder" and
    "decoder" are nearly that, for there the text keeps its positions, and the words never see it.
    """
    if model.architecture == "bart":
        kept, words = [], torch.tensor([ids], device=model.wte.weight.device)   # (1, P)

        def keep(q, k, v, *rest):               # every attention of BART passes by here, in order
            kept.append(torch.stack((k, v)))                                    # (2, 1, H, P, D)
            return attend(q, k, v, *rest)
        model(words, memory=model.encode(words, attend=keep), attend=keep)
        inside = model.config.encoder_layers
        return Places(torch.stack(kept[:inside]), torch.stack(kept[inside::2]),
                      torch.stack(kept[inside + 1::2]))                 # (L, 2, 1, H, P, D) each
    cache = Cache(model, batch=1, room=len(ids))
    model(torch.tensor([ids], device=model.wte.weight.device), cache=cache)
    return cache.kv


def parts(prefix):
    """The tensors of a folded prefix: one of GPT-2, three of BART."""
    return prefix if isinstance(prefix, Places) else (prefix,)


def counts(learner, model):
    """One line: how many numbers are trained and stored, and their share of the model's."""
    trained = sum(p.numel() for p in learner.parameters())
    stored, whole = learner.stored(), sum(p.numel() for p in model.parameters())
    return (f"{trained:,} numbers trained ({trained / whole:.2%} of the model's {whole:,}), "
            f"{stored:,} stored ({stored / whole:.2%})")


def save_prefix(path, folded, model):
    """Write a folded prefix (L, 2, 1, H, P, D), or `Places` of them, and the fingerprint of the
    model it belongs to.
    """
    kept = [part.float().cpu() for part in parts(folded)]
    with whole_file(path) as file:
        torch.save({"format": FORMAT, "fingerprint": model.fingerprint,
                    "prefix": kept[0] if len(kept) == 1 else dict(zip(model.places, kept))}, file)


def load_prefix(path, model):
    """The folded prefix in `path`, on the model's device and in its dtype: (L, 2, 1, H, P, D), or
    `Places` of them.

    Raises ValueError for a file that is not a prefix, or a prefix trained with other weights: keys
    and values mean nothing to a model that did not help to find them.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise KeyError("format")
        mark, prefix, wanted = saved["fingerprint"], saved["prefix"], model.no_prefix()
        if mark == model.fingerprint:           # a BART's has other parts than a GPT-2's
            prefix = Places(**prefix) if isinstance(wanted, Places) else prefix
            shapes = [(tuple(part.shape), (*like.shape[:4], part.size(4), like.size(5)))
                      for part, like in zip(parts(prefix), parts(wanted))]  # (L, 2, 1, H, P, D)
    except UNREADABLE as error:
        raise ValueError(f"got {path}, which is no prefix ({why(error)}); expected the prefix.pt "
                         "of a run of train.py with this kind of model") from error
    if mark != model.fingerprint:
        raise ValueError(f"got {path}, a prefix for the model {mark!r}, expected one for the model "
                         f"that is loaded, {model.fingerprint!r}; load the one it was trained with")
    for shape, wanted in shapes:
        if shape != wanted:
            raise ValueError(f"got {path} with a prefix of shape {shape}, expected {wanted}; train "
                             "it again")
    return prefix.to(model.wte.weight)
