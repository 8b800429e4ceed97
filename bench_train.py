"""A step of prefix-tuning beside peft and transformers: speed, memory, distance from the limit.

All forms have the same frozen random weights, start from the same prefix of 10, learn its keys and
values directly (no MLP: peft would evaluate its own once for each row) and end a step alike, by
clipping and AdamW. They take turns, on the same batches where nothing else is said. A rate counts
the real tokens of all pairs, each with its own source: neither padding nor what is read once for
several pairs changes what has been done. Memory is that of `added`, the limit that of
`multiplications`; loss and gradient are compared with ours in fp32.
Called by bench.py. Not here: the loss (loss.py), peft's model (rivals.py). Letters as in model.py.
"""
import copy
import os
import random
import statistics
import time
import typing
from functools import cache, partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import packed
from batches import Batch as OurBatch
from batches import batch_of, batches_of_epoch, by_source, padded, tokens_of, trie
from data import sequence, tasks
from data.tokenizer import base_tokenizer
from loss import dev_loss, target_nats
from model import GPT2Config, attend
from prefix import Prefix
from rivals import peft_model, random_model
from step import Compiled, checkpoint_blocks

P = 10
SIZES = {"cpu": GPT2Config(), "cuda": GPT2Config(n_embd=1024, n_layer=24, n_head=16)}  # medium
LIKE_E2E = ((35, 10), (25, 8))      # tokens of a source and of a target, mean and deviation
CASES = {  # pairs in a batch, batches that are timed, lengths; None: E2E's own, if there
    "cpu": {"8 pairs": (8, 4, None), "40 pairs": (40, 1, None)},
    "cuda": {"32 x 96 tokens": (32, 1, ((56, 0), (40, 0))), "10 pairs": (10, 2, None),
             "5 pairs": (5, 2, None)},                          # the paper's batches: 10 and 5
}
TABLES = {"train": 300, "dev": 15}  # sources that are used, with all their references
LIMIT = "multiplications alone"


# ---- what there is to learn from

def drawn_pairs(lengths, vocab_size, tables, references=8):
    """Pairs of random words, `references` for each source: E2E has about 8 for a table."""
    rng = random.Random(0)

    def words(mean, deviation):
        number = max(3, round(rng.gauss(mean, deviation)))
        return [rng.randrange(1, vocab_size) for _ in range(number)]
    pairs = []
    for _ in range(tables):
        source = words(*lengths[0])
        pairs += [sequence.Pair(source + words(*lengths[1]), len(source))
                  for _ in range(references)]
    return pairs


def some_pairs(split, config, data_dir):
    """The pairs of some tables: E2E's own, as train.py reads them, or of such lengths."""
    if not data_dir:
        return drawn_pairs(LIKE_E2E, config.vocab_size, TABLES[split])
    examples = random.Random(0).sample(tasks.load("e2e", split, data_dir), TABLES[split])
    tokenizer = base_tokenizer(Path(__file__).parent)           # no file of its own: GPT-2's
    return sequence.encode_pairs(examples, tokenizer, config.n_positions - P)[0]


class Batch(typing.NamedTuple):
    """What all forms learn from, made before the clock starts."""
    plain: OurBatch             # as train.py has it
    tries: OurBatch             # the same pairs, as for --share-source
    ids: torch.Tensor           # (B, T), padded behind, as peft wants it
    real: torch.Tensor          # (B, T), 1 at a token and 0 at padding: peft wants to be told
    labels: torch.Tensor        # (B, T), the tokens again, -100 where there is no loss: peft's way
    tokens: int                 # real tokens of all pairs
    read: int                   # of these, all but the last of each pair, which nothing follows
    targets: int                # tokens that the loss is taken on
    once: int                   # of those read, with what several pairs begin with counted once
    said: int                   # of the targets, with what several learn at one place counted once


def make_batch(pairs, model):
    ids, real = padded([pair.ids for pair in pairs])                       # (B, T) each
    start = torch.tensor([[pair.start] for pair in pairs])                      # (B, 1)
    labels = ids.masked_fill(~real | (torch.arange(ids.size(1)) < start), -100)             # (B, T)
    ids, real, labels = (x.to(model.wte.weight.device) for x in (ids, real.long(), labels))
    tokens, (nodes, learned) = sum(len(pair.ids) for pair in pairs), trie(pairs)
    return Batch(batch_of(model, pairs), batch_of(model, pairs, share=True), ids, real, labels,
                 tokens, tokens - len(pairs), tokens_of(pairs), len(nodes), len(learned))


