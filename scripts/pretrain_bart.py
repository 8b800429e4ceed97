"""What is BART's own in `python -m scripts.pretrain --model tiny-bart`: noise, batches and model.

Lewis et al. 2019: the encoder reads a text whose sentences are shuffled and in which spans are
masked, the decoder writes the text as it was; often one sentence is masked as a whole, too (Zhang
et al. 2020). The texts are those of tiny-gpt2 and the reports of the invented world's summarising
task; no headline is among them. Not here: the loop, the optimisers and the files (pretrain.py), the
summarising task (data/toy_world/headlines.py). Letters as in model.py.
"""
import itertools
import math
import random
import re

import torch

from bart.model import BART, BARTConfig
from data.toy_world.headlines import report
from data.toy_world.text import GROUPS, document, world_thing
from data.toy_world.words import join_list, verbalize
from model import pad
from prefix import token_losses
from scripts.learn_bpe import world_texts

MASKED, SPAN = 0.3, 3       # BART's share of tokens that are masked, and mean length of a span
WHOLE = 0.5                 # share of texts in which one sentence is masked as a whole


# ---- text, and what is made of it

def gist(thing, rng):
    """A first or last sentence of a report: the thing and one to three of its facts."""
    facts = join_list([verbalize(fact, rng)[1] for fact in thing.facts[:rng.randint(1, 3)]])
    return rng.choice((f"In short, {thing.name} is a {thing.kind} {facts}.",
                       f"{thing.name} is a {thing.kind} {facts}.",
                       f"News of {thing.name}, a {thing.kind} {facts}."))


def report_with_gist(rng, groups=GROUPS):
    """A report with chatter, mostly with its gist in front or at the end, as newspapers have it."""
    thing = world_thing(rng, groups)
    text, place = report(thing, groups, rng), rng.randrange(3)
    return (f"{gist(thing, rng)} {text}", f"{text} {gist(thing, rng)}", text)[place]


def text_of_world(rng):
    """One text with values in braces: a report, or a document of pre-training."""
    return report_with_gist(rng) if rng.random() < 0.7 else " ".join(document(rng))


