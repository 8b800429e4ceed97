"""Decoding: what the frozen model says, with a prefix in front or without.

    python sample.py --run out/NAME "name : Blue Spice | food : Thai"
    python sample.py --run out/NAME --input tables.txt --output texts.txt
    python sample.py --run out/A --run out/B --input requests.jsonl     a prefix for each line
    python sample.py --model gpt2 "The prefix"              the frozen model alone goes on

Greedy, sampled or by beams, in batches of ragged prompts with prefixes of their own, each token
computed once (a cache of keys and values). Standard output carries the text and nothing else.
train.py calls `generate` to show a sample. Not here: how a name becomes a model (opening.py), what
may be said and the search (beam.py), scores (evaluate.py).
"""
import dataclasses
import json
import sys
from math import inf
from pathlib import Path

import torch
from tqdm import tqdm

from beam import Rules, search
from data import formats, sequence, summaries
from model import attend as written_out
from opening import find_attention, open_model, open_run, pack_weights, recorded, run_settings
from plumbing import flag, parse, run, whole_file
from prefix import load_prefix
from reader import reader_of

LINE_BREAKS = ("\n", "\n\n")           # never said after a table: tokens 198 and 628 of GPT-2
# What a flag left out means, by the data set of the (first) run: the official code's choices. Its
# 11 and 62 tokens of a summary count the token that BART starts from, which nobody generates.
TABLES = dict(beam=5, min_new=5, max_new=100, length_penalty=1.0)
SUMMARIES = dict(beam=6, min_new=10, max_new=61, length_penalty=0.8)
DEFAULTS = {**dict.fromkeys(("e2e", "webnlg", "dart"), TABLES),
            **dict.fromkeys(summaries.NAMES, SUMMARIES),    # the paper's is XSum
            "all others": dict(beam=1, min_new=0, max_new=100, length_penalty=1.0)}


@dataclasses.dataclass
class Settings:
    prompt: str = flag("", "the table or text to start from; without it and --input: asks")
    run: list = flag([], "directory of a training run, out/NAME: its model with its prefix; "
                         "repeatable, for runs of one model: each line of --input names its run")
    model: str = flag("", "without --run: the frozen model of this name, or in this directory")
    input: str = flag("", "a file with one source a line, or .jsonl with a \"source\" in each line")
    output: str = flag("", "write here, not to standard output; .jsonl keeps the sources too")
    max_new: int = flag(None, "tokens to generate at most", kind=int, within=(1, inf))
    min_new: int = flag(None, "tokens to generate before <|endoftext|> is allowed", kind=int,
                        within=(0, inf))
    beam: int = flag(None, "texts kept alive in beam search; 1: greedy", kind=int, within=(1, 1000))
    length_penalty: float = flag(None, "beams compete by log p / length ** this", kind=float,
                                 within=(-100, 100))
    stop: str = flag("likely", "end a beam search when as many texts as beams are finished: full, "
                               "at once; likely, if no other is better now; sure, if none can be",
                     choices=["full", "likely", "sure"])
    no_repeat: int = flag(0, "this many tokens never follow each other twice, source included; 0: "
                             "they may", within=(0, inf))
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
    pack: str = flag("auto", "lay out the weights for this CPU's kernels, to be faster; auto: "
                             "where it can and the model is large", choices=["auto", "yes", "no"])
    graph: bool = flag(False, "on a GPU, without beams: record a step once and replay it, so that "
                              "it waits for no Python")


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
        # Not those that come when the tokens in front of them already have the probability.
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                         # (B, V)
    # As torch.multinomial draws, which also looks at p: a GPU would have to be waited for.
    pick = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, True)     # (B, 1)
    return order.gather(1, pick).squeeze(1)                                     # (B,)


def history(prompts, said):
    """For each row, lazily, the list of its prompt and the columns `said` (B, 1) so far."""
    rows = torch.cat(said, 1).tolist() if said else [[]] * len(prompts)
    yield from (prompt + row for prompt, row in zip(prompts, rows))


