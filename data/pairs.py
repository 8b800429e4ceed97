"""From a data set to a model's pairs, made by causal.py or seq2seq.py.

Both modules have the same functions: `token_limit`, `encode`, `collate`, `prompt_limit` and
`prompt`.
"""
import dataclasses
import hashlib
import itertools
import random
from pathlib import Path

from data import causal, seq2seq, tasks
from data.toy_world.text import known_share
from utils.parallel import parallel_map, processes
from utils.terminal import progress

# More characters than these are shared between processes: a few seconds of work for one of them.
MUCH_TEXT = 20_000_000
PIECE = 500             # examples that a process does before it hands them over


def pairs_of(model):
    """The module that makes pairs and batches for `model`."""
    return seq2seq if model.is_encoder_decoder else causal


def dev_batches(pairs, batch_size, model):
    """All pairs as Batches, similar lengths together: their order does not matter to a dev loss."""
    pairs, collate = sorted(pairs, key=lambda pair: len(pair.ids)), pairs_of(model).collate
    return [collate(pairs[i:i + batch_size], model) for i in range(0, len(pairs), batch_size)]


def load_examples(settings):
    """(train, dev): the Examples to learn from and those of the dev set, by train.py's settings."""
    keys = settings.source_key, settings.target_key
    train, dev = tasks.train_and_dev(settings.data, settings.data_dir or None, keys=keys)
    if settings.examples > len(train):
        raise ValueError(f"got --examples {settings.examples}; expected at most {len(train)}, the "
                         f"sources of {settings.data}; lower it")
    if settings.examples:
        train = random.Random(settings.seed).sample(train, settings.examples)
    return train, dev


def settings_for(model, settings):
    """train.py's settings; those for encoder-decoders are filled in, or refused."""
    s = settings
    if model.is_encoder_decoder:
        return dataclasses.replace(s, max_source=s.max_source or seq2seq.MAX_SOURCE,
                                   max_target=s.max_target or seq2seq.MAX_TARGET)
    if s.prefixes or s.max_source or s.max_target:
        raise ValueError(f"got --prefixes, --max-source or --max-target with a {model.architecture}"
                         "; expected a BART: another model has one place for a prefix and reads "
                         "all that fits its positions; leave it out")
    return s


def about_the_toy(settings, examples):
    """A note that a bundled model is a toy, where the data is not of its world; else ""."""
    name = Path(settings.model).name
    if name not in ("tiny-gpt2", "tiny-bart") or settings.data in tasks.WORLDS:
        return ""
    share = known_share(text for e in examples for text in (e.source, *e.targets))
    return (f"{name} is a toy: it has read about an invented world only and knows "
            f"{share:.0%} of the words of {settings.data}. With it you see that a prefix learns "
            "(--lr 3e-3; look at the loss), not good texts. For these take a real model, "
            "--model smollm2 (docs/llama.md) or --model gpt2")


def tokenized(examples, tokenizer):
    """(tokens of the source, a list of the tokens of each reference) of every example, in order.

    Much text is shared between processes. (Tiktoken's own threads were three times slower than one
    loop for texts as short as E2E's.)
    """
    def tokens_of(piece):
        return [(tokenizer.source_ids(example.source), list(map(tokenizer.target_ids,
                                                                example.targets)))
                for example in piece]

    characters = sum(len(example.source) + sum(map(len, example.targets)) for example in examples)
    pieces = [examples[i:i + PIECE] for i in range(0, len(examples), PIECE)]
    for found in parallel_map(tokens_of, pieces, processes() if characters > MUCH_TEXT else 1):
        yield from found


def encode_examples(train, dev, settings, model, tokenizer):
    """(train, dev) as Pairs of tokens that fit the model; dev is the sample to evaluate on."""
    kind, pairs, note = pairs_of(model), [], about_the_toy(settings, train)
    if note:
        print(note)
    limit = kind.token_limit(model, settings.prefix_len or 0, settings.max_source,
                             settings.max_target)
    for split, examples in (("train", train), ("dev", dev)):
        bar = progress(tokenized(examples, tokenizer), total=len(examples), unit="example",
                       name=f"{split} as tokens", leave=False)
        encoded, note = kind.encode(bar, limit)
        pairs.append(encoded)
        if note:
            print(f"{split}: {note}")
    if 0 < settings.dev_pairs < len(pairs[1]):
        # Not the first ones: files are sorted by name. Not by --seed: runs are to be comparable.
        pairs[1] = random.Random(0).sample(pairs[1], settings.dev_pairs)
    return pairs


def digest(train, dev):
    """A name of exactly these pairs: SHA-256 of how Python writes the list of all (ids, start)."""
    found, comma = hashlib.sha256(b"["), ""
    for pair in itertools.chain(train, dev):        # one by one, for all is a long text
        found.update(f"{comma}{(pair.ids, pair.start)}".encode())
        comma = ", "
    found.update(b"]")
    return found.hexdigest()
