"""What is GPT-2's own in `python -m scripts.pretrain`: documents packed into rows, loss and probe.

Not here: the loop, the optimisers and the files (pretrain.py), the text (data/toy_world/text.py).
Letters as in model.py.
"""
import itertools
import random

import torch

from data.toy_world.text import AGAIN, FIRST, document, encode, sheet_then_prose, world_thing
from model import GPT2, GPT2Config
from prefix import token_losses

# ---- text: whole documents, packed into rows

def pack(documents, rows, length):
    """Documents (lists) packed into `rows` bins of at most `length`; what fits nowhere is left out.

    The longest first, each into the fullest bin that has room. So next to nothing stays empty, and
    no document is cut: prose never stands without its sheet.
    """
    bins, room = [[] for _ in range(rows)], [length] * rows
    for item in sorted(documents, key=len, reverse=True):
        fitting = [n for n in range(rows) if room[n] >= len(item)]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            bins[best].append(item)
            room[best] -= len(item)
    return bins


def batch_of_step(tokenizer, settings, step):
    """ids (B, T+1), and labels, the same but -100 where none is learned: by seed and step only."""
    s, rng = settings, random.Random(f"text {settings.seed} {step}")
    length, documents, total = s.context + 1, [], 0
    while total < s.rows * length:
        documents.append(list(zip(*encode(document(rng), tokenizer), strict=True)))
        total += len(documents[-1])
    ids = torch.full((s.rows, length), tokenizer.eos_token_id)                      # (B, T+1)
    labels = torch.full((s.rows, length), -100)                                     # (B, T+1)
    for row, items in enumerate(pack(documents, s.rows, length)):
        rng.shuffle(items)                      # else every row would begin with a long document
        pairs = [pair for item in items for pair in item]
        ids[row, :len(pairs)] = torch.tensor([token for token, _ in pairs])
        labels[row, :len(pairs)] = torch.tensor([-100 if role == FIRST else token
                                                 for token, role in pairs])
    return ids, labels


# ---- the model

def empty_model(settings):
    s = settings
    return GPT2(GPT2Config(s.vocabulary, s.context, s.width, s.layers, s.heads))


def loss_of(model, ids, labels):
    """(summed loss, number) of the learned tokens; no logit is computed for the others."""
    hidden = model.hidden_states(ids[:, :-1])                                       # (B, T, C)
    learned = labels[:, 1:] != -100                                                 # (B, T)
    losses = token_losses(model.head(hidden[learned]), labels[:, 1:][learned])      # (N,)
    return losses.sum(), len(losses)


@torch.no_grad()
def probe(model, tokenizer, count=64):
    """How well prose follows from its own sheet, in pre-training's notations, for names never read.

    prose: loss of the prose. copy: loss of the values of facts in it. copied: share of these copied
    without a fault, that is, each token the likeliest after the true ones before it. The thing's
    own name is left out: whether a sentence begins with it or with "It" is a matter of taste.
    """
    rng, prose, copy, copied = random.Random("probe"), [], [], []
    for _ in range(count):
        thing = world_thing(rng, groups=(0,))
        ids, roles = encode(sheet_then_prose(thing, rng), tokenizer)
        target = torch.tensor(ids[1:], device=model.device)                         # (T,)
        hidden = model.hidden_states(torch.tensor([ids[:-1]], device=model.device))
        logits = model.head(hidden[0])                                              # (T, V)
        losses = token_losses(logits, target).tolist()
        hits = (logits.argmax(1) == target).tolist()
        places = range(len(roles) - roles[::-1].index(FIRST), len(roles))   # after the sheet
        prose += [losses[n - 1] for n in places]
        for role, value in itertools.groupby(places, key=roles.__getitem__):
            value = list(value)
            words = f"{{{tokenizer.decode([ids[n] for n in value]).strip()}}}"
            if role == AGAIN and words in dict(thing.facts).values():
                copy += [losses[n - 1] for n in value]
                copied.append(all(hits[n - 1] for n in value))
    return {name: round(sum(numbers) / len(numbers), 4) for name, numbers in
            (("prose", prose), ("copy", copy), ("copied", copied))}