@torch.no_grad()
def generate(model, prompts, rules, prefix=None, choose=choose, attend=written_out):
    """Go on with each of `prompts`, lists of tokens of any lengths, a token at a time.

    A row ends at the end that `rules` names (beam.Rules), after its max_new tokens, or where the
    longest row has used up the model's positions. prefix, attend: see reader.py. choose: from
    logits (B, V) to tokens (B,). Returns each row's new tokens, without the end.
    """
    reader, eos = reader_of(model, prompts, prefix, rules.max_new, attend=attend), rules.eos
    rules = dataclasses.replace(rules, max_new=reader.room)
    logits, said = reader.logits, []                                            # (B, V)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)    # (B,)
    for n in range(rules.max_new):
        rules.forbid(logits, n, history(reader.prompts, said))
        ids = choose(logits).masked_fill(done, eos)[:, None]                    # (B, 1)
        said.append(ids)
        done |= ids[:, 0] == eos
        if n + 1 == rules.max_new or done.all():
            break
        logits = reader.read(ids)[:, 0]                                         # (B, V)
    rows = torch.cat(said, 1).tolist() if said else [[]] * len(prompts)         # (B, tokens said)
    return [row[:row.index(eos)] if eos in row else row for row in rows]


def resolve(settings):
    """Fill in what was left out with the defaults of the data set that the (first) run learned."""
    data = run_settings(settings.run[0])["data"] if settings.run else ""
    defaults = DEFAULTS.get(data, DEFAULTS["all others"])
    if settings.temperature and (settings.beam or 1) == 1:
        defaults = defaults | {"beam": 1}
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    if settings.beam > 1 and settings.temperature:
        raise ValueError(f"got --beam {settings.beam} and --temperature {settings.temperature}; "
                         "expected one of them: beams look for the likeliest text")
    if settings.beam > 1 and settings.attention == "fused":
        raise ValueError(f"got --attention fused and {settings.beam} beams; expected --beam 1: the "
                         "kernel knows no tree of texts; or use --attention explicit")
    if not settings.temperature and (settings.top_k or settings.top_p < 1):
        raise ValueError("got --top-k or --top-p without --temperature; expected both: at 0 no "
                         "token is drawn, the likeliest is taken; add --temperature 1")
    return settings


class Speaker:
    """A model, its prefixes and the settings of a program call: text in, text out."""

    def __init__(self, settings):
        if bool(settings.run) == bool(settings.model):
            raise ValueError(f"got {'both' if settings.run else 'neither'} of --run and --model; "
                             "expected one: --run out/NAME, or --model NAME for the frozen model")
        self.settings = s = resolve(settings)
        open_it, name = (open_run, s.run[0]) if s.run else (open_model, s.model)
        self.model, self.tokenizer, *rest = open_it(name, s.device, s.dtype)
        self.prefixes = {name: rest[0] if rest else self.model.no_prefix()}
        for other in s.run[1:]:
            self.prefixes[other] = self.beside(other)
        self.attend = find_attention(s.attention, self.model)
        pack_weights(s.pack, self.model)
        ban = s.ban or (LINE_BREAKS if s.run else ())
        banned = sorted({t for text in ban for t in self.tokenizer.encode_ordinary(text)})
        self.rules = Rules(self.tokenizer.eot_token, s.max_new, s.min_new, tuple(banned),
                           s.no_repeat, **self.model.config.forced)
        generator = torch.Generator(self.model.wte.weight.device).manual_seed(s.seed)
        self.choose = lambda logits: choose(logits, s.temperature, s.top_k, s.top_p, generator)
        self.generate = (recorded(self.model, self.rules, self.attend, s.beam, generator)
                         if s.graph else generate)

    def beside(self, run):
        """The prefix of another run; it has to be of the model that the first run brought."""
        try:
            return load_prefix(Path(run) / "prefix.pt", self.model)
        except ValueError as error:
            raise ValueError(f"got --run {run} beside --run {self.settings.run[0]}; expected "
                             f"prefixes of one model; leave one out ({error})") from error

    def tokens(self, source, prefix):
        """The prompt of one source; cut, and that told on stderr, where it does not fit."""
        s, room = self.settings, self.model.config.n_positions
        if self.model.architecture == "bart":   # a source has positions of its own
            room = min(room, run_settings(s.run[0])["max_source"]) if s.run else room
            ids = sequence.prompt_ids(self.tokenizer, source)
            over = len(ids) - room
            cut = sequence.cut_source(ids, over)
        else:
            room -= prefix.size(4)              # the frozen model alone knows nothing of sources
            ids = (sequence.prompt_ids(self.tokenizer, source) if s.run else
                   self.tokenizer.encode_ordinary(source) or [self.tokenizer.eot_token])
            over = len(ids) + s.max_new - room
            cut = sequence.cut_source(ids, over) if s.run else ids[max(over, 0):]
        if not cut:
            raise ValueError(f"got --max-new {s.max_new}, which leaves no room for a source in "
                             f"{room} free positions; lower --max-new")
        if over > 0:
            print(f"cut {over} tokens of {source[:40]!r}... to fit {room}", file=sys.stderr)
        return cut

    def say(self, sources, runs=None):
        """The text for each source, on one line each. runs: which run answers which source, by the
        names of --run; left out: the first answers all.
        """
        s, first = self.settings, next(iter(self.prefixes.values()))
        prefix = [self.prefixes[run] for run in runs] if runs else first
        prompts = [self.tokens(text, own) for text, own in
                   zip(sources, prefix if runs else [first] * len(sources))]
        if s.beam > 1:
            reader = reader_of(self.model, prompts, prefix, s.max_new, s.beam, self.attend)
            found = search(reader, self.rules, s.beam, s.length_penalty, s.stop)
            rows = [row for row, _ in found]
        else:
            rows = self.generate(self.model, prompts, self.rules, prefix, self.choose, self.attend)
        return [" ".join(sequence.text_of(self.tokenizer, row).splitlines()) for row in rows]


