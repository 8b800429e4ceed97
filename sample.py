"""Decoding: what the frozen model generates, with a prefix in front or without.

    python sample.py --run out/NAME "name : Blue Spice | food : Thai"
    python sample.py --run out/NAME --input tables.txt --output texts.txt
    python sample.py --run out/A --run out/B --input requests.jsonl     a prefix for each line
    python sample.py --model gpt2 "The prefix"              the frozen model alone goes on

Greedy, sampled or by beams, in batches of ragged prompts with prefixes of their own, each token
computed once (a KV cache). Standard output carries the text and nothing else. Not here: how prompts
are read (decoding/state.py), constraints and beam search (decoding/), scores (scripts/evaluate.py).
"""
import utils.before_torch  # noqa: F401  as in train.py

import contextlib
import dataclasses
import itertools
import sys
from pathlib import Path

import torch

from data import own, paper
from data.pairs import pairs_of
from data.requests import answer_line, check_output, read_requests
from decoding.beam import beam_search
from decoding.constraints import constraints_of
from decoding.state import DecodingState, stack_prefixes
from prefix import tensors_of
from pretrained.load import load_model
from pretrained.run_directory import load_prefix, load_run, run_settings
from utils.cli import flag, parse, run_program
from utils.files import atomic_write
from utils.terminal import note, progress, typed_lines


def sample_token(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """One token a row from logits (B, V): the likeliest at temperature 0, else drawn. Returns (B,).

    top_k keeps the k likeliest; top_p (Holtzman et al. 2020) keeps the smallest set of likeliest
    tokens whose probability reaches p, so at least one.
    """
    if temperature == 0:
        return logits.argmax(-1)                                                # (B,)
    logits = logits - logits.amax(-1, keepdim=True)     # so that a tiny temperature cannot overflow
    order = logits.argsort(-1, descending=True)                         # (B, V) likeliest first
    p = (logits / temperature).softmax(-1).gather(1, order)                     # (B, V)
    if top_k:
        p[:, top_k:] = 0
    p = p / p.sum(-1, keepdim=True)                                             # (B, V)
    if top_p < 1:
        # A token goes if those in front of it reach the probability already.
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                         # (B, V)
    # The way torch.multinomial draws; but that checks p, and waits for the GPU to do so.
    pick = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, True)     # (B, 1)
    return order.gather(1, pick).squeeze(1)                                     # (B,)


def sequences_so_far(prompts, columns):
    """For each row, lazily, the list of its prompt and what it generated: columns (B, 1)."""
    rows = torch.cat(columns, 1).tolist() if columns else [[]] * len(prompts)
    yield from (prompt + row for prompt, row in zip(prompts, rows))


@torch.no_grad()
def generate(model, prompts, constraints, prefix=None, sample=sample_token):
    """Continue each of `prompts`, lists of tokens of any lengths, token by token.

    A row ends at its end token, after max_new_tokens, or when the longest prefix and prompt have
    used all of the model's positions. prefix: see `DecodingState`. sample: logits (B, V) -> (B,).
    Returns each row's new tokens, without the end.
    """
    state = DecodingState(model, prompts, prefix, constraints.max_new_tokens)
    constraints = dataclasses.replace(constraints, max_new_tokens=state.max_new_tokens)
    logits, columns, eos = state.logits, [], constraints.eos_token_id           # (B, V)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)    # (B,)
    for step in range(constraints.max_new_tokens):
        constraints.apply(logits, step, sequences_so_far(state.prompts, columns))
        ids = sample(logits).masked_fill(done, eos)[:, None]                    # (B, 1)
        columns.append(ids)
        done |= constraints.ended(ids[:, 0])
        if step + 1 == constraints.max_new_tokens or state.all_done(done, step):
            break
        logits = state.step(ids)[:, 0]                                          # (B, V)
    rows = torch.cat(columns, 1).tolist() if columns else [[]] * len(prompts)   # (B, new tokens)
    return [constraints.until_end(row) for row in rows]


# ---- the command line

