"""Pre-training of the bundled tiny BART: `python pretrain.py --model tiny-bart`.

Lewis et al. 2019: the encoder reads a text whose sentences are shuffled and in which spans are
masked, the decoder writes the text as it was; often one sentence is masked as a whole, too (Zhang
et al. 2020). The texts are the micro-world's, those of pretrain.py, and the reports of its
summarising task; no headline is among them.
pretrain.py calls it for the model, the batches, the loss and the probe; the loop, the optimisers
and the files are its own. Not here: the summarising task (data/headlines.py). Letters as in
model.py.
"""
import itertools
import math
import random
import re

import torch

from batches import padded
from data.bpe import world_texts
from data.headlines import report
from data.world_text import GROUPS, document, world_thing
from data.world_words import listed, say
from loss import nats_of
from model import BART, BARTConfig
from model import attend as written_out

MASKED, SPAN = 0.3, 3       # BART's share of tokens that are masked, and mean length of a span
WHOLE = 0.5                 # share of texts in which one sentence is masked as a whole


# ---- text, and what is made of it

def gist(thing, rng):
    """What a report's first or last sentence may say: the thing and one to three of its facts."""
    told = listed([say(fact, rng)[1] for fact in thing.facts[:rng.randint(1, 3)]])
    return rng.choice((f"In short, {thing.name} is a {thing.kind} {told}.",
                       f"{thing.name} is a {thing.kind} {told}.",
                       f"News of {thing.name}, a {thing.kind} {told}."))


def reported(rng, groups=GROUPS):
    """A report with chatter, mostly with its gist in front or at the end, as newspapers have it."""
    thing = world_thing(rng, groups)
    text, place = report(thing, groups, rng), rng.randrange(3)
    return (f"{gist(thing, rng)} {text}", f"{text} {gist(thing, rng)}", text)[place]


def text_of_world(rng):
    """One text with values in braces: a report, or a document of pre-training."""
    return reported(rng) if rng.random() < 0.7 else " ".join(document(rng))


def vocabulary_texts(count, seed):
    """What the tokenizer is learned from, as world_texts, and reports."""
    yield from world_texts(count, seed)
    rng = random.Random(f"tokenizer of reports {seed}")
    for _ in range(count // 2):
        yield re.sub(r"[{}]", "", reported(rng))


def sentences_of(text, tokenizer):
    """The text as a list of sentences, each a list of (token, the value it belongs to or "")."""
    sentences = []
    for sentence in re.split(r"(?<=[.?]) (?=[A-Z{])|\n+ ", text):
        blank, tokens = " " if sentences else "", []    # as in running text: it belongs to its word
        for piece in re.split(r"( ?\{[^}]*\})", blank + sentence):
            words = re.sub(r"[{}]", "", piece)
            value = words.strip() if piece.endswith("}") else ""
            tokens += [(token, value) for token in tokenizer.encode_ordinary(words)]
        sentences += [tokens] if tokens else []
    return sentences


def poisson(mean, rng):
    """A number of events (Knuth: how many uniform numbers until their product is small)."""
    count, product = 0, rng.random()
    while product > math.exp(-mean):
        count, product = count + 1, product * rng.random()
    return count


def infilled(count, rng):
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


def corrupted(sentences, tokenizer, rng):
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
    for where, kind in zip(read, infilled(len(read), rng), strict=True):
        if kind in (1, 2):
            source.append(tokenizer.mask_token)
        if kind in (0, 1):
            source.append(sentences[where[0]][where[1]][0])
            shown.add(where)
    if whole is not None:
        source.insert(rng.randint(0, len(source)), tokenizer.mask_token)
    every = [(n, place) for n, sentence in enumerate(sentences) for place in range(len(sentence))]
    pieces = [(value, list(where)) for value, where in
              itertools.groupby(every, lambda where: sentences[where[0]][where[1]][1])]
    known = {value for value, where in pieces if shown.issuperset(where)}
    target, learn = [], []
    for value, where in pieces:
        target += [sentences[n][place][0] for n, place in where]
        learn += [not value or value in known or one in shown for one in where]
        known.add(value)                        # from here on it stands in the target
    begin, end = [tokenizer.bos_token], [tokenizer.eot_token]
    return begin + source + end, begin + target + end, [True, *learn, True]


class Batches(torch.utils.data.Dataset):
    """The batches of `steps`: ids and learn of the targets, tokens and real of the sources.

    A function of the seed and the step, as pretrain.Batches. A batch has about rows x context
    tokens, sources and targets together; what is longer than the context is left out.
    """

    def __init__(self, tokenizer, settings, steps):
        self.tokenizer, self.settings, self.steps = tokenizer, settings, steps

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index):
        s, rng = self.settings, random.Random(f"noise {self.settings.seed} {self.steps[index]}")
        made, room = [], s.rows * s.context
        while room > 0:
            sentences = sentences_of(text_of_world(rng), self.tokenizer)
            source, target, learn = corrupted(sentences, self.tokenizer, rng)
            if len(source) <= s.context and len(target) < s.context:
                made.append((source, target, learn))
                room -= len(source) + len(target)
        return tensors(made, self.tokenizer)


