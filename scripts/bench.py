"""Speed: how long things take beside the alternatives, in one run and taking turns.

    python -m scripts.bench attention                       this machine, printed
    python -m scripts.bench attention --out docs/results/attention.jsonl
    python -m scripts.bench decode --dtype bf16             beside peft and transformers
    python -m scripts.bench train --data-dir DIR            the same, a step of training
    python -m scripts.bench dev                             a dev set, with and without sharing
    python -m scripts.bench layers --model llama            a prefix in the upper layers only

`attention`: one layer of attention with a prefix that the batch shares, in every form of fast/; and
"sdpa, no mask": PyTorch's, told that nothing is padded, as other implementations have it. Training
is forward and backward, decoding one query a row. On a GPU a second column replays the same work as
a CUDA graph: what is left when Python and the launches cost nothing. `decode`: a GPT-2 with random
weights answers a batch, with a prefix, by our generate and by peft's. `train`, `dev`
and `layers` are bench_train.py's. A bench that is stopped keeps what it has measured.
"""
import dataclasses
import datetime
import json
import platform
import random
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from decoding.beam import beam_search
from decoding.constraints import Constraints
from decoding.state import DecodingState
from fast.cuda_graph import RecordedGenerate, replay_of
from fast.packed import pack, why_not_packable
from fast.sdpa_attention import SDPAAttention
from model import ExplicitAttention
from pretrained.load import decide_device, name_of_dtype
from sample import generate, sample_token
from scripts.bench_data import P
from scripts.bench_train import (
    added,
    dev,
    in_turns,
    layers,
    over_best_peft,
    same_weights,
    size_of,
    train,
)
from scripts.peft_model import peft_model, random_model
from utils.cli import flag, parse, run_program
from utils.files import atomic_write

SHAPES = {  # B, H, T, S, P; D = 64. GPT-2 medium's 16 heads; batches and lengths of the paper.
    "training, batch 5": (5, 16, 60, 60, 5),
    "training, batch 10": (10, 16, 60, 60, 10),
    "training, batch 32": (32, 16, 96, 96, 10),
    "training, long prefix": (32, 16, 96, 96, 200),
    "decoding, batch 1": (1, 16, 1, 96, 10),
    "decoding, batch 32": (32, 16, 1, 96, 10),
    "decoding, batch 256": (256, 16, 1, 96, 10),
    "decoding, long prefix": (256, 16, 1, 96, 200),
    "decoding, long text": (32, 16, 1, 800, 10),
}


@dataclasses.dataclass
class Settings:
    what: str = flag("", "attention, decode, train, dev or layers")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = flag("auto", "auto: bf16 on a GPU, else fp32", choices=["auto", "fp32", "bf16"])
    model: str = flag("gpt2", "with random weights: GPT-2 small, on a GPU medium; llama and toy: "
                              "of SmolLM2's and tiny-gpt2's shape",
                      choices=["gpt2", "llama", "toy"])
    rounds: int = flag(0, "turns that each form takes; 0: 5; on a GPU 10, for attention 50",
                       within=(0, 10 ** 6))
    data_dir: str = flag("", "train, dev and layers take E2E's texts from here; left out: lengths "
                             "like E2E's are drawn")
    compile: bool = flag(False, "train: our step compiled, too; takes minutes more")
    out: str = flag("", "write the figures here too, as JSON lines")


# ---- attention with a prefix that the batch shares

