"""The cartridge: what the prefix studies is what the model said with the sheet in sight."""
import random
import subprocess
import sys

import torch
from conftest import ROOT
from torch.nn import functional as F

from prefix import Prefix
from pretrained.load import load_model
from scripts.cartridge import ask, converse, log_probabilities, make_document, study


def test_a_prefix_studies_what_the_model_says_with_the_sheet():
    """Would catch: a student that sees the sheet, a teacher that does not, another token compared
    with another; facts that reach the prefix by another way.
    """
    model, tokenizer = load_model("tiny-gpt2", "cpu", "fp32")
    sheets, facts = make_document(tokenizer, random.Random(0))
    assert sum(map(len, sheets)) > model.max_positions and len(facts) == 48
    talks = converse(model, tokenizer, sheets[:1], times=8)
    for read, without in talks:
        assert read.ids == sheets[0] + without.ids
        assert read.ids[read.start:] == without.ids[without.start:]
    few = [fact for fact in facts if fact[0] == 0]
    assert ask(model, tokenizer, few, sheets) == 6 > ask(model, tokenizer, few, [[]] * 8)

    def distance(prefix=None):
        with torch.no_grad():
            seen, unseen = (log_probabilities(model, pairs, p) for pairs, p
                            in zip(zip(*talks), (None, prefix)))
        return F.kl_div(unseen, seen, log_target=True, reduction="batchmean").item()
    torch.manual_seed(0)
    learner = Prefix.for_model(model, 5, mid_dim=0)
    learner.initialize(model.prefix_from_tokens(sheets[0][:5]))
    study(model, learner, talks, steps=20, batch_size=4)
    assert distance(learner.fold()) < 0.5 * distance()


def test_help_does_not_begin_to_learn():
    """Would catch: minutes of work for who asks what a program does."""
    done = subprocess.run([sys.executable, "-m", "scripts.cartridge", "--help"], cwd=ROOT,
                          text=True, capture_output=True, timeout=60)
    assert done.stdout.startswith("usage: python -m scripts.cartridge") and not done.returncode
