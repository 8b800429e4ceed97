"""Decoding: what the frozen model says, with a prefix in front or without.

    python sample.py --run out/NAME "name : Blue Spice | food : Thai"
    python sample.py --run out/NAME --input tables.txt --output texts.txt
    python sample.py --model gpt2 "The prefix"              the frozen model alone goes on

Greedy or sampled, in batches of ragged prompts, each token computed once (a cache of keys and
values). Standard output carries the text and nothing else. train.py calls `generate` to show a
sample. Not here: how a name becomes a model (opening.py), beam search, scores.
"""
import dataclasses
import json
import sys
from math import inf
from pathlib import Path

import torch
from tqdm import tqdm

from data import formats, sequence
from model import Cache, attend
from opening import find_attention, open_model, open_run
from plumbing import flag, parse, run, whole_file

LINE_BREAKS = ("\n", "\n\n")           # never said after a table: tokens 198 and 628 of GPT-2


@dataclasses.dataclass
class Settings:
    prompt: str = flag("", "the table or text to start from; without it and --input: asks")
    run: str = flag("", "directory of a training run, out/NAME: its model with its prefix")
    model: str = flag("", "without --run: the frozen model of this name, or in this directory")
    input: str = flag("", "a file with one source a line, or .jsonl with a \"source\" in each line")
    output: str = flag("", "write here, not to standard output; .jsonl keeps the sources too")
    max_new: int = flag(100, "tokens to generate at most", within=(1, inf))
    min_new: int = flag(0, "tokens to generate before <|endoftext|> is allowed",
                        within=(0, inf))
    ban: list = flag([], "text each of whose tokens may never be said (\" the\" and \"the\" are "
                         "two), repeatable; with --run and none given: line breaks")
    temperature: float = flag(0.0, "0: greedy; 1: sample from the model's distribution",
                              within=(0, 1000))
    top_k: int = flag(0, "sample from the k likeliest tokens only; 0: from all",
                      within=(0, inf))
    top_p: float = flag(1.0, "sample from the likeliest tokens that together have this probability",
                        within=(1e-9, 1))
    seed: int = flag(101, "seed of the sampling", within=(0, 10 ** 12))
    batch_size: int = flag(16, "sources decoded at once, with --input", within=(1, inf))
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = flag("auto", "of the frozen weights; auto: bf16 on a GPU that has it, else fp32",
                      choices=["auto", "fp32", "bf16", "fp64"])
    attention: str = flag("explicit", "fused: one kernel that reads the prefix without copying it; "
                                      "needs a CUDA GPU and triton", choices=["explicit", "fused"])