def spread(batches, count):
    """`count` of the batches, from short to long, evenly: together they are like all of them."""
    batches = sorted(batches, key=lambda batch: sum(len(pair.ids) for pair in batch))
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]


def kinds_of_batches(pairs, size, count, model):
    """{kind: Batches}. alike: pairs of similar lengths, as train.py has them. random: drawn from
    all, as loops mostly have them. tables: those of a source together, as for --share-source.
    """
    rng = random.Random(0)
    alike, tables = ([[pairs[i] for i in batch] for batch in batches_of_epoch(
        pairs, size, 0, 0, share)] for share in (False, True))
    found = {"alike": alike, "random": [rng.sample(pairs, size) for _ in alike], "tables": tables}
    return {kind: [make_batch(batch, model) for batch in
                   spread([batch for batch in batches if len(batch) == size], count)]
            for kind, batches in found.items()}


# ---- who learns

class Form(typing.NamedTuple):
    """One way to do a step."""
    name: str
    loss: typing.Callable       # Batch -> -log p of a target token, the mean over the batch
    learns: torch.Tensor        # (P, 2LC), the only thing that learns
    kind: str = "alike"         # the batches it learns from, see `kinds_of_batches`


def ours(name, model, start, attend=attend, nats=target_nats, share=False):
    """As train.py does it: fp32 keys and values, cast to the frozen model's dtype."""
    learner = copy.deepcopy(start)

    def mean(batch):
        prefix = learner().to(model.wte.weight.dtype)                   # (L, 2, 1, H, P, D)
        return nats(model, prefix, batch.tries if share else batch.plain, attend) / batch.targets
    return Form(name, mean, learner.table, "tables" if share else "alike")


def theirs(name, model, start, attention, autocast=False):
    """peft's: it wants the labels, and tells the mean over their tokens."""
    rival = peft_model(model, start.fold(), attention)
    learns = rival.prompt_encoder.default.embedding.weight.requires_grad_()

    def mean(batch):
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=autocast):
            return rival(input_ids=batch.ids, attention_mask=batch.real, labels=batch.labels).loss
    return Form(name, mean, learns)


def laid_out(frozen):
    """The very same weights as train.py lays them out here: on a CPU packed."""
    model = copy.deepcopy(frozen, {id(weight): weight for weight in frozen.parameters()})
    if not packed.possible(model):
        packed.pack(model, learning=True)
    return model


def all_forms(model, frozen, fast, start, size, compiled):
    """The Forms for a dtype of the frozen weights. Another one is another line here.

    model: in fp32; frozen: the same in that dtype; fast: that one as `laid_out`. start: the prefix
    that all begin with. size: pairs in a batch. compiled: with a compiled form.
    """
    device, small = frozen.wte.weight.device, laid_out(frozen)
    checkpoint_blocks(small)
    found = [ours("ours", fast, start), ours("ours, source shared", fast, start, share=True),
             ours("ours, checkpointed", small, start)]
    if not packed.possible(frozen):
        found.append(ours("ours, not packed", frozen, start))
    if compiled:
        found.append(ours("ours, compiled", frozen, start, nats=Compiled(size, device)))
    if device.type == "cuda":
        import fused                            # needs triton
        found.append(ours("ours, fused attention", frozen, start, fused.attend))
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

    def step(batch):
        form.loss(batch).backward()
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

    def told(form, batch):
        loss = form.loss(batch)
        return loss.item(), torch.autograd.grad(loss, form.learns)[0]           # (P, 2LC)
    for form in forms:
        batch = batches[form.kind][0]
        if form.kind not in right:
            right[form.kind] = told(reference, batch)
        (loss, gradient), (true_loss, true_gradient) = told(form, batch), right[form.kind]
        found[form.name] = (abs(loss - true_loss) / true_loss,
                            ((gradient - true_gradient).norm() / true_gradient.norm()).item())
    return found