@dataclasses.dataclass
class Settings:
    prompt: str = flag("", "the source or text to start from; without it and --input: asks",
                       group='what is decoded: --run out/NAME "name : Strada"')
    run: list = flag([], "directory of a training run, out/NAME: its model with its prefix; "
                         "repeatable, for runs of one model: each line of --input names its run")
    model: str = flag("", "without --run: the frozen model of this name, or in this directory")
    input: str = flag("", "a file with one source a line; .jsonl, .json, .csv or .tsv with the key "
                          "or column \"source\", or as the run's --source-key")
    output: str = flag("", "write here, not to standard output; .jsonl keeps the sources too")
    max_new_tokens: int = flag(None, "tokens to generate at most", kind=int, within=(1, 100_000),
                               alias="max-new",
                               group='length and search: --run out/NAME --num-beams 5 "..."')
    min_new_tokens: int = flag(None, "tokens to generate before the end is allowed", kind=int,
                               within=(0, 100_000), alias="min-new")
    num_beams: int = flag(None, "texts kept alive in beam search; 1: greedy", kind=int,
                          within=(1, 1000), alias="beam")
    length_penalty: float = flag(None, "beams compete by log p / length ** this", kind=float,
                                 within=(-100, 100))
    early_stopping: str = flag("false", "end a beam search when as many texts as beams are "
                                        "finished: true, at once; false, if no other is better "
                                        "now; never, if none can become better",
                               choices=["true", "false", "never"])
    no_repeat_ngram_size: int = flag(0, "no n-gram of this size occurs twice, source included; "
                                        "0: off", within=(0, 100_000),
                                     alias="no-repeat")
    ban: list = flag([], "text each of whose tokens is never generated (\" the\" and \"the\" are "
                         "two), repeatable; left out, for tables by name: line breaks")
    temperature: float = flag(0.0, "0: greedy; 1: sample from the model's distribution",
                              within=(0, 1000),
                              group='chance: --run out/NAME --temperature 0.7 --top-p 0.9 "..."')
    top_k: int = flag(0, "sample from the k likeliest tokens only; 0: all", within=(0, 10 ** 6))
    top_p: float = flag(1.0, "sample from the likeliest tokens that together have this probability",
                        within=(1e-9, 1))
    seed: int = flag(101, "seed of the sampling", within=(0, 10 ** 12))
    batch_size: int = flag(16, "sources decoded at once, with --input", within=(1, 100_000),
                           group="device and speed: --run out/NAME --fast")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = flag("auto", "of the frozen weights; auto: bf16 on a GPU that has it, else fp32",
                      choices=["auto", "fp32", "bf16", "fp16", "fp64"])
    fast: bool = flag(False, "the forms of fast/ that help on this device; the text is the same")
    attention: str = flag("explicit", "sdpa: PyTorch's; fused: one kernel that reads the prefix "
                                      "without copying it, for a CUDA GPU with triton",
                          choices=["explicit", "sdpa", "fused"])
    graph: bool = flag(False, "on a GPU, without beams: record a step once and replay it, so that "
                              "it waits for no Python")


def resolve(args):
    """The settings, with the defaults of the data set that the (first) run learned."""
    settings = dataclasses.replace(args)
    if settings.temperature and settings.num_beams is None:
        settings.num_beams = 1
    data = run_settings(settings.run[0]).get("data", "") if settings.run else ""
    paper.fill_in(settings, paper.DECODING, data)
    settings.ban = settings.ban or paper.banned_after(data)
    if settings.num_beams > 1 and settings.temperature:
        raise ValueError(f"got --num-beams {settings.num_beams} and --temperature "
                         f"{settings.temperature}; expected one of them: beams look for the "
                         "likeliest text; leave one out")
    if not settings.temperature and (settings.top_k or settings.top_p < 1):
        raise ValueError("got --top-k or --top-p without --temperature; expected both: at 0 no "
                         "token is drawn, the likeliest is taken; add --temperature 1")
    return settings


