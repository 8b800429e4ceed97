"""Speed: how long things take beside the alternatives, in one run and taking turns.

    python bench.py attention                               this machine, printed
    python bench.py attention --out figures/results/attention.jsonl
    python bench.py decode --dtype bf16                     beside peft and transformers
    python bench.py train --data-dir DIR                    the same, a step of training
    python bench.py dev                                     a dev set, with and without sharing

`attention`: one layer of attention with a prefix that the batch shares. The forms are model.attend
(explicit), concatenation and PyTorch's scaled_dot_product_attention, as other implementations have
it (sdpa; where padding forces a mask on it, sdpa+mask), and fused.py where there is a CUDA GPU.
Training is forward and backward, decoding one query a row. On a GPU a second column replays the
same work as a CUDA graph: what is left when Python and the launches cost nothing.
`decode`: a GPT-2 with random weights answers a batch, with a prefix, by our generate and by peft's.
`train` and `dev` are bench_train.py's. A bench that is stopped keeps what it has measured.
"""
import copy
import dataclasses
import datetime
import json
import platform
import random
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from beam import Rules, search
from bench_train import SIZES, dev, seconds, train
from model import attend, may_look
from opening import decide_device, name_of_dtype
from packed import pack, possible
from plumbing import flag, parse, run, whole_file
from reader import GPT2Reader
from rivals import peft_model, random_model
from sample import choose, generate

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
    what: str = flag("", "attention, decode, train or dev")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = flag("auto", "auto: bf16 on a GPU, else fp32", choices=["auto", "fp32", "bf16"])
    rounds: int = flag(0, "turns that each form takes; 0: 5, on a GPU 10, of attention 50",
                       within=(0, 10 ** 6))
    data_dir: str = flag("", "train and dev take E2E's texts from here; left out: lengths like "
                             "E2E's are drawn")
    compile: bool = flag(False, "train: our step compiled, too; takes minutes more")
    out: str = flag("", "write the figures here too, as JSON lines")


# ---- attention with a shared prefix, by concatenation and PyTorch's fused attention

def sdpa(q, k, v, pk, pv, real, causal):
    """Only where nothing is padded: then no mask has to be written out, and PyTorch is fastest."""
    k, v = (torch.cat((p.expand(len(q), -1, -1, -1), x), 2) for p, x in ((pk, k), (pv, v)))
    order = causal_lower_right(q.size(2), k.size(2)) if q.size(2) > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=order)             # (B, H, T, D)


def sdpa_with_mask(q, k, v, pk, pv, real, causal):
    k, v = (torch.cat((p.expand(len(q), -1, -1, -1), x), 2) for p, x in ((pk, k), (pv, v)))
    mask = may_look(real, q.size(2), causal)                                    # (B, 1, T, P+S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)              # (B, H, T, D)


def forms(device):
    found = {"explicit": attend, "sdpa": sdpa, "sdpa+mask": sdpa_with_mask}
    if device.type == "cuda":
        import fused                            # needs triton
        found["fused"] = fused.attend
    return found


def work(form, B, H, T, S, P, device, dtype):
    """A function without arguments that does the work once, on tensors lying as GPT-2 has them."""
    training, D = T > 1, 64
    torch.manual_seed(0)
    q = torch.randn(B, T, H, D, device=device, dtype=dtype).transpose(1, 2)     # (B, H, T, D)
    k, v = torch.randn(2, B, H, S, D, device=device, dtype=dtype)               # (B, H, S, D)
    pk, pv = torch.randn(2, 1, H, P, D, device=device, dtype=dtype)             # (1, H, P, D)
    inputs = [x.detach().requires_grad_(training) for x in (q, k, v, pk, pv)]
    real = torch.ones(B, P + S, dtype=torch.bool, device=device)
    g = torch.randn_like(q)

    def once():
        out = form(*inputs, real, True)
        if training:
            torch.autograd.grad(out, inputs, g)
    return once


# ---- timing

