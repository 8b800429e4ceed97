"""A step of prefix-tuning beside peft and transformers: speed, memory, distance from the limit.

All forms have the same frozen random weights, start from the same prefix of 10, learn its keys and
values directly (no MLP: peft would evaluate its own once for each row) and end a step alike, by
clipping and AdamW. They take turns, on the same batches where nothing else is said. A rate counts
the real tokens of all pairs, each with its own source: neither padding nor what is read once for
several pairs changes what has been done. Memory is that of `added`, the limit that of
`multiplications`; loss and gradient are compared with ours in fp32. Letters as in model.py.
"""
import copy
import os
import statistics
import time
import typing
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from data.batches import count_labels
from fast import packed, tries
from fast.cuda_graph import replay_of
from fast.forms import set_attention, training_forms
from prefix import Prefix, target_loss
from pretrained.architectures import architecture
from scripts.bench_data import TABLES, P, drawn_pairs, kinds_of_batches, make_case, some_pairs
from scripts.peft_model import peft_model, random_model

TOY = dict(vocab_size=1280, n_positions=192, n_embd=128, n_layer=4, n_head=4)   # tiny-gpt2's shape
SIZES = {"gpt2": {"cpu": {}, "cuda": dict(n_embd=1024, n_layer=24, n_head=16)},     # small, medium
         "llama": {"cpu": {}, "cuda": {}},                                      # SmolLM2's shape
         "toy": {"cpu": TOY, "cuda": TOY}}
CASES = {  # pairs in a batch, batches that are timed, lengths; None: E2E's own, if there
    "cpu": {"8 pairs": (8, 4, None), "40 pairs": (40, 1, None)},
    "cuda": {"32 x 96 tokens": (32, 1, ((56, 0), (40, 0))), "10 pairs": (10, 2, None),
             "5 pairs": (5, 2, None)},                          # the paper's batches: 10 and 5
}
CASES_OF_LLAMA = {"12 pairs": (12, 3, None, 3)}                 # as SmolLM2 learns E2E
LIMIT = "multiplications alone"
PLAIN = dict(fast=False, attention="explicit", compile=False, gradient_checkpointing=False,
             share_source=0)    # flags of train.py


# ---- who learns

class Form(typing.NamedTuple):
    """One way to do a step."""
    name: str
    loss: typing.Callable       # Case -> -log p of a target token, the mean over the batch
    learns: torch.Tensor        # (P, 2LHD), the only thing that learns
    kind: str = "alike"         # the batches it learns from, see `kinds_of_batches`


def same_weights(model):
    """The model once more with the very same weights, to be changed otherwise."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def ours(name, model, start, loss=target_loss, kind="alike"):
    """As train.py does it: fp32 keys and values, cast to the frozen model's dtype."""
    learner = copy.deepcopy(start)

    def mean(case):
        prefix = learner().to(model.dtype)                              # (L, 2, 1, H, P, D)
        batch = case.tries if kind == "tables" else case.plain
        return loss(model, prefix, batch) / case.n_labels
    return Form(name, mean, learner.table, kind)


def with_flags(name, frozen, start, size, **flags):
    """The same, with flags of train.py."""
    model, settings = same_weights(frozen), SimpleNamespace(**PLAIN | flags, batch_size=size)
    set_attention(settings.attention, model)
    loss, *_ = training_forms(settings, model, [], size)
    return ours(name, model, start, loss, "tables" if "share_source" in flags else "alike")


def theirs(name, model, start, attention, autocast=False):
    """peft's: it wants the labels, and returns the mean over their tokens."""
    peft = peft_model(model, start.fold(), attention)
    learns = peft.prompt_encoder.default.embedding.weight.requires_grad_()

    def mean(case):
        with torch.autocast(case.ids.device.type, torch.bfloat16, enabled=autocast):
            return peft(input_ids=case.ids, attention_mask=case.mask, labels=case.labels).loss
    return Form(name, mean, learns)


