"""From a pair of texts to the token sequence that the model reads, and back.

The official code's form: " source " <|endoftext|> " target " <|endoftext|>; the same token ends the
source and the target. train.py learns the part after the first <|endoftext|>, sample.py stops at
the second. Knows a tokenizer and text; no tensors.
"""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Pair:
    """A source and a target as tokens. The loss is taken on ids[start:], target and end."""
    ids: list[int]
    start: int


def prompt_ids(tokenizer, source):
    """The tokens up to and with the first <|endoftext|>: all there is before decoding."""
    return tokenizer.encode_ordinary(f" {source} ") + [tokenizer.eot_token]


def target_ids(tokenizer, target):
    """The tokens that the model has to say, its <|endoftext|> included."""
    return tokenizer.encode_ordinary(f" {target} ") + [tokenizer.eot_token]


def text_of(tokenizer, ids):
    """The text of generated tokens up to the first <|endoftext|>, without the blanks around it."""
    if tokenizer.eot_token in ids:
        ids = ids[:ids.index(tokenizer.eot_token)]
    return tokenizer.decode(ids).strip()


def cut_source(prompt, over):
    """`prompt` without the last `over` tokens of its source; None where nothing would be left."""
    if over <= 0:
        return prompt
    return prompt[:-1 - over] + prompt[-1:] if over <= len(prompt) - 2 else None


def encode_pairs(examples, tokenizer, room):
    """Every (source, reference) of `examples` as a Pair of at most `room` tokens, and a note on the
    cuts.

    The rule for a pair that is too long: the source loses its last tokens; where not one of them
    would be left, or the target alone is too long, the pair is refused. Returns (pairs, note); the
    note says how many were cut and refused, and is empty when none was. Raises ValueError when no
    pair is left.
    """
    pairs, cut, refused = [], 0, 0
    for example in examples:
        prompt = prompt_ids(tokenizer, example.source)
        for target in example.targets:
            target = target_ids(tokenizer, target)
            over = len(prompt) + len(target) - room
            head = cut_source(prompt, over)
            if head is None:
                refused += 1
                continue
            cut += over > 0
            pairs.append(Pair(head + target, len(head)))
    if not pairs:
        raise ValueError(f"got {refused} pairs, every one with a target too long for {room} "
                         "tokens; expected one that fits; shorten the targets or the prefix")
    if not cut and not refused:
        return pairs, ""
    return pairs, (f"{cut} of {len(pairs) + refused} pairs had the end of their source cut to fit "
                   f"{room} tokens, {refused} were refused (no room for the target)")
