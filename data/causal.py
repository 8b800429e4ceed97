"""Pairs for a model that reads source and target as one sequence: GPT-2 and its like.

From examples to `Pair`s of tokens, from pairs to a right-padded `Batch` of tensors; and the
prompt to decode from. seq2seq.py has the same functions for an encoder-decoder;
`pairs.pairs_of(model)` says which of the two a model needs. Letters as in model.py.
"""
from data.batches import Batch, Pairs, label_tensors
from model import pad


def token_limit(model, n_prefix, max_source=None, max_target=None):
    """How many tokens source and target may have together: prefix and text share the positions."""
    limit = model.max_positions - n_prefix
    if limit <= 0:
        raise ValueError(f"got a prefix of {n_prefix}; expected less than the model's "
                         f"{model.max_positions} positions; lower --prefix-len")
    return limit


def cut_source(ids, excess):
    """`ids` minus `excess` tokens before its last, the separator; None where none is left."""
    if excess <= 0:
        return ids
    return ids[:-1 - excess] + ids[-1:] if excess <= len(ids) - 2 else None


def encode(tokens, limit):
    """Every source with each of its references as a pair of at most `limit` tokens, and a note.

    tokens: for each example (tokens of its source, [tokens of each reference]), from
    `pairs.tokenized`.
    In a pair that is too long the source loses its last tokens. The pair is refused where no token
    of the source would be left, or the target alone is too long. Returns (pairs, note); the
    note says how many were cut and refused, and is empty when none was. Raises ValueError when no
    pair is left.
    """
    pairs, cut, refused = Pairs(), 0, 0
    for source, targets in tokens:
        for target in targets:
            excess = len(source) + len(target) - limit
            prompt = cut_source(source, excess)
            if prompt is None:
                refused += 1
                continue
            cut += excess > 0
            pairs.append(prompt + target, len(prompt))
    if not pairs:
        raise ValueError(f"got {refused} pairs, every one with a target too long for {limit} "
                         "tokens; expected one that fits; shorten the targets or the prefix")
    if not cut and not refused:
        return pairs, ""
    return pairs, (f"{cut} of {len(pairs) + refused} pairs had the end of their source cut to fit "
                   f"{limit} tokens, {refused} were refused (no room for the target)")


def collate(pairs, model):
    """A `Batch` with a row for each pair: ids (B, T), right-padded.

    The last token of a row is only predicted, so the model need not read it. No key mask is
    needed: padding comes after every real token, where the causal mask hides it already.
    """
    ids, _ = pad([pair.ids[:-1] for pair in pairs])                             # (B, T)
    return Batch({"ids": ids}, *label_tensors(pairs, ids.size(1)))


def prompt(tokenizer, source, limit):
    """(tokens of the source to decode from, or None where none fits; how many were cut)."""
    ids = tokenizer.source_ids(source)
    return cut_source(ids, len(ids) - limit), max(0, len(ids) - limit)


def prompt_limit(model, n_prefix, max_new_tokens, max_source=None):
    """How many tokens a source may have, to leave positions for prefix and answer."""
    return model.max_positions - n_prefix - max_new_tokens