class Generator:
    """A model, its prefixes and the settings of a program call: text in, text out."""

    def __init__(self, settings):
        if bool(settings.run) == bool(settings.model):
            raise ValueError(f"got {'both' if settings.run else 'neither'} of --run and --model; "
                             "expected one: --run out/NAME, or --model NAME for the frozen model")
        self.settings = s = resolve(settings)
        load, name = (load_run, s.run[0]) if s.run else (load_model, s.model)
        self.model, self.tokenizer, *rest = load(name, s.device, s.dtype)
        self.prefixes = {name: rest[0] if rest else self.model.empty_prefix()}
        for other in s.run[1:]:
            self.prefixes[other] = self.prefix_beside(other)
        self.constraints = constraints_of(
            self.model, self.tokenizer, s.ban, max_new_tokens=s.max_new_tokens,
            min_new_tokens=s.min_new_tokens, no_repeat_ngram_size=s.no_repeat_ngram_size)
        self.random = torch.Generator(self.model.device).manual_seed(s.seed)
        self.sample = lambda logits: sample_token(logits, s.temperature, s.top_k, s.top_p,
                                                  self.random)
        self.decode = generate
        if s.fast or s.graph or s.attention != "explicit":
            try:
                from fast.forms import decoding_form
            except ImportError as error:
                raise ValueError("got --fast, --graph or --attention, but there is no fast/ here "
                                 f"({error}); leave it out") from error
            self.decode = decoding_form(s, self.model, self.constraints, self.random) or generate

    def prefix_beside(self, run):
        """The prefix of another run; it has to be of the model that the first run brought."""
        try:
            prefix = load_prefix(Path(run) / "prefix.pt", self.model)
            stack_prefixes([next(iter(self.prefixes.values())), prefix], 2)     # of the same layers
            return prefix
        except ValueError as error:
            raise ValueError(f"got --run {run} beside --run {self.settings.run[0]}; expected "
                             f"prefixes of one model; leave one out ({error})") from error

    def prompt(self, source, prefix):
        """The tokens of one source. Where they do not fit they are cut, and stderr says so."""
        s, kind = self.settings, pairs_of(self.model)
        n_prefix = max(part.size(4) for part in tensors_of(prefix))
        max_source = run_settings(s.run[0]).get("max_source") if s.run else None
        limit = kind.prompt_limit(self.model, n_prefix, s.max_new_tokens, max_source)
        if s.run or self.model.is_encoder_decoder:
            ids, excess = kind.prompt(self.tokenizer, source, limit)
        else:                               # the frozen model alone knows nothing of sources
            start = self.model.generation_config.get("bos_token_id", self.tokenizer.eos_token_id)
            ids = self.tokenizer.encode(source) or [start]
            excess = max(0, len(ids) - limit)
            ids = ids[excess:]
        if not ids:
            raise ValueError(f"got --max-new-tokens {s.max_new_tokens}, which leaves no room for a "
                             f"source ({max(0, limit)} positions); lower --max-new-tokens")
        if excess:
            note(f"cut {excess} tokens of {source[:40]!r}... to fit {limit}")
        return ids

    def generate(self, sources, runs=None):
        """The text for each source. runs: which run answers which source, by the names of --run;
        left out: the first answers all.
        """
        s, first = self.settings, next(iter(self.prefixes.values()))
        own = [self.prefixes[run] for run in runs] if runs else [first] * len(sources)
        prompts = [self.prompt(source, prefix) for source, prefix in zip(sources, own)]
        prefix = own if runs else first
        if s.num_beams > 1:
            state = DecodingState(self.model, prompts, prefix, s.max_new_tokens, s.num_beams)
            rows = [row for row, _ in beam_search(state, self.constraints, s.num_beams,
                                                  s.length_penalty, s.early_stopping)]
        else:
            rows = self.decode(self.model, prompts, self.constraints, prefix, self.sample)
        return [self.tokenizer.text_of(row) for row in rows]


def answer_file(generator, settings):
    """Decode every source of --input, in order; the output file appears when all are done."""
    path, output, several = Path(settings.input), settings.output, len(settings.run) > 1
    # Read twice, for no file is too long for memory, and a bad line is found before hours of work.
    key, _ = own.keys_of(run_settings(settings.run[0]) if settings.run else {})
    total = sum(1 for _ in read_requests(path, settings.run, key))
    requests, bar = read_requests(path, settings.run, key), progress(total=total, unit="text")
    with bar, atomic_write(output, "w") if output else contextlib.nullcontext(sys.stdout) as file:
        for batch in iter(lambda: list(itertools.islice(requests, settings.batch_size)), []):
            sources, runs = zip(*batch)
            texts = generator.generate(sources, runs if several else None)
            for source, run, text in zip(sources, runs, texts):
                file.write(answer_line(source, text, run if several else None,
                                       output.lower().endswith(".jsonl")))
            bar.update(len(batch))


def main(argv=None):
    settings = parse(Settings, argv, "Decode, with a prefix or with the frozen model.", "prompt",
                     paper.decoding_notes())
    if "prompt" in settings.given and "input" in settings.given:
        raise ValueError("got a prompt and --input; expected one of them; leave one out")
    check_output(settings.output, settings.input)
    if len(settings.run) > 1 and "input" not in settings.given:
        raise ValueError('got several --run and no --input; expected a .jsonl file whose lines say '
                         'which, {"source": ..., "run": ...}; or give one --run')
    generator = Generator(settings)
    if "input" in settings.given:
        answer_file(generator, settings)
    elif "prompt" in settings.given:            # "" too: an empty text is not an absent one
        print(*generator.generate([settings.prompt]))
    else:
        for source in typed_lines("source> ", "source as in training, or a text to go on with,"):
            print(*generator.generate([source]), flush=True)


if __name__ == "__main__":
    run_program(main, "a smaller --batch-size, fewer --num-beams or --max-new-tokens")