class UnpaddedSDPA:
    """PyTorch's attention where nothing is padded: no mask is written out then."""

    @staticmethod
    def mask(key_mask, T, causal, tree=None):
        return causal_lower_right(T, key_mask.size(1)) if T > 1 else None

    def __call__(self, q, k, v, pk, pv, mask):
        k, v = (torch.cat((p.expand(len(q), -1, -1, -1), x), 2) for p, x in ((pk, k), (pv, v)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)          # (B, H, T, D)


def forms(device, dtype):
    found = {"explicit": ExplicitAttention(), "sdpa, no mask": UnpaddedSDPA(),
             "sdpa": SDPAAttention()}
    if device.type == "cuda":
        from fast.triton_attention import TritonAttention  # needs triton
        found["fused"] = TritonAttention(device, dtype)
    return found


def work(form, B, H, T, S, P, device, dtype):
    """A function that does the work once. q lies in memory as GPT-2's does, k and v as in a KV
    cache; the mask is there already, as it is for all layers but the first.
    """
    training, D = T > 1, 64
    torch.manual_seed(0)
    q = torch.randn(B, T, H, D, device=device, dtype=dtype).transpose(1, 2)     # (B, H, T, D)
    k, v = torch.randn(2, B, H, S, D, device=device, dtype=dtype)               # (B, H, S, D)
    pk, pv = torch.randn(2, 1, H, P, D, device=device, dtype=dtype)             # (1, H, P, D)
    inputs = [x.detach().requires_grad_(training) for x in (q, k, v, pk, pv)]
    mask = form.mask(torch.ones(B, P + S, dtype=torch.bool, device=device), T, True)
    g = torch.randn_like(q)

    def once(_=None):
        out = form(*inputs, mask)
        if training:
            torch.autograd.grad(out, inputs, g)
    return once


def measure(shape, device, dtype, rounds):
    """{form: {"us": median microseconds, "graph us": ..., "peak MB": ...}} for one shape."""
    calls, figures = {}, {}
    for name, form in forms(device, dtype).items():
        once = work(form, *shape, device, dtype)
        calls[name, "us"], figures[name] = (once, [None]), {}
        if device.type == "cuda":
            figures[name]["peak MB"] = added(once, device) / 1e6
            replay = replay_of(once, device)
            calls[name, "graph us"] = (lambda _, replay=replay, once=once: replay()), [None]
    times = 20 if device.type == "cuda" else 1
    for (name, column), taken in in_turns(calls, device, rounds, times).items():
        figures[name][column] = taken * 1e6
    return figures


def attention(device, dtype, rounds):
    """Print the table of all shapes; yield one row of figures for each form and shape."""
    print(f"{'':24}{'form':>14}{'us':>10}{'/ best other':>14}{'graph us':>10}{'/ best other':>14}"
          f"{'peak MB':>9}")
    for title, shape in SHAPES.items():
        figures = measure(shape, device, dtype, rounds)
        for name, own in figures.items():
            ratio = {}
            for column in ("us", "graph us"):
                if column in own:
                    best = min(other[column] for n, other in figures.items() if n != name)
                    ratio[column] = own[column] / best
            cells = [f"{own[c]:>10.1f}{ratio[c]:>14.2f}" if c in own else f"{'-':>10}{'-':>14}"
                     for c in ("us", "graph us")]
            memory = f"{own['peak MB']:>9.1f}" if "peak MB" in own else f"{'-':>9}"
            print(f"{title if name == 'explicit' else '':24}{name:>14}{''.join(cells)}{memory}",
                  flush=True)
            yield {"what": title, "form": name, **dict(zip("BHTSP", shape)), **own,
                   "over best other": ratio}


# ---- decoding beside peft and transformers

DECODING = {  # sources at once, beams
    "cpu": {"greedy, 1 source": (1, 1), "greedy, 8 sources": (8, 1), "5 beams, 1 source": (1, 5),
            "5 beams, 8 sources": (8, 5)},
    "cuda": {"greedy, 1 source": (1, 1), "greedy, 8 sources": (8, 1), "greedy, 32 sources": (32, 1),
             "greedy, 256 sources": (256, 1), "5 beams, 1 source": (1, 5),
             "5 beams, 32 sources": (32, 5)},
}
NEW_TOKENS = 40                                 # that every text is made to have


def our_decoder(model, prefix, generate=generate):
    """A function of prompts and beams: the tokens that our model generates."""
    constraints = Constraints(0, NEW_TOKENS, NEW_TOKENS)

    def decode(prompts, beams):
        if beams == 1:
            return generate(model, prompts, constraints, prefix, sample_token)
        state = DecodingState(model, prompts, prefix, NEW_TOKENS, beams)
        return [row for row, _ in beam_search(state, constraints, beams)]
    return decode


def their_decoder(theirs):
    """The same of peft's model."""
    def decode(prompts, beams):
        T = max(map(len, prompts))
        ids = [[0] * (T - len(p)) + p for p in prompts]                         # (B, T)
        mask = [[0] * (T - len(p)) + [1] * len(p) for p in prompts]             # (B, T)
        return theirs.generate(
            input_ids=torch.tensor(ids, device=theirs.device), do_sample=False, num_beams=beams,
            attention_mask=torch.tensor(mask, device=theirs.device),
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)[:, T:].tolist()
    return decode


def decoders(device, dtype, name):
    """{form: function of prompts and beams}; the first is sample.py without a flag."""
    model = random_model(size_of(name, device), device, dtype)
    L, _, _, H, _, D = model.empty_prefix().shape
    prefix = torch.randn(L, 2, 1, H, P, D, device=device, dtype=dtype)
    found = {"ours": our_decoder(model, prefix)}
    if not why_not_packable(model):             # as --fast does it where it helps
        packed = same_weights(model)
        pack(packed)
        found["ours, packed"] = our_decoder(packed, prefix)
    if device.type == "cuda":
        recorded = RecordedGenerate(torch.Generator(device))
        found["ours, recorded"] = our_decoder(model, prefix, recorded)
    return found | {f"peft, {name}": their_decoder(peft_model(model, prefix, name))
                    for name in ("sdpa", "eager")}


def decode(device, dtype, rounds, name):
    """Print a table of tokens a second; yield one row of figures for each form and case."""
    everyone, rng = decoders(device, dtype, name), random.Random(0)
    V = size_of(name, device)[1].vocab_size
    print(f"{'':24}{'form':>16}{'tokens/s':>10}{'/ best peft':>13}{'same tokens':>13}")
    for title, (B, beams) in DECODING[device.type].items():
        forms = {name: partial(form, beams=beams) for name, form in everyone.items()
                 if beams == 1 or name != "ours, recorded"}     # beams are not recorded
        prompts = [[rng.randrange(1, V) for _ in range(rng.randint(25, 45))]
                   for _ in range(B)]           # tables of 35 tokens on average
        texts = {name: form(prompts) for name, form in forms.items()}
        taken = in_turns({name: (form, [prompts]) for name, form in forms.items()}, device, rounds)
        rows = [{"what": title, "form": name, "tokens/s": B * NEW_TOKENS / taken[name]}
                for name in forms]
        for row in over_best_peft(rows):
            alike = sum(x == y for x, y in zip(texts[row["form"]], texts["ours"]))
            print(f"{title if row['form'] == 'ours' else '':24}{row['form']:>16}"
                  f"{row['tokens/s']:>10.1f}{row['over best peft']:>13.2f}{alike:>11}/{B}",
                  flush=True)
            yield row | {"same tokens": f"{alike}/{B}"}


def main(argv=None):
    settings = parse(Settings, argv, "Measure speed beside the alternatives.", "what")
    options = dict(name=settings.model)
    texts = options | dict(data_dir=settings.data_dir)
    measures = {"attention": attention, "decode": partial(decode, **options),
                "train": partial(train, **texts, compiled=settings.compile),
                "dev": partial(dev, **texts), "layers": partial(layers, **texts)}
    if settings.what not in measures:
        raise ValueError(f"got {settings.what!r}; expected what to measure: {', '.join(measures)}; "
                         "`python -m scripts.bench attention`")
    if settings.compile and settings.what != "train" or (
            settings.data_dir and settings.what not in ("train", "dev", "layers")):
        raise ValueError(f"got {settings.what} with --compile or --data-dir; expected them with "
                         "train, --data-dir with dev and layers too; leave them out")
    device, dtype = decide_device(settings.device, settings.dtype)
    rounds = settings.rounds or (5 if device.type != "cuda" else
                                 50 if settings.what == "attention" else 10)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)       # events and graphs belong to the current GPU
        machine = torch.cuda.get_device_name()
    else:
        # Several threads wait for each other by spinning: CPU time that is nobody's work.
        torch.set_num_threads(1)
        machine = (f"{platform.processor() or platform.machine()}, "
                   f"{torch.backends.cpu.get_cpu_capability()}")
    about = {"measure": settings.what, "machine": machine, "torch": torch.__version__,
             "model": settings.model, "dtype": name_of_dtype(dtype), "rounds": rounds,
             "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
    print(" ".join(f"{key} {value}" for key, value in about.items()))
    lines = []
    for row in measures[settings.what](device, dtype, rounds):
        lines.append(json.dumps(about | row) + "\n")
        if settings.out:
            with atomic_write(Path(settings.out), "w") as file:
                file.writelines(lines)


if __name__ == "__main__":
    run_program(main)