def vocabulary_texts(count, seed):
    """What the tokenizer is learned from, as world_texts, and reports."""
    yield from world_texts(count, seed)
    rng = random.Random(f"tokenizer of reports {seed}")
    for _ in range(count // 2):
        yield re.sub(r"[{}]", "", report_with_gist(rng))


def sentences_of(text, tokenizer):
    """The text as a list of sentences, each a list of (token, the value it belongs to or "")."""
    sentences = []
    for sentence in re.split(r"(?<=[.?]) (?=[A-Z{])|\n+ ", text):
        blank, tokens = " " if sentences else "", []    # as in running text: it belongs to its word
        for piece in re.split(r"( ?\{[^}]*\})", blank + sentence):
            words = re.sub(r"[{}]", "", piece)
            value = words.strip() if piece.endswith("}") else ""
            tokens += [(token, value) for token in tokenizer.encode(words)]
        sentences += [tokens] if tokens else []
    return sentences


def poisson(mean, rng):
    """A number of events (Knuth: how many uniform numbers until their product is small)."""
    count, product = 0, rng.random()
    while product > math.exp(-mean):
        count, product = count + 1, product * rng.random()
    return count


def noise_kinds(count, rng):
    """For each of `count` tokens and the end: 0 it stays, 1 a mask and then it stays, 2 a mask
    stands for it, 3 it is gone behind the mask of its span.

    A span is one mask whatever its length, which may be 0: how many words are missing is part of
    what has to be found out.
    """
    gap = SPAN * (1 - MASKED) / MASKED          # tokens between two spans, on average
    kinds = []
    while len(kinds) < count:
        if rng.random() * (gap + 1) >= 1:
            kinds.append(0)
            continue
        length = poisson(SPAN, rng)
        kinds += [2] + [3] * (length - 1) if length else [1]
    return kinds[:count]


def corrupt(sentences, tokenizer, rng):
    """(source, target, learn): what the encoder reads, what the decoder writes, and whether each of
    the target's tokens is learned.

    In half of the texts one sentence, often the first or the last, is masked as a whole, as Zhang
    et al. 2020 (PEGASUS) do it: it has to be written anew from the others. Nobody can guess a
    made-up name that stands nowhere else: such tokens are not learned.
    """
    last = len(sentences) - 1
    whole = rng.choice((0, last, rng.randint(0, last))) if rng.random() < WHOLE else None
    shuffled = list(range(len(sentences)))
    rng.shuffle(shuffled)
    read = [(n, place) for n in shuffled if n != whole for place in range(len(sentences[n]))]
    source, shown = [], set()
    for where, kind in zip(read, noise_kinds(len(read), rng), strict=True):
        if kind in (1, 2):
            source.append(tokenizer.mask_token_id)
        if kind in (0, 1):
            source.append(sentences[where[0]][where[1]][0])
            shown.add(where)
    if whole is not None:
        source.insert(rng.randint(0, len(source)), tokenizer.mask_token_id)
    every = [(n, place) for n, sentence in enumerate(sentences) for place in range(len(sentence))]
    pieces = [(value, list(where)) for value, where in
              itertools.groupby(every, lambda where: sentences[where[0]][where[1]][1])]
    known = {value for value, where in pieces if shown.issuperset(where)}
    target, learn = [], []
    for value, where in pieces:
        target += [sentences[n][place][0] for n, place in where]
        learn += [not value or value in known or one in shown for one in where]
        known.add(value)                        # from here on it stands in the target
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    return begin + source + end, begin + target + end, [True, *learn, True]


def batch_of_step(tokenizer, settings, step):
    """The tensors of `tensors_of_texts`: by seed and step only, as pretrain_gpt2.batch_of_step.

    About rows x context tokens, sources and targets together; what is longer than the context is
    left out.
    """
    s, rng = settings, random.Random(f"noise {settings.seed} {step}")
    texts, tokens_left = [], s.rows * s.context
    while tokens_left > 0:
        source, target, learn = corrupt(sentences_of(text_of_world(rng), tokenizer), tokenizer, rng)
        if len(source) <= s.context and len(target) < s.context:
            texts.append((source, target, learn))
            tokens_left -= len(source) + len(target)
    return tensors_of_texts(texts, tokenizer)


def tensors_of_texts(texts, tokenizer):
    """A list from `corrupt` as ids (B, T) of the targets, learn (B, T) bool, source (B, S) and
    source_mask (B, S).
    """
    begin = tokenizer.eos_token_id                          # </s>, as in front of every target
    ids, _ = pad([[begin, *target] for _, target, _ in texts])                      # (B, T)
    learn, _ = pad([[False, *learned] for _, _, learned in texts])                  # (B, T)
    return ids, learn.bool(), *pad([source for source, _, _ in texts])


# ---- the model

def empty_model(settings):
    s = settings
    words = s.vocabulary + 5                    # with <s>, <pad>, </s>, <unk> and <mask>
    return BART(BARTConfig(words, s.context, s.width, s.layers, s.layers, s.heads, s.heads,
                           4 * s.width, 4 * s.width))


def predictions(model, ids, learn, source, source_mask):
    """(logits (N, V), labels (N,)) of the learned tokens, each predicted from the one before it."""
    hidden = model.hidden_states(ids, source, source_mask)[:, :-1]                  # (B, T-1, C)
    return model.head(hidden[learn[:, 1:]]), ids[:, 1:][learn[:, 1:]]


def loss_of(model, *batch):
    """(summed loss, number) of the learned tokens."""
    losses = token_losses(*predictions(model, *batch))                              # (N,)
    return losses.sum(), len(losses)


@torch.no_grad()
def probe(model, tokenizer, count=64):
    """How well noise is undone in reports on things whose names were never read.

    restored: loss of the learned tokens. hidden: loss of those that are masked in the source.
    right: share of all learned tokens that are the likeliest after the true ones before them;
    copied: the same of the tokens of values that stand in the source.
    """
    rng, texts, values = random.Random("probe"), [], []
    for _ in range(count):
        sentences = sentences_of(report_with_gist(rng, (0,)), tokenizer)
        texts.append(corrupt(sentences, tokenizer, rng))
        inside = ["", *(value for sentence in sentences for _, value in sentence), ""]
        values += [bool(value) for value, learned in zip(inside, texts[-1][2]) if learned]
    batch = [t.to(model.device) for t in tensors_of_texts(texts, tokenizer)]
    logits, labels = predictions(model, *batch)                                     # (N, V), (N,)
    losses = token_losses(logits, labels)                                           # (N,)
    rows = batch[1][:, 1:].nonzero()[:, 0].tolist()         # of which text each label is
    in_source = [set(source) for source, _, _ in texts]
    masked = torch.tensor([label not in in_source[row] for row, label in
                           zip(rows, labels.tolist())])                             # (N,)
    right = (logits.argmax(1) == labels).float()                                    # (N,)
    return {name: round(numbers.mean().item(), 4) for name, numbers in
            (("restored", losses), ("hidden", losses[masked]), ("right", right),
             ("copied", right[torch.tensor(values) & ~masked]))}
