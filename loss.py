"""The loss on a batch: pairs of texts as tensors, and -log p of the targets (Li & Liang 2021,
equation 2).

For GPT-2 source and target are one sequence, for BART the source is the encoder's and the target
the decoder's. Called by train.py, step.py and denoise.py. Not here: the optimiser (train.py), from
text to tokens (data/sequence.py). Letters as in model.py.
"""
import itertools
import typing

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from data.sequence import Pair
from model import attend as written_out


def tokens_of(pairs):
    """How many tokens there are to learn: those of the targets, their ends among them."""
    return sum(len(pair.ids) - pair.start for pair in pairs)


def by_source(pairs, most):
    """Lists of pairs that begin with the same source, at most `most` in each; similar lengths stand
    together.
    """
    groups = {}
    for pair in pairs:
        groups.setdefault(tuple(pair.ids[:pair.start]), []).append(pair)
    rows = [group[i:i + most] for group in groups.values() for i in range(0, len(group), most)]
    return sorted(rows, key=lambda row: tokens_of(row) + row[0].start)


def batches_of_epoch(pairs, batch_size, seed, epoch, share=False):
    """The batches of one epoch, lists of indices: similar lengths together, in random order.

    Similar lengths mean little padding. Sorting all would fix which pairs meet, so only pools of 50
    batches are sorted. A function of (seed, epoch) alone: a resumed run needs no state to find its
    place. share: the pairs of one source stay together, but for those where a batch is full.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    groups = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(tuple(pair.ids[:pair.start]) if share else i, []).append(i)
    groups = list(groups.values())
    order, pools = torch.randperm(len(groups), generator=generator).tolist(), []
    size = max(1, 50 * batch_size * len(groups) // len(pairs))          # groups in a pool
    for i in range(0, len(order), size):
        pool = [groups[j] for j in order[i:i + size]]
        pools += sorted(pool, key=lambda group: sum(len(pairs[j].ids) for j in group))
    flat = list(itertools.chain(*pools))
    batches = [flat[i:i + batch_size] for i in range(0, len(flat), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class Batch(typing.NamedTuple):
    """Some pairs as tensors. Where a token is learned is worked out on the CPU: to count such
    places, a GPU would have to be waited for.
    """
    ids: torch.Tensor               # (B, T) tokens, padded behind
    place: torch.Tensor             # (N,), in the flattened (B * T): where a token is predicted
    label: torch.Tensor             # (N,), that token
    look: torch.Tensor = None       # (B, T, T) bool, of a tree: who may look where
    source: tuple = None            # of BART: its tokens (B, S), and which of them are real (B, S)

    def to(self, device):
        ids, place, label, look = (None if x is None else x.to(device, non_blocking=True)
                                   for x in self[:4])
        source = self.source and tuple(x.to(device, non_blocking=True) for x in self.source)
        return Batch(ids, place, label, look, source)


def padded(texts):
    """Lists of tokens as ids (B, T), padded behind, and which of them are real, (B, T) bool."""
    T = max(map(len, texts))
    ids = torch.tensor([text + [0] * (T - len(text)) for text in texts])                    # (B, T)
    return ids, torch.arange(T) < torch.tensor([[len(text)] for text in texts])             # (B, T)


def collate(pairs, device):
    """A `Batch` with a row for each pair. A token is predicted from the one before it, and the last
    token of a row is only predicted: the model need not read it.
    """
    ids, _ = padded([p.ids[:-1] for p in pairs])                                            # (B, T)
    place = [b * ids.size(1) + t - 1 for b, p in enumerate(pairs)
             for t in range(p.start, len(p.ids))]
    label = [token for p in pairs for token in p.ids[p.start:]]
    return Batch(ids, torch.tensor(place), torch.tensor(label)).to(device)


def cells_of(rows):
    """B * T of the rows of a tree, padding too: T is a source and its targets, but for their ends,
    which are only predicted.
    """
    return len(rows) * max(row[0].start + tokens_of(row) - len(row) for row in rows)


def collate_tree(rows, device):
    """A `Batch` of rows of pairs (see `by_source`), a sequence each: the source, then its targets.

                source  target 1  target 2        A target sees the source and itself; to it the
        s1       1 0     0 0       0              other targets are not there. Its tokens get the
        s2       1 1     0 0       0              positions right behind the source, as the model
        t1 a     1 1     1 0       0              counts what a token sees.
        t1 b     1 1     1 1       0
        t2 a     1 1     0 0       1              Both first tokens are predicted from s2.
    """
    T = cells_of(rows) // len(rows)
    ids, branch, place, label = [], [], [], []
    for b, row in enumerate(rows):
        start = row[0].start
        text, owner = row[0].ids[:start], [0] * start       # 0: the source; n: target n
        for n, pair in enumerate(row, 1):
            target = pair.ids[start:]
            first = b * T + len(text)                       # where this target's tokens stand
            place += [b * T + start - 1, *range(first, first + len(target) - 1)]
            label += target
            text, owner = text + target[:-1], owner + [n] * (len(target) - 1)
        ids.append(text + [0] * (T - len(text)))
        branch.append(owner + list(range(len(owner) - T, 0)))       # padding: each sees itself
    ids, branch, place, label = map(torch.tensor, (ids, branch, place, label))
    seen = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])             # (B, T, T)
    return Batch(ids, place, label, seen.tril()).to(device)


def batch_of(model, pairs, share=False):
    """The `Batch` of `pairs` for this model; share: each source is read once for all its targets.

    Of BART the rows are the targets, behind the token that every target begins with; the sources
    are the encoder's.
    """
    device = model.wte.weight.device
    if share:       # whole groups, or halves of them and smaller: whatever is padded least
        ways = (by_source(pairs, most) for most in range(1, len(pairs) + 1))
        return collate_tree(min(ways, key=cells_of), device)
    if model.architecture != "bart":
        return collate(pairs, device)
    begin = [model.config.decoder_start_token_id]
    targets = collate([Pair(begin + p.ids[p.start:], 1) for p in pairs], "cpu")
    return targets._replace(source=padded([p.ids[:p.start] for p in pairs])).to(device)


def nats_of(logits, label):
    """-log p summed over the tokens label (N,), from logits (N, V); -100 is no token."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))    # bf16 is too coarse
    return F.cross_entropy(logits, label, reduction="sum")


