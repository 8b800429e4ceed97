"""The loss on a batch: pairs of texts as tensors, and -log p of the targets (Li & Liang 2021,
equation 2).

For GPT-2 source and target are one sequence, for BART the source is the encoder's and the target
the decoder's. Called by train.py. Not here: the optimiser (train.py), from text to tokens
(data/sequence.py). Letters as in model.py.
"""
import torch
from torch.nn import functional as F

from data.sequence import Pair
from model import attend as written_out


def batches_of_epoch(pairs, batch_size, seed, epoch):
    """The batches of one epoch, lists of indices: similar lengths together, in random order.

    Similar lengths mean little padding. Sorting all would fix which pairs meet, so only pools of 50
    batches are sorted. A function of (seed, epoch) alone: a resumed run needs no state to find its
    place.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    batches = []
    for i in range(0, len(order), 50 * batch_size):
        pool = sorted(order[i:i + 50 * batch_size], key=lambda j: len(pairs[j].ids))
        batches += [pool[j:j + batch_size] for j in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def collate(pairs, device):
    """Tokens (B, T), padded behind, and learn (B, T), True at the tokens the loss is taken on."""
    T = max(len(pair.ids) for pair in pairs)
    ids = torch.tensor([p.ids + [0] * (T - len(p.ids)) for p in pairs])                     # (B, T)
    place = torch.arange(T)
    start = torch.tensor([[p.start] for p in pairs])                                        # (B, 1)
    end = torch.tensor([[len(p.ids)] for p in pairs])                                       # (B, 1)
    learn = (start <= place) & (place < end)                                                # (B, T)
    return ids.to(device, non_blocking=True), learn.to(device, non_blocking=True)


def batch_of(model, pairs):
    """Everything that `target_nats` wants of `pairs`: (ids, learn) as `collate` has them.

    Of BART they are the targets, behind the token that every target begins with. Then there is a
    third thing, the sources: their tokens (B, S), padded behind, and which of these are real.
    """
    device = model.wte.weight.device
    if model.architecture != "bart":
        return collate(pairs, device)
    begin = [model.config.decoder_start_token_id]
    targets = [Pair(begin + p.ids[p.start:], 1) for p in pairs]
    return *collate(targets, device), collate([Pair(p.ids[:p.start], 0) for p in pairs], device)


def nats_of(logits, label):
    """-log p summed over the tokens label (N,), from logits (N, V)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))    # bf16 is too coarse
    return F.cross_entropy(logits, label, reduction="sum")


def target_nats(model, prefix, ids, learn, attend=written_out, source=None):
    """-log p(target | source) summed over the batch, in nats: the loss on targets and their end
    only.

    prefix: (L, 2, 1 or B, H, P, D), of BART `Places`. ids, learn, source: see `batch_of`. The
    padding stands behind every real token, where the causal mask hides it already, so the decoder
    is told nothing of it.
    """
    if source is None:
        hidden = model(ids, prefix, attend=attend)[:, :-1]                             # (B, T-1, C)
    else:
        memory = model.encode(*source, prefix, attend)
        hidden = model(ids, prefix, attend=attend, memory=memory)[:, :-1]              # (B, T-1, C)
    # A token is predicted from the one before it. Only these positions see the vocabulary head: the
    # largest multiplication of a small GPT-2, and its largest activation.
    return nats_of(model.head(hidden[learn[:, 1:]]), ids[:, 1:][learn[:, 1:]])


# ---- the dev set: a source that has several references is read once

def by_source(pairs, most):
    """Lists of pairs that begin with the same source, at most `most` in each; similar lengths stand
    together.
    """
    groups = {}
    for pair in pairs:
        groups.setdefault(tuple(pair.ids[:pair.start]), []).append(pair)
    rows = [group[i:i + most] for group in groups.values() for i in range(0, len(group), most)]
    return sorted(rows, key=lambda row: sum(len(p.ids) - p.start for p in row) + row[0].start)


def collate_tree(rows, device):
    """Rows of pairs (see `by_source`) as one sequence each: the source, then all its targets.

                source  target 1  target 2        A target sees the source and itself; to it the
        s1       1 0     0 0       0              other targets are not there. Its tokens get the
        s2       1 1     0 0       0              positions right behind the source, as the model
        t1 a     1 1     1 0       0              counts what a token sees.
        t1 b     1 1     1 1       0
        t2 a     1 1     0 0       1              The last token of a target is only predicted.

    Returns ids (B, T); look (B, T, T), who may look where; place (N,), in the flattened (B * T),
    from where each token to be predicted is predicted; label (N,), these tokens.
    """
    T = max(row[0].start + sum(len(p.ids) - p.start - 1 for p in row) for row in rows)
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
        branch.append(owner + [-1] * (T - len(owner)))
    ids, branch, place, label = (torch.tensor(numbers, device=device)
                                 for numbers in (ids, branch, place, label))
    seen = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])             # (B, T, T)
    return ids, seen.tril(), place, label


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
        if tree:
            ids, look, place, label = collate_tree(batch, prefix.device)
            real = F.pad(look, (prefix.size(4), 0), value=True)                     # (B, T, P+T)
            hidden = model(ids, prefix, real).flatten(0, 1)[place]                  # (N, C)
            nats += nats_of(model.head(hidden), label).item()
        else:
            ids, learn, *source = batch_of(model, [pair for pair, in batch])
            nats += target_nats(model, prefix, ids, learn, attend, *source).item()
        tokens += sum(len(p.ids) - p.start for row in batch for p in row)
    return nats / tokens