def tensors(made, tokenizer):
    """(ids (B, T), learn (B, T), source (B, S), real (B, S)) of a list from `corrupted`."""
    begin = tokenizer.eot_token                             # </s>, as in front of every target
    ids, _ = padded([[begin, *target] for _, target, _ in made])                    # (B, T)
    learn = torch.zeros_like(ids, dtype=torch.bool)                                 # (B, T)
    for row, (_, target, learned) in enumerate(made):
        learn[row, 1:1 + len(target)] = torch.tensor(learned)
    return ids, learn, *padded([source for source, _, _ in made])


# ---- the model

def new_model(settings):
    """First weights as in pretrain.new_model: N(0, 0.02), words N(0, 0.1), less in the branches."""
    s = settings
    torch.manual_seed(s.seed)
    words = s.vocabulary + 5                    # with <s>, <pad>, </s>, <unk> and <mask>
    net = BART(BARTConfig(words, s.context, s.width, s.layers, s.layers, s.heads, s.heads,
                          4 * s.width, 4 * s.width))
    for name, weight in net.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * s.layers))
        elif weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.1 if name == "shared.weight" else 0.02)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    return net


def loss_of(net, ids, learn, source, real, attend=written_out):
    """(summed loss, number) of the learned tokens."""
    memory = net.encode(source, real, attend=attend)
    hidden, learn = net(ids, attend=attend, memory=memory)[:, :-1], learn[:, 1:]    # (B, T-1, C)
    return nats_of(net.head(hidden[learn]), ids[:, 1:][learn]), int(learn.sum())


@torch.no_grad()
def probe(net, tokenizer, count=64):
    """How well noise is undone in reports on things whose names were never read.

    restored: loss of the learned tokens. hidden: loss of those that are masked in the source.
    right: share of all learned tokens that are the likeliest after the true ones before them;
    copied: the same of the tokens of values that stand in the source.
    """
    rng, made, values = random.Random("probe"), [], []
    for _ in range(count):
        sentences = sentences_of(reported(rng, (0,)), tokenizer)
        made.append(corrupted(sentences, tokenizer, rng))
        inside = ["", *(value for sentence in sentences for _, value in sentence), ""]
        values += [bool(value) for value, learned in zip(inside, made[-1][2]) if learned]
    ids, learn, source, real = (t.to(net.wte.weight.device) for t in tensors(made, tokenizer))
    hidden = net(ids, memory=net.encode(source, real))[:, :-1]                      # (B, T-1, C)
    logits = net.head(hidden[learn[:, 1:]]).float()                                 # (N, V)
    target = ids[:, 1:][learn[:, 1:]]                                               # (N,)
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")      # (N,)
    there = [set(row) for row, _, _ in made]
    masked = torch.tensor([token not in there[row] for row, token in
                           zip(learn[:, 1:].nonzero()[:, 0].tolist(), target.tolist())])
    right = (logits.argmax(1) == target).float()                                    # (N,)
    return {name: round(numbers.mean().item(), 4) for name, numbers in
            (("restored", loss), ("hidden", loss[masked]), ("right", right),
             ("copied", right[torch.tensor(values) & ~masked]))}
