"""A document in a prefix, by self-study: a small cartridge (Eyuboglu et al. 2025, 2506.06266).

    python -m scripts.cartridge

Eight fact sheets are longer than what the bundled model can read. It reads one at a time and asks
itself questions; a prefix learns its answers (context distillation). Results: docs/cartridge.md.
"""
import argparse
import random

import torch

from data.batches import Pair
from data.causal import collate
from data.toy_world.text import sheet
from data.toy_world.words import KINDS, make_thing
from decoding.constraints import Constraints
from prefix import Prefix
from pretrained.load import load_model
from sample import generate, sample_token
from utils.cli import run_program


def make_document(tokenizer, rng):
    """(tokens of each sheet, facts (sheet, name, key, value)); nobody ever met the names."""
    things = [make_thing(list(KINDS), (0,), 6, rng) for _ in range(8)]
    sheets = [tokenizer.encode(f" {sheet(thing, rng)}\n") for thing in things]
    return sheets, [(i, x.name, key, value) for i, x in enumerate(things) for key, value in x.facts]


def one_line(tokenizer):
    return Constraints(tokenizer.eos_token_id, 30, more_ends=tuple(tokenizer.encode("\n")))


def converse(model, tokenizer, sheets, times):
    """(with the sheet, without it): Pairs of what the model asks itself, to learn its answers."""
    random_state, talks = torch.Generator().manual_seed(0), []
    start, colon = tokenizer.encode(" question :"), tokenizer.encode(" :")[0]
    for read in sheets:
        rows = generate(model, [read + start] * times, one_line(tokenizer),
                        sample=lambda logits: sample_token(logits, 1.0, generator=random_state))
        for row in rows:
            if colon in row:                                # " name, key ? answer : value"
                ids = [*start, *row, tokenizer.eos_token_id]
                answer = len(start) + row.index(colon) + 1
                talks.append((Pair(read + ids, len(read) + answer), Pair(ids, answer)))
    return talks


def log_probabilities(model, pairs, prefix=None):
    """The model's log p of every token, wherever one is learned: (N, V)."""
    batch = collate(pairs, model)
    hidden = model.hidden_states(**batch.inputs, prefix=prefix).flatten(0, 1)   # (B * T, C)
    return model.head(hidden[batch.label_positions]).log_softmax(-1)            # (N, V)


def study(model, learner, talks, steps=1200, lr=0.1, batch_size=16):
    """Train the prefix: without the sheet the model is to predict the same as with it."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr, weight_decay=0)
    with torch.no_grad():
        teacher = [log_probabilities(model, [read]) for read, _ in talks]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(talks), (batch_size,)).tolist()
        student = log_probabilities(model, [talks[i][1] for i in chosen], learner())    # (N, V)
        torch.nn.functional.kl_div(student, torch.cat([teacher[i] for i in chosen]),
                                   log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()


def ask(model, tokenizer, facts, contexts, prefix=None):
    """How many facts the model tells right, with the context of its sheet before each question."""
    prompts = [contexts[i] + tokenizer.encode(f" question : {name}, {key} ? answer :")
               for i, name, key, _ in facts]
    rows = generate(model, prompts, one_line(tokenizer), prefix)
    return sum(tokenizer.text_of(row) == value for row, (*_, value) in zip(rows, facts))


def main(lengths=(9, 27)):
    model, tokenizer = load_model("tiny-gpt2", "cpu", "fp32")
    sheets, facts = make_document(tokenizer, random.Random(0))
    document, nothing = sum(sheets, []), [[]] * len(sheets)
    print(f"{len(facts)} facts in {len(document)} tokens, {model.max_positions} positions; right:")
    end = [document[30 - model.max_positions:]] * len(sheets)       # 30 are left for the question
    for name, contexts in (("nothing to read", nothing), ("the end of the document", end),
                           ("the sheet with the answer", sheets)):
        print(f"{name:26}", ask(model, tokenizer, facts, contexts))
    talks = converse(model, tokenizer, sheets, times=64)
    for length in lengths:
        torch.manual_seed(0)
        learner = Prefix.for_model(model, length, mid_dim=0)
        learner.initialize(model.prefix_from_tokens(document[:length]))
        study(model, learner, talks)
        print(f"a prefix of {length:<14}", ask(model, tokenizer, facts, nothing, learner.fold()))


if __name__ == "__main__":
    argparse.ArgumentParser("python -m scripts.cartridge", description=__doc__).parse_args()
    run_program(main)
