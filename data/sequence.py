"""From a pair of texts to the token sequence that the model reads, and back.

The official code's form: " source " <|endoftext|> " target " <|endoftext|>; the same token ends the
source and the target. train.py learns the part after the first <|endoftext|>, sample.py stops at
the second. For BART, which reads them apart, it is <s>source</s> and <s>target</s>. Knows a
tokenizer and text; no tensors.
"""
import dataclasses

from data.tokenizer import BARTTokenizer


@dataclasses.dataclass(frozen=True)
class Pair:
    """A source and a target as tokens. The loss is taken on ids[start:], target and end."""
    ids: list[int]
    start: int


def prompt_ids(tokenizer, source):
    """The tokens up to and with the first <|endoftext|>: all there is before decoding."""
    if isinstance(tokenizer, BARTTokenizer):
        return tokenizer.framed(source)
    return tokenizer.encode_ordinary(f" {source} ") + [tokenizer.eot_token]


def target_ids(tokenizer, target):
    """The tokens that the model has to say, its <|endoftext|> included."""
    if isinstance(tokenizer, BARTTokenizer):
        return tokenizer.framed(target)
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


def encode_apart(examples, tokenizer, room):
    """Every (source, reference) of `examples` as a Pair for BART, and a note on the cuts.

    room: (tokens of a source, tokens of a target). Both lose what is too much before their </s>, as
    in the official code.
    """
    pairs, cut = [], [0, 0]
    for example in examples:
        source = prompt_ids(tokenizer, example.source)
        for target in example.targets:
            texts = [source, target_ids(tokenizer, target)]
            for side, (ids, most) in enumerate(zip(texts, room)):
                if len(ids) > most:
                    texts[side] = ids[:most - 1] + ids[-1:]
                    cut[side] += 1
            pairs.append(Pair(texts[0] + texts[1], len(texts[0])))
    if cut == [0, 0]:
        return pairs, ""
    return pairs, (f"of {len(pairs)} pairs {cut[0]} had their source cut to {room[0]} tokens, "
                   f"{cut[1]} their target to {room[1]}")