def which_run(name, runs, where):
    """The one of `runs` that a request calls `name`: as on the command line, or its last part."""
    if name is None and len(runs) <= 1:
        return runs[0] if runs else None
    fits = [run for run in runs if name in (run, Path(run).name)]
    if len(fits) != 1:
        raise ValueError(f"{where}: got the run {name!r}; expected one of {', '.join(runs)}; write "
                         'it as in --run, {"source": ..., "run": ...}')
    return fits[0]


def requests_in(path, runs):
    """The sources of a file, and which run answers each: its lines, or the "source" (and "run") of
    each line where it is JSON lines.
    """
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        rows = formats.read_jsonl(path, need=("source",))
        return ([row["source"] for row in rows],
                [which_run(row.get("run"), runs, f"{path}, source {row['source'][:40]!r}")
                 for row in rows])
    if len(runs) > 1:
        raise ValueError(f"got --input {path} and several --run; expected a .jsonl file whose "
                         'lines name their run, {"source": ..., "run": ...}')
    lines = [line.removesuffix("\r") for line in formats.read_text(path).rstrip().split("\n")]
    if lines == [""]:
        raise ValueError(f"got {path}, which is empty; expected one source a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():            # dropped, it would shift every text after it by one line
            raise ValueError(f"{path}, line {number}: got a blank line, expected a source; "
                             "delete it")
    return lines, runs * len(lines)


def answer_file(speaker, settings):
    """Decode every source of --input, in order; the output file appears when all are done."""
    sources, runs = requests_in(Path(settings.input), settings.run)
    texts, size = [], settings.batch_size
    for i in tqdm(range(0, len(sources), size), unit="batch", disable=None):
        several = runs[i:i + size] if len(settings.run) > 1 else None
        texts += speaker.say(sources[i:i + size], several)
    lines = "".join(f"{text}\n" for text in texts)
    if Path(settings.output).suffix == ".jsonl":
        told = [{"source": s, "text": t} for s, t in zip(sources, texts)]
        if len(settings.run) > 1:
            told = [row | {"run": run} for row, run in zip(told, runs)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told)
    if not settings.output:
        sys.stdout.write(lines)
        return
    with whole_file(settings.output, "w") as file:
        file.write(lines)


def main(argv=None):
    settings = parse(Settings, argv, "Decode, with a prefix or with the frozen model.", "prompt",
                     "\n".join(["defaults by data set:"] +
                               [f"  {data}: {value}" for data, value in DEFAULTS.items()]))
    if settings.prompt and settings.input:
        raise ValueError("got a prompt and --input; expected one of them")
    if settings.output and not settings.input:
        raise ValueError("got --output without --input; expected both, or > FILE for one text")
    if settings.output and Path(settings.output).exists() and not Path(settings.output).is_file():
        raise ValueError(f"got --output {settings.output}, which is no file; give the name of one")
    if len(settings.run) > 1 and not settings.input:
        raise ValueError('got several --run and no --input; expected a .jsonl file whose lines say '
                         'which, {"source": ..., "run": ...}; or give one --run')
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