def packed_model(frozen):
    """The very same weights, packed; as they are where that cannot be."""
    model = same_weights(frozen)
    if not packed.why_not_packable(model):
        packed.pack(model, learning=True)
    return model


def all_forms(model, frozen, start, size, compiled):
    """The Forms for a dtype of the frozen weights. Another one is another line here.

    model: in fp32; frozen: the same in that dtype. start: the prefix that all begin with. size:
    pairs in a batch. compiled: with a compiled form.
    """
    asked = {"ours": {}, "ours, fast": dict(fast=True),
             "ours, fast, shared": dict(fast=True, share_source=8),
             "ours, fast, checkpointed": dict(fast=True, gradient_checkpointing=True),
             "ours, fast, sdpa": dict(fast=True, attention="sdpa")}
    if compiled:
        asked["ours, compiled"] = dict(compile=True)
    if frozen.device.type == "cuda":
        asked["ours, fast, fused"] = dict(fast=True, attention="fused")
    found = [with_flags(name, frozen, start, size, **flags) for name, flags in asked.items()]
    if not packed.why_not_packable(frozen):
        found.append(ours("ours, packed", packed_model(frozen), start))
    found += [theirs(f"peft, {name}", frozen, start, name) for name in ("sdpa", "eager")]
    usual, best = found[-2:]
    if frozen is not model:                     # fp32 weights that are cast where they are used
        usual = theirs("peft, autocast", model, start, "sdpa", autocast=True)
        found.append(usual)
    return found + [form._replace(name=f"{form.name}, random", kind="random")
                    for form in (usual, best)]


