"""What bench.py trains and evaluates on: pairs of E2E, or of random words of such lengths, and the
batches that are made of them, as our forms and peft want them. Letters as in model.py.
"""
import random
import typing
from pathlib import Path

import torch

from data import causal, tasks
from data.batches import Batch, Pair, count_labels, epoch_batches
from data.pairs import tokenized
from data.tokenizer import Tokenizer, byte_level_bpe
from fast import tries
from model import pad

P = 10
LIKE_E2E = ((35, 10), (25, 8))      # tokens of a source and of a target, mean and deviation
TABLES = {"train": 300, "dev": 15}  # sources that are used, with all their references


def drawn_pairs(lengths, vocab_size, tables, references=8):
    """Pairs of random words, `references` for each source: E2E has about 8 for a table."""
    rng = random.Random(0)

    def words(mean, deviation):
        number = max(3, round(rng.gauss(mean, deviation)))
        return [rng.randrange(1, vocab_size) for _ in range(number)]
    pairs = []
    for _ in range(tables):
        source = words(*lengths[0])
        pairs += [Pair(source + words(*lengths[1]), len(source)) for _ in range(references)]
    return pairs


def some_pairs(split, vocab_size, data_dir):
    """The pairs of some tables: E2E's own, as train.py reads them, or of such lengths."""
    if not data_dir:
        return drawn_pairs(LIKE_E2E, vocab_size, TABLES[split])
    examples = random.Random(0).sample(tasks.load("e2e", split, data_dir), TABLES[split])
    tokenizer = Tokenizer(byte_level_bpe(Path(__file__).parent))    # no file of its own: GPT-2's
    pairs, _ = causal.encode(tokenized(examples, tokenizer), 1024 - P)
    # For another vocabulary the words are other ones, but as many.
    return [Pair([i % vocab_size for i in pair.ids], pair.start) for pair in pairs]


class Case(typing.NamedTuple):
    """A batch as every form wants it, made before the clock starts."""
    plain: Batch                # as train.py has it
    tries: Batch                # the same pairs, as for --share-source
    ids: torch.Tensor           # (B, T), padded behind, as peft wants it
    mask: torch.Tensor          # (B, T), 1 at a token and 0 at padding, for peft
    labels: torch.Tensor        # (B, T), the tokens again, -100 where there is no loss: peft's way
    n_tokens: int               # real tokens of all pairs
    n_read: int                 # of these, all but the last of each pair, which nothing follows
    n_labels: int               # tokens that the loss is taken on
    n_nodes: int                # of those read, with what several pairs begin with counted once
    n_learned: int              # of the labels, with what several learn at one place counted once


def make_case(pairs, model):
    ids, mask = pad([pair.ids for pair in pairs])                               # (B, T) each
    start = torch.tensor([[pair.start] for pair in pairs])                      # (B, 1)
    labels = ids.masked_fill(~mask | (torch.arange(ids.size(1)) < start), -100)             # (B, T)
    ids, mask, labels = (x.to(model.device) for x in (ids, mask.long(), labels))
    plain, shared = (kind.collate(pairs, model).to(model.device) for kind in (causal, tries))
    n_tokens, (nodes, learned) = sum(len(pair.ids) for pair in pairs), tries.trie(pairs)
    return Case(plain, shared, ids, mask, labels, n_tokens, n_tokens - len(pairs),
                count_labels(pairs), len(nodes), len(learned))


def spread(batches, count):
    """`count` of the batches, from short to long, evenly: together they are like all of them."""
    batches = sorted(batches, key=lambda batch: sum(len(pair.ids) for pair in batch))
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]


def kinds_of_batches(pairs, size, count, model, share=0):
    """{kind: Cases}. alike: pairs of similar lengths, as train.py has them. random: drawn from all,
    as loops mostly have them. tables: up to `share` of a source together (--share-source); 0: any.
    """
    rng = random.Random(0)
    alike, tables = ([[pairs[i] for i in batch] for batch in epoch_batches(
        pairs, size, 0, 0, share)] for share in (0, share or size))
    found = {"alike": alike, "random": [rng.sample(pairs, size) for _ in alike], "tables": tables}
    return {kind: [make_case(batch, model) for batch in
                   spread([batch for batch in batches if len(batch) == size], count)]
            for kind, batches in found.items()}