def added(once, device):
    """Bytes that a step, `once`, needs at its fullest moment, beyond what was there before.

    They are those of tensors, inside of operations too, as PyTorch's allocator hands them out: on a
    CPU its profiler has kept a list, on a GPU the allocator itself. What a library takes for itself
    is not among them, nor what lies unused between two tensors.
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")      # the profiler else tells when it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        once()
    now = most = 0
    for event in sorted(told.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()               # below 0 where a tensor goes
            most = max(most, now)
    return most


def scoring(config, read, targets):
    """Floating point operations that the loss of some tokens cannot do without.

    `read` tokens times a weight (in, out) are 2 * read * in * out operations. Only `targets` tokens
    need the head. Attention's scores, about 1 % at these lengths, are left out.
    """
    C = config.n_embd
    blocks = config.n_layer * 12 * C * C        # c_attn 3 C * C, c_proj 1, c_fc 4, c_proj 4
    return 2 * blocks * read + 2 * C * config.vocab_size * targets


def useful(config, read, targets):
    """The same of a step: on the way back the gradient for these tokens takes as many.

    Weights that do not learn want no gradient. Nothing that learns stands in front of the first
    c_attn: it has no way back.
    """
    return 2 * scoring(config, read, targets) - 2 * 3 * config.n_embd ** 2 * read


def multiplications(model):
    """A function of a batch that does what `useful` counts, by the model's own weights, and nothing
    else: what is left when attention, layer norms, GELU, softmax, memory and Python cost nothing.
    """
    C, like = model.config.n_embd, model.wte.weight
    layers = [layer for block in model.h for layer in (
        (block.attn.c_attn, C, 3 * C), (block.attn.c_proj, C, C),
        (block.mlp.c_fc, C, 4 * C), (block.mlp.c_proj, 4 * C, C))]

    @cache                                      # buffers that are there already: no page is new
    def rows(number, width, use):
        return torch.randn(number, width, device=like.device).to(like)

    def there_and_back(N, layer, inside, outside, back=True):
        if isinstance(layer, packed.Packed):
            packed.multiply(rows(N, inside, "in"), layer.weight, None)          # (N, out)
            if back:
                packed.multiply(rows(N, outside, "in"), layer.back, None)       # (N, in)
            return
        torch.mm(rows(N, inside, "in"), layer.weight.T, out=rows(N, outside, "out"))
        if back:
            torch.mm(rows(N, outside, "in"), layer.weight, out=rows(N, inside, "out"))

    def once(batch):
        for number, layer in enumerate(layers):
            there_and_back(batch.read, *layer, back=number > 0)
        # The head: the word embedding again, or where it is packed, what stands behind the method.
        head = getattr(model.head, "__self__", None)
        there_and_back(batch.targets, model.wte if head is model else head, C, like.size(0))
    return once


def replayed(step, batches, device):
    """`step` for these batches; on a GPU each recorded once, so that no launch costs anything."""
    if device.type != "cuda":
        return step
    from graphs import replay_of
    replays = {id(batch): replay_of(partial(step, batch), device) for batch in batches}
    # A recording knows addresses only: what lies there has to live as long, and `step` holds it.
    return lambda batch, kept=step: replays[id(batch)]()


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


def in_turns(steps, device, rounds):
    """{name: seconds of all its batches}, each batch by its median; steps: {name: (step, batches)}.
    """
    times = {(name, i): [] for name, (_, batches) in steps.items() for i in range(len(batches))}
    warm = 2 if device.type == "cuda" else 1    # turns; a compiled step is recorded in the second
    for turn in range(warm + rounds):
        for name, (step, batches) in steps.items():     # in turns: what disturbs one disturbs all
            for i, batch in enumerate(batches):
                times[name, i].append(seconds(lambda: step(batch), device))
    return {name: sum(statistics.median(times[name, i][warm:]) for i in range(len(batches)))
            for name, (_, batches) in steps.items()}


# ---- the tables

def one_case(title, forms, models, batches, device, rounds):
    """Rows of figures, one for each form at one size of batch, and one for the limit.

    models: whose multiplications are the limit; the faster ones count.
    """
    steps = {form.name: (step_of(form), batches[form.kind]) for form in forms}
    bytes_of = {name: added(partial(step, max(own, key=lambda batch: batch.ids.numel())), device)
                for name, (step, own) in steps.items()}     # first: see `added`
    limits = {f"{LIMIT} {n}": (replayed(multiplications(model), batches["alike"], device),
                               batches["alike"]) for n, model in enumerate(models)}
    taken = in_turns(steps | limits, device, rounds)
    rows, config = [], models[0].config
    operations = sum(useful(config, batch.read, batch.targets) for batch in batches["alike"])
    limit = operations / min(taken[name] for name in limits)                    # in a second
    for form in forms:
        own = batches[form.kind]
        operations = sum(useful(config, batch.once, batch.said) if form.kind == "tables" else
                         useful(config, batch.read, batch.targets) for batch in own)
        rows.append({"what": title, "form": form.name,
                     "tokens/s": sum(batch.tokens for batch in own) / taken[form.name],
                     "of the limit": operations / taken[form.name] / limit,
                     "MB": bytes_of[form.name] / 1e6})
    best = max(row["tokens/s"] for row in rows if row["form"].startswith("peft"))
    return [row | {"over best peft": row["tokens/s"] / best} for row in rows] + [
        {"what": title, "form": LIMIT, "GFLOP/s": limit / 1e9}]


def train(device, dtype, rounds, data_dir, compiled=False):
    """Print a table of real tokens a second; yield one row of figures for each form and case."""
    size, cases = SIZES[device.type], CASES[device.type]
    texts = "E2E" if data_dir else "drawn, of lengths like those of E2E"
    model = random_model(size, device, torch.float32)
    frozen = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    fast, start = laid_out(frozen), Prefix(size, P, mid_dim=0).to(device)
    reference = ours("ours in fp32", model, start)
    copy_rate = copied(device) / 1e9
    yield {"what": "copy", "GB/s": copy_rate, "texts": texts}
    print(f"texts: {texts}; a copy reads and writes {copy_rate:.1f} GB/s\n"
          f"{'':16}{'form':24}{'tokens/s':>10}{'/ best peft':>13}{'of limit':>10}{'MB':>9}"
          f"{'loss off':>10}{'gradient':>10}")
    for title, (pairs, count, lengths) in cases.items():
        found = (drawn_pairs(lengths, size.vocab_size, TABLES["train"]) if lengths else
                 some_pairs("train", size, data_dir))
        batches = kinds_of_batches(found, pairs, count, frozen)
        forms = all_forms(model, frozen, fast, start, pairs, compiled)
        off = differences(forms, reference, batches)
        for row in one_case(title, forms, (frozen, fast), batches, device, rounds):
            print(f"{title if row['form'] == 'ours' else '':16}{row['form']:24}", end="")
            if row["form"] == LIMIT:
                print(f"{row['GFLOP/s']:>10.0f} GFLOP/s", flush=True)
            else:
                row["loss off"], row["gradient off"] = off[row["form"]]
                print(f"{row['tokens/s']:>10.0f}{row['over best peft']:>13.2f}"
                      f"{row['of the limit']:>10.0%}{row['MB']:>9.0f}{row['loss off']:>10.0e}"
                      f"{row['gradient off']:>10.0e}", flush=True)
            yield row


def dev(device, dtype, rounds, data_dir):
    """Print how fast a dev set is scored: by loss.dev_loss, as tries and pair by pair, and by peft,
    whose batches hold the pairs in their order. Yield the rows of figures.
    """
    size, most = SIZES[device.type], 16         # as many pairs as train.py scores at once
    frozen, start = random_model(size, device, dtype), Prefix(size, P, mid_dim=0).to(device)
    pairs, score = some_pairs("dev", size, data_dir), partial(dev_loss, laid_out(frozen), start)
    batches = [make_batch(pairs[i:i + most], frozen) for i in range(0, len(pairs), most)]

    @torch.no_grad()
    def score_by(form, pairs):
        return sum(form.loss(b).item() * b.targets for b in batches) / tokens_of(pairs)
    # To dev_loss any function but its own `attend` is one that knows no tries: partial makes one.
    steps = {"ours": partial(score, batch_size=most),
             "ours, pair by pair": partial(score, batch_size=most, attend=partial(attend))}
    steps |= {f"peft, {name}": partial(score_by, theirs(name, frozen, start, name))
              for name in ("sdpa", "eager")}
    # The multiplications that each form of ours cannot do without.
    groups = {"ours": by_source(pairs, most), "ours, pair by pair": by_source(pairs, 1)}
    counts = {name: [sum(map(len, parts)) for parts in zip(*map(trie, rows))]
              for name, rows in groups.items()}
    needed = {name: scoring(size, read, targets) for name, (read, targets) in counts.items()}
    losses = {name: step(pairs) for name, step in steps.items()}
    taken = in_turns({name: (step, [pairs]) for name, step in steps.items()}, device, rounds)
    rate = {name: sum(len(pair.ids) for pair in pairs) / taken[name] for name in steps}
    print(f"{'':24}{'form':>20}{'tokens/s':>10}{'ours / it':>11}{'by multiplications':>20}"
          f"{'loss':>11}")
    for name in steps:
        bound = needed[name] / needed["ours"] if name in needed else None
        row = {"what": f"{TABLES['dev']} tables, {len(pairs)} pairs", "form": name,
               "tokens/s": rate[name], "ours over it": rate["ours"] / rate[name],
               "by multiplications": bound, "loss": losses[name],
               "texts": "E2E" if data_dir else "drawn"}
        print(f"{row['what'] if name == 'ours' else '':24}{name:>20}{rate[name]:>10.0f}"
              f"{row['ours over it']:>11.2f}{'-' if bound is None else f'{bound:.2f}':>20}"
              f"{losses[name]:>11.6f}", flush=True)
        yield row