def choose(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """One token a row from logits (B, V): the likeliest at temperature 0, else drawn. Returns (B,).

    top_k keeps the k likeliest; top_p (Holtzman et al. 2020) keeps the smallest set of likeliest
    tokens whose probability reaches p, so at least one.
    """
    if temperature == 0:
        return logits.argmax(-1)                                                # (B,)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))        # bf16 is too coarse
    logits = logits - logits.amax(-1, keepdim=True)     # so that a tiny temperature cannot overflow
    order = logits.argsort(-1, descending=True)                         # (B, V) likeliest first
    p = (logits / temperature).softmax(-1).gather(1, order)                     # (B, V)
    if top_k:
        p[:, top_k:] = 0
    p = p / p.sum(-1, keepdim=True)                                             # (B, V)
    if top_p < 1:
        p[p.cumsum(-1) - p >= top_p] = 0    # the tokens in front of it already have the probability
    pick = torch.multinomial(p, 1, generator=generator)                         # (B, 1)
    return order.gather(1, pick).squeeze(1)                                     # (B,)


@torch.no_grad()
def generate(model, prompts, eos, prefix=None, max_new=100, min_new=0, banned=(), choose=choose,
             attend=attend):
    """Go on with each of `prompts`, lists of tokens of any lengths.

    A row ends at `eos`, after `max_new` tokens, or where the longest row has used up the model's
    positions. Raises ValueError for an empty prompt or one that fills all positions.
    prefix: (L, 2, 1 or B, H, P, D). min_new: tokens before `eos` is allowed; banned: tokens never
    said. choose: from logits (B, V) to tokens (B,). attend: see GPT2.forward. Returns each row's
    new tokens, without eos.
    """
    prefix = model.no_prefix() if prefix is None else prefix
    if not prompts or not all(prompts):
        raise ValueError("got an empty prompt, or none; expected a token at least in each")
    B, T, P = len(prompts), max(map(len, prompts)), prefix.size(4)
    if P + T >= model.config.n_positions:
        raise ValueError(f"got a prefix of {P} and a prompt of {T} tokens; expected less than "
                         f"{model.config.n_positions} together; shorten one of them")
    device, max_new = model.wte.weight.device, min(max_new, model.config.n_positions - P - T)
    # Padding goes in front, so that the newest token of every row stands in the last column.
    ids = torch.tensor([[eos] * (T - len(p)) + p for p in prompts], device=device)          # (B, T)
    pad = torch.tensor([T - len(p) for p in prompts], device=device)                        # (B,)
    key = torch.arange(P + T + max_new, device=device)
    real = (key < P) | (key >= P + pad[:, None])                                # (B, P+T+max_new)
    cache, done, said = Cache(model, B, T + max_new), torch.zeros_like(pad, dtype=torch.bool), []
    for n in range(max_new):
        seen = P + cache.length + ids.size(1)
        hidden = model(ids, prefix, real[:, :seen], cache, attend)      # (B, T, C), later (B, 1, C)
        logits = model.head(hidden[:, -1])                                      # (B, V)
        logits[:, list(banned)] = float("-inf")
        if n < min_new:
            logits[:, eos] = float("-inf")
        ids = choose(logits).masked_fill(done, eos)[:, None]                    # (B, 1)
        said.append(ids)
        done |= ids[:, 0] == eos
        if done.all():
            break
    rows = torch.cat(said, 1).tolist() if said else [[]] * B                    # (B, tokens said)
    return [row[:row.index(eos)] if eos in row else row for row in rows]


class Speaker:
    """A model, its prefix and the settings of a program call: text in, text out."""

    def __init__(self, settings):
        if bool(settings.run) == bool(settings.model):
            raise ValueError(f"got {'both' if settings.run else 'neither'} of --run and --model; "
                             "expected one: --run out/NAME, or --model NAME for the frozen model")
        open_it, name = (open_run, settings.run) if settings.run else (open_model, settings.model)
        self.model, self.tokenizer, *rest = open_it(name, settings.device, settings.dtype)
        self.prefix, self.settings = rest[0] if rest else self.model.no_prefix(), settings
        self.attend = find_attention(settings.attention, self.model)
        ban = settings.ban or (LINE_BREAKS if settings.run else ())
        self.banned = sorted({t for text in ban for t in self.tokenizer.encode_ordinary(text)})
        self.generator = torch.Generator(self.model.wte.weight.device).manual_seed(settings.seed)

    def tokens(self, source):
        """The prompt of one source; cut, and that told on stderr, where it does not fit."""
        s, room = self.settings, self.model.config.n_positions - self.prefix.size(4)
        if not s.run:                        # the frozen model knows nothing of sources and targets
            ids = self.tokenizer.encode_ordinary(source) or [self.tokenizer.eot_token]
            over = len(ids) + s.max_new - room
            cut = ids[max(over, 0):]            # a text goes on from its end
        else:
            ids = sequence.prompt_ids(self.tokenizer, source)
            over = len(ids) + s.max_new - room
            cut = sequence.cut_source(ids, over)
        if not cut:
            raise ValueError(f"got --max-new {s.max_new}, which leaves no room for a source in "
                             f"{room} free positions; lower --max-new")
        if over > 0:
            print(f"cut {over} tokens of {source[:40]!r}... to fit {room}", file=sys.stderr)
        return cut

    def say(self, sources):
        """The text for each source, on one line each."""
        s = self.settings
        rows = generate(
            self.model, [self.tokens(source) for source in sources], self.tokenizer.eot_token,
            self.prefix, s.max_new, s.min_new, self.banned,
            lambda logits: choose(logits, s.temperature, s.top_k, s.top_p, self.generator),
            self.attend)
        return [" ".join(sequence.text_of(self.tokenizer, row).splitlines()) for row in rows]


def sources_in(path):
    """The sources of a file: its lines, or the "source" of each line where it is JSON lines."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return [row["source"] for row in formats.read_jsonl(path, need=("source",))]
    lines = [line.removesuffix("\r") for line in formats.read_text(path).rstrip().split("\n")]
    if lines == [""]:
        raise ValueError(f"got {path}, which is empty; expected one source a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():            # dropped, it would shift every text after it by one line
            raise ValueError(f"{path}, line {number}: got a blank line, expected a source; "
                             "delete it")
    return lines


def answer_file(speaker, settings):
    """Decode every source of --input, in order; the output file appears when all are done."""
    sources, texts = sources_in(Path(settings.input)), []
    for i in tqdm(range(0, len(sources), settings.batch_size), unit="batch", disable=None):
        texts += speaker.say(sources[i:i + settings.batch_size])
    lines = "".join(f"{text}\n" for text in texts)
    if Path(settings.output).suffix == ".jsonl":
        lines = "".join(json.dumps({"source": s, "text": t}, ensure_ascii=False) + "\n"
                        for s, t in zip(sources, texts))
    if not settings.output:
        sys.stdout.write(lines)
        return
    with whole_file(settings.output, "w") as file:
        file.write(lines)


def main(argv=None):
    settings = parse(Settings, argv, "Decode, with a prefix or with the frozen model.", "prompt")
    if settings.prompt and settings.input:
        raise ValueError("got a prompt and --input; expected one of them")
    if settings.output and not settings.input:
        raise ValueError("got --output without --input; expected both, or > FILE for one text")
    if settings.output and Path(settings.output).exists() and not Path(settings.output).is_file():
        raise ValueError(f"got --output {settings.output}, which is no file; give the name of one")
    speaker = Speaker(settings)
    if settings.input:
        answer_file(speaker, settings)
    elif settings.prompt:
        print(*speaker.say([settings.prompt]))
    else:
        while True:
            try:
                print("source> ", end="", file=sys.stderr, flush=True)
                source = input()
            except EOFError:
                return
            if source.strip():
                print(*speaker.say([source]), flush=True)


if __name__ == "__main__":
    run(main)
