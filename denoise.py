"""Pre-training of the bundled tiny BART: `python pretrain.py --model tiny-bart`.

Lewis et al. 2019: the encoder reads a text whose sentences are shuffled and in which spans are
masked, the decoder writes the text as it was. The texts are the micro-world's, those of
pretrain.py, and the reports of its summarising task; no headline is among them.
pretrain.py calls it for the model, the batches, the loss and the probe; the loop, the optimisers
and the files are its own. Not here: the summarising task (data/headlines.py). Letters as in
model.py.
"""
import math
import random
import re

import torch

from data.bpe import world_texts
from data.headlines import report
from data.sequence import Pair
from data.world_text import FIRST, GROUPS, TEXT, document, mark, world_thing
from loss import collate, target_nats
from model import BART, BARTConfig
from model import attend as written_out

MASKED, SPAN = 0.3, 3       # BART's share of tokens that are masked, and mean length of a span


# ---- text, and what is made of it

def text_of_world(rng, groups=GROUPS):
    """One text with values in braces: a document of pre-training, or a report with chatter."""
    if rng.random() < 0.4:
        return report(world_thing(rng, groups), groups, rng)
    return " ".join(document(rng))


def vocabulary_texts(count, seed):
    """What the tokenizer is learned from, as world_texts, and reports."""
    yield from world_texts(count, seed)
    rng = random.Random(f"tokenizer of reports {seed}")
    for _ in range(count // 2):
        yield re.sub(r"[{}]", "", report(world_thing(rng), GROUPS, rng))


def sentences_of(text, tokenizer):
    """The text as a list of sentences, each a list of (token, role); see data/world_text.py."""
    seen, sentences = set(), []
    for sentence in re.split(r"(?<=[.?]) (?=[A-Z{])|\n+ ", text):
        blank = " " if sentences else ""        # as in running text: a blank belongs to its word
        sentences.append(list(zip(*mark(blank + sentence, tokenizer, seen), strict=True)))
        seen |= {f" {value.lstrip()}" for value in seen}    # the text's first word has no blank
    return [sentence for sentence in sentences if sentence]


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
    the target's tokens is learned. Nobody can guess a made-up name that is masked where it occurs
    first: such tokens are not.
    """
    order = [(n, place) for n, sentence in enumerate(sentences) for place in range(len(sentence))]
    shuffled = list(range(len(sentences)))
    rng.shuffle(shuffled)
    read = [(n, place) for n in shuffled for place in range(len(sentences[n]))]
    source, hidden = [], set()
    for where, kind in zip(read, infilled(len(read), rng), strict=True):
        if kind in (1, 2):
            source.append(tokenizer.mask_token)
        if kind in (0, 1):
            source.append(sentences[where[0]][where[1]][0])
        else:
            hidden.add(where)
    target = [sentences[n][place][0] for n, place in order]
    learn = [sentences[n][place][1] != FIRST or (n, place) not in hidden for n, place in order]
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
    ids, learn = collate([Pair([begin, *target], 1) for _, target, _ in made], "cpu")
    for row, (_, target, learned) in enumerate(made):
        learn[row, 1:1 + len(target)] = torch.tensor(learned)
    source, real = collate([Pair(source, 0) for source, _, _ in made], "cpu")
    return ids, learn, source, real


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
    return target_nats(net, None, ids, learn, attend, (source, real)), int(learn.sum())


@torch.no_grad()
def probe(net, tokenizer, count=64):
    """How well noise is undone in reports on things whose names were never read.

    restored: loss of the learned tokens. hidden: loss of those that are masked in the source.
    right: share of all learned tokens that are the likeliest after the true ones before them;
    copied: the same of the tokens of values that stand in the source.
    """
    rng, made, values = random.Random("probe"), [], []
    for _ in range(count):
        sentences = sentences_of(report(world_thing(rng, groups=(0,)), (0,), rng), tokenizer)
        made.append(corrupted(sentences, tokenizer, rng))
        roles = [role for sentence in sentences for _, role in sentence]
        values += [role != TEXT for role, learned in zip([TEXT, *roles, TEXT], made[-1][2],
                                                         strict=True) if learned]
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
