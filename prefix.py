"""The paper: a prefix of P learned keys and values in front of every layer of a frozen language
model, and the loss that it learns from.

Li & Liang 2021, section 4. Equation 3: h_i = P_theta[i, :] where i is a prefix position, and
LM_phi(z_i, h_<i) elsewhere; only theta learns. Section 4.3: P_theta[i, :] = MLP_theta(P'_theta[i,
:]), which is easier to train than P_theta itself; after training only P_theta is stored (`fold`).
To a model a prefix is plain data: a tensor (L, 2, 1, H, P, D), the keys (0) and values (1) of every
layer. Not here: attention (model.py), the loop (train.py), files (pretrained/), the three prefixes
of an encoder-decoder (bart/prefix.py). Letters as in model.py.
"""
import torch
from torch import nn
from torch.nn import functional as F

from model import upcast


def flatten(prefix):
    """(L, 2, 1, H, P, D) -> (P, 2LHD): column ((2 * layer + {K: 0, V: 1}) * H + head) * D + i.

    That is the order of the official code's MLP, and of PEFT's files.
    """
    return prefix.squeeze(2).permute(3, 0, 1, 2, 4).flatten(1)                  # (P, 2LHD)


def unflatten(flat, shape):
    """The inverse of `flatten`; shape: (L, 2, 1, H, any, D), of the prefix that is wanted."""
    L, _, _, H, _, D = shape
    heads = flat.unflatten(1, (L, 2, H, D))                                     # (P, L, 2, H, D)
    return heads.permute(1, 2, 3, 0, 4).unsqueeze(2)                            # (L, 2, 1, H, P, D)


def tensors_of(prefix):
    """The tensors of a folded prefix: one, or three of an encoder-decoder."""
    return prefix if isinstance(prefix, tuple) else (prefix,)


class Prefix(nn.Module):
    """P_theta. Calling it evaluates the MLP once and gives the keys and values of all layers.

    empty: the model's `empty_prefix()`, or its upper layers; its shape tells L, H and D. width: C,
    of the model. length: P. mid_dim: k, the MLP's hidden width (512 for tables, 800 for XSum in the
    paper); 0 leaves the MLP out and learns P x 2LHD numbers directly. init: "random" draws the
    table from N(0, 1), PyTorch's default for an embedding; "uniform" from U(0, 1), the paper's
    random initialisation for low data; "words" as "random", until `initialize` is called.
    """
    loss_per = "pair"       # sums over a target, averages over the batch, as in the official code

    def __init__(self, empty, width, length, mid_dim=512, init="random"):
        super().__init__()
        if length < 1 or mid_dim < 0:
            raise ValueError(f"got a prefix of length {length} with an MLP of width {mid_dim}; "
                             "expected at least 1, and at least 0 (0: no MLP)")
        self.shape = empty.shape                                        # (L, 2, 1, H, 0, D)
        L, _, _, H, _, D = self.shape
        draw = {"random": torch.randn, "words": torch.randn, "uniform": torch.rand}[init]
        # Differs from the paper: its text makes P' narrow (k wide). Its official code, which gave
        # the numbers, makes P' as wide as the model, and k the width of the hidden layer.
        self.table = nn.Parameter(draw(length, width if mid_dim else L * 2 * H * D))
        self.mlp = None
        if mid_dim:
            self.mlp = nn.Sequential(
                nn.Linear(width, mid_dim), nn.Tanh(), nn.Linear(mid_dim, L * 2 * H * D))

    @classmethod
    def for_model(cls, model, length, mid_dim=512, init="random", n_layers=0):
        """A fresh prefix that fits `model`, for its upper n_layers; 0: for all."""
        return cls(model.empty_prefix()[-n_layers:], model.width, length, mid_dim,  # [-0:]: all
                   init).to(model.device)

    def forward(self):
        """P_theta as the model takes it: (L, 2, 1, H, P, D), one copy for the whole batch."""
        flat = self.table if self.mlp is None else self.mlp(self.table)         # (P, 2LHD)
        return unflatten(flat, self.shape)                                      # (L, 2, 1, H, P, D)

    @torch.no_grad()
    def fold(self):
        """P_theta as numbers, without the MLP: to store and to decode with. No logit changes."""
        return self().clone(memory_format=torch.contiguous_format)              # (L, 2, 1, H, P, D)

    def num_stored_parameters(self):
        """How many numbers a task takes up on disk: those of the folded prefix."""
        return self.fold().numel()

    def initialize(self, target, steps=500, lr=1e-4):
        """Start from the keys and values `target` (L, 2, 1, H, P, D), not at random (section 7.4).
        Where it has more layers than this prefix, the upper ones count.

        Without an MLP they are copied. With one, theta is fitted to them: 500 steps of Adam on the
        mean squared error, as in the official low-data code. Returns the error that is left.
        """
        flat = flatten(target[-self.shape[0]:]).float()                         # (P, 2LHD)
        if self.mlp is None:
            self.table.data.copy_(flat)
            return 0.0
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for _ in range(steps):
            error = F.mse_loss(self.mlp(self.table), flat)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        return F.mse_loss(self.mlp(self.table), flat).item()


def token_losses(logits, labels):
    """-log p of each token of labels (N,), from logits (N, V)."""
    return F.cross_entropy(upcast(logits), labels, reduction="none")             # (N,)


def target_loss(model, prefix, batch):
    """Equation 2: -log p(target | source) summed over the batch (data/batches.py), in nats.

    The label positions are the loss mask: there is a loss only where a token of a target, or its
    end, is predicted. The head, a small GPT-2's largest product, is computed only there.
    """
    hidden = model.hidden_states(**batch.inputs, prefix=prefix)                 # (B, T, C)
    hidden = hidden.flatten(0, 1)[batch.label_positions]                        # (N, C)
    losses = token_losses(model.head(hidden), batch.labels)                     # (N,)
    return (losses * batch.label_weights).sum()


def summarize_parameters(learner, model):
    """One line: how many numbers a task has to store, and how many learn, of how many in all."""
    trainable = sum(p.numel() for p in learner.parameters())
    total = trainable + sum(p.numel() for p in model.parameters() if not p.requires_grad)
    stored, size = learner.num_stored_parameters(), sum(p.numel() for p in model.parameters())
    mlp = ", with the MLP that computes it while learning, thrown away afterwards"
    return (f"to store: {stored:,}, {stored / size:.2%} of the model; trainable params: "
            f"{trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
            + mlp * (trainable > stored))
