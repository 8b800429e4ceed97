"""Pairs for an encoder-decoder: the encoder reads the source, the decoder writes the target.

The same functions as in causal.py, for BART. Letters as in model.py.
"""
from data.batches import Batch, Pair, Pairs, label_tensors
from model import pad

MAX_SOURCE, MAX_TARGET = 512, 60        # tokens, of the paper (its code: 1024, 60)


def token_limit(model, n_prefix, max_source, max_target):
    """How many tokens a source and a target may have: each has its own positions, a prefix none."""
    return min(max_source, model.max_positions), min(max_target, model.max_positions)


def encode(tokens, limit):
    """Every source with each of its references as a Pair, and a note on the cuts.

    tokens: for each example those of its source and a list of its references'.
    limit: (tokens of a source, tokens of a target). Both lose what is too much before their </s>,
    as in the official code.
    """
    pairs, cut = Pairs(), [0, 0]
    for source, targets in tokens:
        for target in targets:
            both = [source, target]
            for side, (ids, longest) in enumerate(zip(both, limit)):
                if len(ids) > longest:
                    both[side] = ids[:longest - 1] + ids[-1:]
                    cut[side] += 1
            pairs.append(both[0] + both[1], len(both[0]))
    if cut == [0, 0]:
        return pairs, ""
    return pairs, (f"of {len(pairs)} pairs {cut[0]} had their source cut to {limit[0]} tokens, "
                   f"{cut[1]} their target to {limit[1]}")


def decoder_pairs(pairs, model):
    """What the decoder reads and predicts: its start token, which is only read, and then the
    target.
    """
    return [Pair([model.config.decoder_start_token_id] + pair.ids[pair.start:], 1)
            for pair in pairs]


def collate(pairs, model):
    """A `Batch` with a row for each pair: ids (B, T) of the targets, source (B, S) and its mask."""
    targets = decoder_pairs(pairs, model)
    ids, _ = pad([target.ids[:-1] for target in targets])                       # (B, T)
    source, source_mask = pad([pair.ids[:pair.start] for pair in pairs])        # (B, S) each
    return Batch({"ids": ids, "source": source, "source_mask": source_mask},
                 *label_tensors(targets, ids.size(1)))


def prompt(tokenizer, source, limit):
    """(tokens of the source, how many were cut before their </s> to leave it `limit`)."""
    ids = tokenizer.source_ids(source)
    excess = max(0, len(ids) - limit)
    return ids[:len(ids) - 1 - excess] + ids[-1:], excess


def prompt_limit(model, n_prefix, max_new_tokens, max_source=None):
    """How many tokens a source may have: it has positions of its own."""
    return min(model.max_positions, max_source or model.max_positions)