def measure(shape, device, dtype, rounds):
    """{form: {"us": median microseconds, "graph us": ..., "peak MB": ...}} for one shape."""
    calls, figures = {}, {}
    for name, form in forms(device).items():
        once = work(form, *shape, device, dtype)
        for _ in range(3):                      # compilation, memory pools
            once()
        calls[name, "us"], figures[name] = once, {}
        if device.type == "cuda":
            from graphs import replay_of
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once()
            figures[name]["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            calls[name, "graph us"] = replay_of(once, device)
    times = {key: [] for key in calls}
    for _ in range(rounds):                     # in turns: what disturbs one disturbs all
        for key, once in calls.items():
            times[key].append(seconds(once, device, 20 if device.type == "cuda" else 1))
    for (name, column), values in times.items():
        figures[name][column] = statistics.median(values) * 1e6
    return figures


def attention(device, dtype, rounds):
    """Print the table of all shapes; yield one row of figures for each form and shape."""
    print(f"{'':24}{'form':>11}{'us':>10}{'/ best other':>14}{'graph us':>10}{'/ best other':>14}"
          f"{'peak MB':>9}")
    for title, shape in SHAPES.items():
        figures = measure(shape, device, dtype, rounds)
        for name, told in figures.items():
            ratio = {}
            for column in ("us", "graph us"):
                if column in told:
                    best = min(other[column] for n, other in figures.items() if n != name)
                    ratio[column] = told[column] / best
            cells = [f"{told[c]:>10.1f}{ratio[c]:>14.2f}" if c in told else f"{'-':>10}{'-':>14}"
                     for c in ("us", "graph us")]
            memory = f"{told['peak MB']:>9.1f}" if "peak MB" in told else f"{'-':>9}"
            print(f"{title if name == 'explicit' else '':24}{name:>11}{''.join(cells)}{memory}",
                  flush=True)
            yield {"what": title, "form": name, **dict(zip("BHTSP", shape)), **told,
                   "over best other": ratio}


# ---- decoding beside peft and transformers

DECODING = {  # sources at once, beams
    "cpu": {"greedy, 1 source": (1, 1), "greedy, 8 sources": (8, 1), "5 beams, 1 source": (1, 5),
            "5 beams, 8 sources": (8, 5)},
    "cuda": {"greedy, 1 source": (1, 1), "greedy, 8 sources": (8, 1), "greedy, 32 sources": (32, 1),
             "greedy, 256 sources": (256, 1), "5 beams, 1 source": (1, 5),
             "5 beams, 32 sources": (32, 5)},
}
P, SAID = 10, 40                                # prefix; tokens that every text is made to have


def our_words(model, prefix, generate=generate):
    """A function of prompts and beams: the tokens that our model says."""
    rules = Rules(0, SAID, SAID)

    def words(prompts, beams):
        if beams == 1:
            return generate(model, prompts, rules, prefix, choose)
        return [row for row, _ in search(GPT2Reader(model, prompts, prefix, SAID, beams), rules,
                                        beams)]
    return words


def their_words(theirs):
    """The same of peft's model."""
    def words(prompts, beams):
        T = max(map(len, prompts))
        ids = [[0] * (T - len(p)) + p for p in prompts]                         # (B, T)
        real = [[0] * (T - len(p)) + [1] * len(p) for p in prompts]             # (B, T)
        return theirs.generate(
            input_ids=torch.tensor(ids, device=theirs.device), do_sample=False, num_beams=beams,
            attention_mask=torch.tensor(real, device=theirs.device),
            max_new_tokens=SAID, min_new_tokens=SAID)[:, T:].tolist()
    return words


def speakers(device, dtype):
    """{form: function of prompts and beams}; the first is how sample.py decodes here."""
    model = random_model(SIZES[device.type], device, dtype)
    L, _, _, H, _, D = model.no_prefix().shape
    prefix = torch.randn(L, 2, 1, H, P, D, device=device, dtype=dtype)
    found = {"ours": our_words(model, prefix)}
    if not possible(model):
        fast = copy.deepcopy(model)
        pack(fast)
        found = {"ours": our_words(fast, prefix), "not packed": found["ours"]}
    if device.type == "cuda":
        from graphs import Generate
        found = {"ours": our_words(model, prefix, Generate(torch.Generator(device))),
                 "not recorded": found["ours"]}
    return found | {f"peft, {name}": their_words(peft_model(model, prefix, name))
                    for name in ("sdpa", "eager")}


def decode(device, dtype, rounds):
    """Print a table of tokens a second; yield one row of figures for each form and case."""
    everyone, rng = speakers(device, dtype), random.Random(0)
    V = SIZES[device.type].vocab_size
    # On a CPU only this process's own time: what else the machine does is not our speed.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    print(f"{'':24}{'form':>14}{'tokens/s':>10}{'ours / it':>11}{'same words':>12}")
    for title, (B, beams) in DECODING[device.type].items():
        # Beams are not recorded anyway.
        forms = {name: form for name, form in everyone.items()
                 if beams == 1 or name != "not recorded"}
        prompts = [[rng.randrange(1, V) for _ in range(rng.randint(25, 45))]
                   for _ in range(B)]           # tables of 35 tokens on average
        said = {name: form(prompts, beams) for name, form in forms.items()}     # warms up, too
        times = {name: [] for name in forms}
        for _ in range(rounds):                 # in turns: what disturbs one disturbs all
            for name, form in forms.items():
                start = clock()
                form(prompts, beams)            # its lists of tokens end what a GPU has to do
                times[name].append(clock() - start)
        rate = {name: B * SAID / statistics.median(t) for name, t in times.items()}
        for name in forms:
            alike = sum(x == y for x, y in zip(said[name], said["ours"]))
            print(f"{title if name == 'ours' else '':24}{name:>14}{rate[name]:>10.1f}"
                  f"{rate['ours'] / rate[name]:>11.2f}{alike:>9}/{B}", flush=True)
            yield {"what": title, "form": name, "tokens/s": rate[name],
                   "ours over it": rate["ours"] / rate[name], "same words": f"{alike}/{B}"}


def main(argv=None):
    settings = parse(Settings, argv, "Measure speed beside the alternatives.", "what")
    measures = {"attention": attention, "decode": decode,
                "train": partial(train, data_dir=settings.data_dir, compiled=settings.compile),
                "dev": partial(dev, data_dir=settings.data_dir)}
    if settings.what not in measures:
        raise ValueError(f"got {settings.what!r}; expected what to measure: {', '.join(measures)}; "
                         "`python bench.py attention`")
    if settings.compile and settings.what != "train" or (
            settings.data_dir and settings.what not in ("train", "dev")):
        raise ValueError(f"got {settings.what} with --compile or --data-dir; expected them with "
                         "train, --data-dir with dev too; leave them out")
    device, dtype = decide_device(settings.device, settings.dtype)
    rounds = settings.rounds or (5 if device.type != "cuda" else
                                 50 if settings.what == "attention" else 10)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)       # events and graphs belong to the current GPU
    else:
        # Several threads wait for each other by spinning: CPU time that is nobody's work.
        torch.set_num_threads(1)
    machine = (torch.cuda.get_device_name() if device.type == "cuda"
               else platform.processor() or platform.machine())
    about = {"measure": settings.what, "machine": machine, "torch": torch.__version__,
             "dtype": name_of_dtype(dtype), "rounds": rounds, "threads": torch.get_num_threads(),
             "date": datetime.date.today().isoformat()}
    print(" ".join(f"{key} {value}" for key, value in about.items()))
    lines = []
    for row in measures[settings.what](device, dtype, rounds):
        lines.append(json.dumps(about | row) + "\n")
        if settings.out:
            with whole_file(Path(settings.out), "w") as file:
                file.writelines(lines)


if __name__ == "__main__":
    run(main)