def step_of(form):
    """A function of a batch that does one whole step."""
    # A rate of 0 takes the same time, and all cases begin with the same prefix.
    optimizer = torch.optim.AdamW([form.learns], lr=0.0)

    def step(case):
        form.loss(case).backward()
        torch.nn.utils.clip_grad_norm_([form.learns], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


# ---- what is measured

def differences(forms, reference, batches):
    """{name: (of the loss, of the gradient)}, how far a form is from `reference` on the first of
    its batches, as parts of what the reference has.
    """
    found, right = {}, {}

    def both(form, case):
        loss = form.loss(case)
        return loss.item(), torch.autograd.grad(loss, form.learns)[0]           # (P, 2LHD)
    for form in forms:
        case = batches[form.kind][0]
        if form.kind not in right:
            right[form.kind] = both(reference, case)
        (loss, gradient), (true_loss, true_gradient) = both(form, case), right[form.kind]
        found[form.name] = (abs(loss - true_loss) / true_loss,
                            ((gradient - true_gradient).norm() / true_gradient.norm()).item())
    return found


def added(once, device):
    """Bytes that a step, `once`, needs at its peak, beyond what was there before.

    Tensors are counted, also those inside of operations, as PyTorch's allocator hands them out: on
    a CPU by the profiler's record, on a GPU by the allocator's own. What a library takes for itself
    is not counted, nor what lies unused between two tensors.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()      # each form takes its own: recording clears them
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):      # a compiled step is recorded in the second, and gets its memory
            once()              # then: replaying it is handed none
        return torch.cuda.max_memory_allocated() - before
    once()                                              # what is there from then on is no step's
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")      # the profiler else writes that it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        once()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()               # below 0 where a tensor goes
            most = max(most, now)
    return most


def weights_of(model):
    """[(layer, in, out, whether the gradient goes back through it)] of all the model's blocks.

    Nothing that learns stands in front of the first queries, keys and values: these have no
    backward pass.
    """
    first = set(model.blocks()[0].modules())
    return [(layer, layer.in_features, layer.out_features, not (layer in first and name.endswith(
        ("c_attn", "q_proj", "k_proj", "v_proj"))))
        for name, layer in model.named_modules() if name and hasattr(layer, "in_features")
        and "lm_head" not in name]


def scoring(model, n_read, n_labels):
    """Floating point operations that the loss of some tokens cannot do without.

    `n_read` tokens times a weight (in, out) are 2 * n_read * in * out operations. Only `n_labels`
    need the head. Attention's scores, about 1 % at these lengths, are left out.
    """
    blocks = sum(inside * outside for _, inside, outside, _ in weights_of(model))
    return 2 * blocks * n_read + 2 * model.width * model.config.vocab_size * n_labels


def useful(model, n_read, n_labels):
    """The same for a step: the backward pass needs as many again for the gradient of activations.

    Frozen weights need no gradient.
    """
    first = sum(inside * outside for _, inside, outside, back in weights_of(model) if not back)
    return 2 * scoring(model, n_read, n_labels) - 2 * first * n_read


def multiplications(model):
    """A function of a Case that does what `useful` counts, by the model's own weights, and nothing
    else: what is left when attention, layer norms, GELU, softmax, memory and Python cost nothing.
    """
    C, like, layers = model.width, model.word_embedding.weight, weights_of(model)

    @cache                                      # buffers that are there already: no page is new
    def rows(number, width, use):
        return torch.randn(number, width, device=like.device).to(like)

    def both_ways(N, layer, inside, outside, backward=True):
        if isinstance(layer, packed.Packed):
            packed.multiply(rows(N, inside, "in"), layer.weight, None)          # (N, out)
            if backward:
                packed.multiply(rows(N, outside, "in"), layer.transposed, None)     # (N, in)
            return
        torch.mm(rows(N, inside, "in"), layer.weight.T, out=rows(N, outside, "out"))
        if backward:
            torch.mm(rows(N, outside, "in"), layer.weight, out=rows(N, inside, "out"))

    def once(case):
        for layer in layers:
            both_ways(case.n_read, *layer)
        # The head: the word embedding again, or where it is packed, what stands behind the method.
        head = getattr(model.head, "__self__", None)
        both_ways(case.n_labels, model.word_embedding if head is model else head, C, like.size(0))
    return once


def replayed(step, cases, device):
    """`step` for these cases; on a GPU each recorded once, so that no launch costs anything."""
    if device.type != "cuda":
        return step
    replays = {id(case): replay_of(partial(step, case), device) for case in cases}
    # A recording knows addresses only: what lies there has to live as long, and `step` holds it.
    return lambda case, kept=step: replays[id(case)]()


def seconds(once, device, times=1):
    """How long `once` takes, the mean of `times` in a row; on a CPU only this process's own time:
    what else the machine does is not our speed.
    """
    if device.type != "cuda":
        start = time.process_time()
        for _ in range(times):
            once()
        return (time.process_time() - start) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / times


def copied(device, size=2 ** 28):
    """Bytes a second that a copy reads and writes, the median of 5."""
    x, y = torch.zeros(2, size, dtype=torch.uint8, device=device)
    return 2 * size / statistics.median(seconds(lambda: y.copy_(x), device) for _ in range(5))


def in_turns(steps, device, rounds, times=1):
    """{name: seconds of all its cases}, each case by its median; steps: {name: (step, cases)}.
    times: how often a step is taken for one measurement.
    """
    measured = {(name, i): [] for name, (_, cases) in steps.items() for i in range(len(cases))}
    warm = 2 if device.type == "cuda" else 1    # turns; a compiled step is recorded in the second
    for _ in range(warm + rounds):
        for name, (step, cases) in steps.items():       # in turns: what disturbs one disturbs all
            for i, case in enumerate(cases):
                measured[name, i].append(seconds(partial(step, case), device, times))
    return {name: sum(statistics.median(measured[name, i][warm:]) for i in range(len(cases)))
            for name, (_, cases) in steps.items()}


# ---- the tables

def over_best_peft(rows):
    """The rows, with how many times as fast as the fastest of peft's each is."""
    best = max(row["tokens/s"] for row in rows if row["form"].startswith("peft"))
    return [row | {"over best peft": row["tokens/s"] / best} for row in rows]


def one_case(title, forms, models, batches, device, rounds):
    """Rows of figures, one for each form at one size of batch, and one for the limit.

    models: whose multiplications are the limit; the faster ones count.
    """
    steps = {form.name: (step_of(form), batches[form.kind]) for form in forms}
    bytes_of = {name: added(partial(step, max(own, key=lambda case: case.ids.numel())), device)
                for name, (step, own) in steps.items()}     # first: see `added`
    limits = {f"{LIMIT} {n}": (replayed(multiplications(model), batches["alike"], device),
                               batches["alike"]) for n, model in enumerate(models)}
    taken = in_turns(steps | limits, device, rounds)
    rows, model = [], models[0]
    operations = sum(useful(model, case.n_read, case.n_labels) for case in batches["alike"])
    limit = operations / min(taken[name] for name in limits)                    # in a second
    for form in forms:
        own = batches[form.kind]
        operations = sum(useful(model, case.n_nodes, case.n_learned) if form.kind == "tables" else
                         useful(model, case.n_read, case.n_labels) for case in own)
        rows.append({"what": title, "form": form.name,
                     "tokens/s": sum(case.n_tokens for case in own) / taken[form.name],
                     "of the limit": operations / taken[form.name] / limit,
                     "MB": bytes_of[form.name] / 1e6})
    return over_best_peft(rows) + [{"what": title, "form": LIMIT, "GFLOP/s": limit / 1e9}]


def size_of(name, device):
    """The architecture and the config that are measured on this device, by the name in SIZES."""
    kind = "gpt2" if name == "toy" else name
    return kind, architecture(kind).config(**SIZES[name][device.type])


def train(device, dtype, rounds, name, data_dir, compiled=False):
    """Print a table of real tokens a second; yield one row of figures for each form and case."""
    size = size_of(name, device)
    cases = CASES_OF_LLAMA if name == "llama" else CASES[device.type]
    texts = "E2E" if data_dir else "drawn, of lengths like those of E2E"
    model = random_model(size, device, torch.float32)
    frozen = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    start = Prefix.for_model(model, P, mid_dim=0)
    reference = ours("ours in fp32", model, start)
    copy_rate = copied(device) / 1e9
    yield {"what": "copy", "GB/s": copy_rate, "texts": texts}
    print(f"texts: {texts}; a copy reads and writes {copy_rate:.1f} GB/s\n"
          f"{'':16}{'form':26}{'tokens/s':>10}{'/ best peft':>13}{'of limit':>10}{'MB':>9}"
          f"{'loss off':>10}{'gradient':>10}")
    for title, (n_pairs, count, lengths, *share) in cases.items():
        vocab_size = model.config.vocab_size
        pairs = (drawn_pairs(lengths, vocab_size, TABLES["train"]) if lengths else
                 some_pairs("train", vocab_size, data_dir))
        batches = kinds_of_batches(pairs, n_pairs, count, frozen, *share)
        forms = all_forms(model, frozen, start, n_pairs, compiled)
        off = differences(forms, reference, batches)
        models = frozen, packed_model(frozen)
        for row in one_case(title, forms, models, batches, device, rounds):
            print(f"{title if row['form'] == 'ours' else '':16}{row['form']:26}", end="")
            if row["form"] == LIMIT:
                print(f"{row['GFLOP/s']:>10.0f} GFLOP/s", flush=True)
            else:
                row["loss off"], row["gradient off"] = off[row["form"]]
                print(f"{row['tokens/s']:>10.0f}{row['over best peft']:>13.2f}"
                      f"{row['of the limit']:>10.0%}{row['MB']:>9.0f}{row['loss off']:>10.0e}"
                      f"{row['gradient off']:>10.0e}", flush=True)
            yield row


def layers(device, dtype, rounds, name, data_dir):
    """Print what a step takes with a prefix in the upper layers only, beside one in all; yield a
    row of figures for each number of layers. The step is the same for every model: 12 pairs, up to
    3 of a source together as in real_data.py, --fast, and no MLP.
    """
    model = random_model(size_of(name, device), device, dtype)
    total = len(model.blocks())
    pairs = some_pairs("train", model.config.vocab_size, data_dir)
    cases = kinds_of_batches(pairs, 12, 3, model, 3)["tables"]
    steps = {}
    for n in sorted({max(1, round(total * part / 6)) for part in (1, 2, 3, 4, 6)}, reverse=True):
        start = Prefix.for_model(model, P, mid_dim=0, n_layers=n)
        steps[n] = step_of(with_flags(str(n), model, start, 12, fast=True, share_source=3)), cases
    most = max(cases, key=lambda case: case.ids.numel())
    bytes_of = {n: added(partial(step, most), device) for n, (step, _) in steps.items()}
    taken = in_turns(steps, device, rounds)
    print(f"{'upper layers':>12}{'s/step':>10}{'/ all':>8}{'MB':>9}{'/ all':>8}")
    for n in steps:
        row = {"what": "12 pairs", "layers": n, "of": total, "s/step": taken[n] / len(cases),
               "MB": bytes_of[n] / 1e6, "s/step over all": taken[n] / taken[total],
               "MB over all": bytes_of[n] / bytes_of[total],
               "texts": "E2E" if data_dir else "drawn"}
        print(f"{n:>12}{row['s/step']:>10.3f}{row['s/step over all']:>8.2f}{row['MB']:>9.0f}"
              f"{row['MB over all']:>8.2f}", flush=True)
        yield row


def dev(device, dtype, rounds, name, data_dir):
    """Print how fast a dev set is evaluated: as train.py does it, without a flag and with --fast,
    and by peft, whose batches hold the pairs in their order. Yield the rows of figures.
    """
    most = 16                                   # as many pairs as train.py evaluates at once
    frozen = random_model(size_of(name, device), device, dtype)
    start = Prefix.for_model(frozen, P, mid_dim=0)
    pairs = some_pairs("dev", frozen.config.vocab_size, data_dir)
    prefix, n_labels = start.fold().to(dtype), count_labels(pairs)

    def with_forms(fast):
        model = same_weights(frozen)
        flags = SimpleNamespace(**PLAIN | {"fast": fast})
        loss, _, batches = training_forms(flags, model, pairs, most)
        return torch.no_grad()(lambda batch: loss(model, prefix, batch)), [
            batch.to(device) for batch in batches]
    steps = {"ours": with_forms(False), "ours, fast": with_forms(True)}
    cases = [make_case(pairs[i:i + most], frozen) for i in range(0, len(pairs), most)]
    for name in ("sdpa", "eager"):
        form = theirs(f"peft, {name}", frozen, start, name)
        steps[form.name] = torch.no_grad()(
            lambda case, loss=form.loss: loss(case) * case.n_labels), cases
    # The multiplications that each form of ours cannot do without.
    groups = {"ours": tries.by_source(pairs, 1), "ours, fast": tries.by_source(pairs, most)}
    counts = {name: [sum(map(len, parts)) for parts in zip(*map(tries.trie, rows))]
              for name, rows in groups.items()}
    least = {name: scoring(frozen, *count) for name, count in counts.items()}
    losses = {name: sum(step(case).item() for case in own) / n_labels
              for name, (step, own) in steps.items()}
    taken, n_tokens = in_turns(steps, device, rounds), sum(len(pair.ids) for pair in pairs)
    print(f"{'':24}{'form':>14}{'tokens/s':>10}{'/ best peft':>13}{'by multiplications':>20}"
          f"{'loss':>11}")
    for row in over_best_peft([{"what": f"{TABLES['dev']} tables, {len(pairs)} pairs",
                                "form": name, "tokens/s": n_tokens / taken[name]}
                               for name in steps]):
        form = row["form"]
        bound = least["ours"] / least[form] if form in least else None
        print(f"{row['what'] if form == 'ours' else '':24}{form:>14}{row['tokens/s']:>10.0f}"
              f"{row['over best peft']:>13.2f}{'-' if bound is None else f'{bound:.2f}':>20}"
              f"{losses[form]:>11.6f}", flush=True)
        yield row | {"by multiplications": bound, "loss": losses[form],
                     "texts": "E2E" if data_dir else "drawn"}
