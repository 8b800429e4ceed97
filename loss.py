"""The loss on a batch: pairs of texts as tensors, and -log p of the targets (Li & Liang 2021,
equation 2).

For GPT-2 source and target are one sequence, for BART the source is the encoder's and the target
the decoder's. Called by train.py. Not here: the optimiser (train.py), from text to tokens
(data/sequence.py). Letters as in model.py.
"""
import torch
from torch.nn import functional as F

from data.sequence import Pair
from model import attend


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


def target_nats(model, prefix, ids, learn, attend=attend, source=None):
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
    logits = model.head(hidden[learn[:, 1:]])                                               # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))    # bf16 is too coarse
    return F.cross_entropy(logits, ids[:, 1:][learn[:, 1:]], reduction="sum")


@torch.no_grad()
def dev_loss(model, learner, pairs, batch_size, attend=attend):
    """-log p of a target token, averaged over all target tokens of `pairs`, in nats."""
    pairs, nats, tokens = sorted(pairs, key=lambda p: len(p.ids)), 0.0, 0
    prefix = learner.fold().to(model.wte.weight.dtype)
    for i in range(0, len(pairs), batch_size):
        ids, learn, *source = batch_of(model, pairs[i:i + batch_size])
        nats += target_nats(model, prefix, ids, learn, attend, *source).item()
        tokens += learn.sum().item()
    return nats / tokens