class FrozenHead(torch.autograd.Function):
    """nats_of(head(hidden), label), where the weights of the head do not learn.

    Then the way back needs one thing only, the gradient of `hidden`, and it is worked out at once:
    d nats / d logits = softmax(logits) - onehot(label), written over the logits, for some rows at a
    time. So no array (N, V) is ever whole, and none waits for the blocks' way back: they were a
    third of the memory of a step of the smallest GPT-2.
    """

    ROWS = 128      # at a time; few enough for the memory, enough to keep a multiplication fast

    @staticmethod
    def forward(ctx, hidden, label, head):
        nats, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for part, label in zip(hidden.split(FrozenHead.ROWS), label.split(FrozenHead.ROWS)):
            with torch.enable_grad():
                part = part.detach().requires_grad_()                               # (R, C)
                logits = head(part)                                                 # (R, V)
            p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))    # (R, V)
            real, label = (label >= 0)[:, None], label.clamp(min=0)[:, None]        # (R, 1) each
            p -= p.amax(1, keepdim=True)
            own = p.gather(1, label)                                                # (R, 1)
            total = p.exp_().sum(1, keepdim=True)                                   # (R, 1)
            p *= real / total
            p.scatter_add_(1, label, -real.to(p.dtype))
            gradients += torch.autograd.grad(logits, part, p.to(logits.dtype))      # (R, C)
            nats = nats + ((total.log() - own) * real).sum()
        ctx.save_for_backward(torch.cat(gradients))                                 # (N, C)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None


def target_nats(model, prefix, batch, attend=written_out):
    """-log p(target | source) summed over the batch, in nats: the loss on targets and their end
    only.

    prefix: (L, 2, 1 or B, H, P, D), of BART `Places`. batch: a `Batch`. The padding stands behind
    every real token, where the causal mask hides it already, so the decoder is told nothing of it.
    """
    ids, place, label, look, source = batch
    if source is not None:
        hidden = model(ids, prefix, attend=attend, memory=model.encode(*source, prefix, attend))
    elif look is not None:
        real = F.pad(look, (prefix.size(4), 0), value=True)                         # (B, T, P+T)
        hidden = model(ids, prefix, real, attend=attend)                            # (B, T, C)
    else:
        hidden = model(ids, prefix, attend=attend)                                  # (B, T, C)
    # Only the places where something is learned see the vocabulary head: the largest multiplication
    # of a small GPT-2, and its largest activation.
    hidden = hidden.flatten(0, 1)[place]                                            # (N, C)
    frozen = hidden.requires_grad and not model.wte.weight.requires_grad
    if frozen and not torch.compiler.is_compiling():        # a compiler has its own way to save
        return FrozenHead.apply(hidden, label, model.head)
    return nats_of(model.head(hidden), label)


@torch.no_grad()
def dev_loss(model, learner, pairs, batch_size, attend=written_out):
    """-log p of a target token, averaged over all target tokens of `pairs`, in nats.

    GPT-2 reads a source once for all its targets. The fused kernel knows no such mask, and BART's
    encoder has read the source anyway: they go pair by pair, to the same figure.
    """
    prefix, nats, tokens = learner.fold().to(model.wte.weight.dtype), 0.0, 0
    tree = model.architecture == "gpt2" and attend is written_out
    rows = by_source(pairs, batch_size if tree else 1)
    while rows:
        batch = [rows.pop(0)]
        while rows and sum(map(len, batch)) + len(rows[0]) <= batch_size:
            batch.append(rows.pop(0))
        made = (collate_tree(batch, prefix.device) if tree else
                batch_of(model, [pair for pair, in batch]))
        nats += target_nats(model, prefix, made, attend).item()
        tokens += sum(map(tokens_of, batch))
    return nats / tokens
