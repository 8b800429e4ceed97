"""Trains the bundled models from scratch on the text of the micro-world: `python pretrain.py`.

Stands for the pre-training that the paper takes for granted: its models are GPT-2 and BART. The
batch of step n is a function of the seed and n, so a run that was stopped goes on with --resume as
if nothing had happened. A side door: nobody imports it.
Not here: the text (data/world_text.py), what is BART's own (denoise.py) and the tasks of
prefix-tuning (data/world.py).
Letters as in model.py.
"""
import dataclasses
import itertools
import json
import math
import random
import re
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional as F

import checkpoint
import model as gpt2
from data.bpe import learn_tokens, world_texts, write_tokens
from data.tokenizer import load_tokenizer
from data.world_text import AGAIN, FIRST, document, encode, sheet_then_prose, world_thing
from plumbing import flag, parse, run, whole_file


@dataclasses.dataclass
class Settings:
    model: str = flag("tiny-gpt2", "tiny-gpt2, a language model; tiny-bart, which undoes noise",
                      choices=["tiny-gpt2", "tiny-bart"])
    tokens: int = flag(150_000_000, "how many tokens to read, packed and padded",
                       within=(1, math.inf))
    vocabulary: int = flag(1280, "tokens of a new tokenizer, <|endoftext|> included",
                           within=(257, math.inf))
    context: int = flag(192, "positions of the model, and tokens of a row of text",
                        within=(1, math.inf))
    width: int = flag(192, "C, the width of the model", within=(1, math.inf))
    layers: int = flag(4, "L, its blocks; of tiny-bart in the encoder and again in the decoder",
                       within=(1, math.inf))
    heads: int = flag(4, "H, its attention heads", within=(1, math.inf))
    rows: int = flag(16, "rows of text in a step of each process", within=(1, math.inf))
    processes: int = flag(1, "processes that share a step, each with rows of its own; on a CPU as "
                             "many as it has cores is fastest", within=(1, 64))
    lr: float = flag(2e-3, "highest learning rate of words, positions, biases and LayerNorms")
    matrix_lr: float = flag(0.02, "highest learning rate of the matrices in the blocks")
    warmup: int = flag(200, "steps in which the rates rise; then they fall in half a cosine to 0",
                       within=(0, math.inf))
    seed: int = flag(0, "of the first weights, the tokenizer and every text")
    device: str = flag("auto", "auto: cuda where there is one", choices=["auto", "cpu", "cuda"])
    dtype: str = flag("fp32", "bf16: mixed precision, the weights stay in fp32",
                      choices=["fp32", "bf16"])
    workers: int = flag(0, "processes that write text ahead of the model; 0: none",
                        within=(0, math.inf))
    probe_every: int = flag(200, "steps between two lines of the log", within=(1, math.inf))
    save_every: int = flag(1000, "steps between two savings of the state", within=(1, math.inf))
    out: str = flag("out/pretrain", "directory of the run: its state, log and tokenizer")
    weights: str = flag("", "directory for the finished model, in 16 bits; left out: weights/MODEL")
    resume: bool = flag(False, "go on with the run in --out")
    stop_at: int = flag(0, "stop after this step, to be resumed; 0: at the end",
                        within=(0, math.inf))


# ---- text: whole documents, packed into rows

def packed(documents, rows, length):
    """Documents (lists) packed into `rows` bins of at most `length`; what fits nowhere is left out.

    The longest first, each into the fullest bin that has room. So next to nothing stays empty, and
    no document is cut: prose never stands without its sheet.
    """
    bins, room = [[] for _ in range(rows)], [length] * rows
    for item in sorted(documents, key=len, reverse=True):
        fitting = [n for n in range(rows) if room[n] >= len(item)]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            bins[best].append(item)
            room[best] -= len(item)
    return bins


class Batches(torch.utils.data.Dataset):
    """The batches of `steps`: ids (B, T+1), and labels, the same but -100 where none is learned."""

    def __init__(self, tokenizer, settings, steps):
        self.tokenizer, self.settings, self.steps = tokenizer, settings, steps

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index):
        s, rng = self.settings, random.Random(f"text {self.settings.seed} {self.steps[index]}")
        length, documents, total = s.context + 1, [], 0
        while total < s.rows * length:
            documents.append(list(zip(*encode(document(rng), self.tokenizer), strict=True)))
            total += len(documents[-1])
        ids = torch.full((s.rows, length), self.tokenizer.eot_token)                # (B, T+1)
        labels = torch.full((s.rows, length), -100)                                 # (B, T+1)
        for row, items in enumerate(packed(documents, s.rows, length)):
            rng.shuffle(items)                  # else every row would begin with a long document
            pairs = [pair for item in items for pair in item]
            ids[row, :len(pairs)] = torch.tensor([token for token, _ in pairs])
            labels[row, :len(pairs)] = torch.tensor([-100 if role == FIRST else token
                                                     for token, role in pairs])
        return ids, labels


# ---- the model

def new_model(settings):
    """GPT-2's first weights, N(0, 0.02), less where 2L branches add up; but words get N(0, 0.1).

    With words further apart copying begins sooner; after 3M tokens it is no better than with 0.02
    (one run each).
    """
    s = settings
    torch.manual_seed(s.seed)
    net = gpt2.GPT2(gpt2.GPT2Config(s.vocabulary, s.context, s.width, s.layers, s.heads))
    for name, weight in net.named_parameters():
        if name.endswith("c_proj.weight"):
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * s.layers))
        elif weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.1 if name == "wte.weight" else 0.02)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    return net


def attend_without_prefix(q, k, v, pk, pv, real, causal):
    """model.attend where there is no prefix and no query without a key: the mask is added.

    On a CPU that costs less than half of PyTorch's fused attention, whose way back is slow there.
    """
    hidden = ~gpt2.may_look(real, q.size(2), causal)                    # (1 or B, 1, T, S)
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -math.inf)
    scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3)                # (B, H, T, S)
    return scores.add_(mask).softmax(-1) @ v                            # (B, H, T, D)


def loss_of(net, ids, labels, attend=attend_without_prefix):
    """(summed loss, number) of the learned tokens; no logit is computed for the others."""
    hidden = net(ids[:, :-1], attend=attend)                                        # (B, T, C)
    learned = labels[:, 1:] != -100                                                 # (B, T)
    logits = net.head(hidden[learned]).float()                                      # (N, V)
    return F.cross_entropy(logits, labels[:, 1:][learned], reduction="sum"), len(logits)


def share_gradients(net, loss, count):
    """Make every process's gradients those of the mean loss over all processes' tokens.

    loss, count: this process's own, see `loss_of`. Returns the mean loss, a tensor.
    """
    grads = [weight.grad for weight in net.parameters()]
    both = torch.stack((loss.detach(), loss.new_tensor(count)))                     # (2,)
    flat = torch.cat([*(grad.flatten() for grad in grads), both])
    if distributed.is_initialized():
        distributed.all_reduce(flat)
    flat = flat / flat[-1]
    for grad, mean in zip(grads, flat.split([*map(torch.numel, grads), 2])):
        grad.copy_(mean.view_as(grad))
    return flat[-2].clone()                             # a view would keep all of `flat` in memory


def orthogonal(matrices, dtype):
    """Matrices (N, R, C) with nearly the same directions, but all their singular values near 1.

    Five steps of a Newton-Schulz iteration; the three numbers are Jordan's (Muon, 2024). dtype: to
    compute in; bf16 is exact enough, for the lengths are only roughly 1 in any case.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Jordan's Muon: momentum with every direction made equally long. For matrices in blocks.

    It saves text: 86 % of the probe's values were copied after 3.1M tokens with it, and 16 % after
    4.2M tokens with AdamW for all weights (one run each).
    """

    def __init__(self, weights, lr, momentum=0.95, weight_decay=0.1, dtype=torch.float32):
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype                                              # see `orthogonal`

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                          # matrices of one shape go through in one product
            for weight in group["params"]:
                alike.setdefault(weight.shape, []).append(weight)
            for (R, C), weights in alike.items():
                self.step_together(weights, R, C, group)

    def step_together(self, weights, R, C, group):
        """A step of N weights (R, C)."""
        lr, keep, ahead = group["lr"], group["momentum"], []
        for weight in weights:
            mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
            mean.lerp_(weight.grad, 1 - keep)
            ahead.append(weight.grad.lerp(mean, keep))                  # Nesterov's
        # c_attn is three matrices, queries, keys and values, one above the other.
        rows = C if R == 3 * C else R
        update = orthogonal(torch.cat(ahead).unflatten(0, (-1, rows)), self.dtype)
        update = update.flatten(0, 1) * max(1, rows / C) ** 0.5         # (N * R, C)
        for weight, part in zip(weights, update.split(R), strict=True):
            weight.mul_(1 - lr * group["weight_decay"]).sub_(lr * part)


def optimizers_of(net, settings):
    """Muon for the matrices of the blocks, AdamW for words, positions, biases and LayerNorms."""
    inside = [weight for name, weight in net.named_parameters()
              if weight.dim() == 2 and re.search(r"^h\.|layers\.", name)]
    others = [weight for weight in net.parameters() if all(weight is not w for w in inside)]
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    return [Muon(inside, settings.matrix_lr, dtype=dtype),
            torch.optim.AdamW(others, settings.lr, betas=(0.9, 0.97), weight_decay=0.0)]


def schedule(step, steps, warmup):
    """The share of the learning rates: up in a line, down in half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@torch.no_grad()
def probe(net, tokenizer, count=64):
    """How well prose follows from its own sheet, in pre-training's notations, for names never read.

    prose: loss of the prose. copy: loss of the values of facts in it. copied: share of these copied
    without a fault, that is, each token the likeliest after the true ones before it. The thing's
    own name is left out: whether a sentence begins with it or with "It" is a matter of taste.
    """
    rng, prose, copy, copied = random.Random("probe"), [], [], []
    for _ in range(count):
        thing = world_thing(rng, groups=(0,))
        ids, roles = encode(sheet_then_prose(thing, rng), tokenizer)
        target = torch.tensor(ids[1:], device=net.wte.weight.device)                # (T,)
        hidden = net(torch.tensor([ids[:-1]], device=target.device))                # (1, T, C)
        logits = net.head(hidden[0]).float()                                        # (T, V)
        loss = F.cross_entropy(logits, target, reduction="none").tolist()
        hit = (logits.argmax(1) == target).tolist()
        places = range(len(roles) - roles[::-1].index(FIRST), len(roles))   # after the sheet
        prose += [loss[n - 1] for n in places]
        for role, value in itertools.groupby(places, key=roles.__getitem__):
            value = list(value)
            words = f"{{{tokenizer.decode([ids[n] for n in value]).strip()}}}"
            if role == AGAIN and words in dict(thing.facts).values():
                copy += [loss[n - 1] for n in value]
                copied.append(all(hit[n - 1] for n in value))
    return {name: round(sum(numbers) / len(numbers), 4) for name, numbers in
            (("prose", prose), ("copy", copy), ("copied", copied))}


def parts_of(model):
    """(new_model, Batches, loss_of, probe) of the model by this name."""
    if model == "tiny-gpt2":
        return new_model, Batches, loss_of, probe
    import denoise                              # BART's, another side door
    return denoise.new_model, denoise.Batches, denoise.loss_of, denoise.probe


# ---- the run: what is kept on disk

# Settings that are no part of the recipe: they may change from one part of a run to the next.
FREE = {"resume", "stop_at", "device", "workers", "save_every", "out", "weights"}


def save_state(net, optimizers, step, seconds, settings):
    with whole_file(Path(settings.out) / "resume.pt") as file:
        torch.save({"model": net.state_dict(), "step": step,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "seconds": seconds, "settings": dataclasses.asdict(settings)}, file)


def load_state(net, optimizers, settings):
    """Put back what `save_state` wrote and drop later lines of the log. Returns (step, seconds)."""
    path, log = Path(settings.out) / "resume.pt", Path(settings.out) / "log.jsonl"
    if not path.exists():
        raise ValueError(f"got --resume, expected {path} of a run that was begun; start without it")
    state = torch.load(path, map_location="cpu", weights_only=True)
    now = dataclasses.asdict(settings)
    other = [f"--{name.replace('_', '-')} {value}" for name, value in state["settings"].items()
             if name not in FREE and now[name] != value]
    if other:
        raise ValueError(f"got other settings than those of the run in {settings.out}, expected "
                         f"{' '.join(other)}; give these, or begin a new run in another --out")
    net.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    lines = log.read_text("utf-8").splitlines()
    with whole_file(log, "w") as file:
        file.writelines(f"{line}\n" for line in lines if line.endswith("}")
                        and json.loads(line).get("step", 0) <= state["step"])
    return state["step"], state["seconds"]


def write_log(settings, line):
    with open(Path(settings.out) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def begin(settings):
    """A new run: its tokenizer, unless one is there, and the first line of the log."""
    out = Path(settings.out)
    if (out / "resume.pt").exists():
        raise ValueError(f"got --out {out}, which holds a run; expected a new directory; choose "
                         "another, or go on with --resume")
    if not (out / "tokenizer.tiktoken").exists():
        texts = world_texts(20_000, settings.seed)
        if settings.model == "tiny-bart":
            from denoise import vocabulary_texts
            texts = vocabulary_texts(20_000, settings.seed)
        write_tokens(learn_tokens(texts, settings.vocabulary - 1), out / "tokenizer.tiktoken")
    if settings.model == "tiny-bart":           # its numbers: those of the tokenizer, moved by 4
        with whole_file(out / "dict.txt", "w") as file:
            file.writelines(f"{number} 1\n" for number in range(settings.vocabulary))
    (out / "log.jsonl").unlink(missing_ok=True)     # of a run that ended before its first saving
    recipe = {name: value for name, value in dataclasses.asdict(settings).items()
              if name not in FREE}
    write_log(settings, {"settings": recipe, "torch": torch.__version__})


def finish(net, settings):
    """Write the model in 16 bits, its tokenizer, and the log of how it came about."""
    checkpoint.save(net.half(), settings.weights)
    copies = {"tokenizer.tiktoken": "tokenizer.tiktoken", "log.jsonl": "pretrain_log.jsonl"}
    if settings.model == "tiny-bart":
        copies["dict.txt"] = "dict.txt"
    for name, goal in copies.items():
        with whole_file(Path(settings.weights) / goal) as file:
            file.write((Path(settings.out) / name).read_bytes())


def pretrain(rank, settings, meeting):
    """One process of the run. `meeting`: a path that no file has yet, where the processes meet.

    All of them have the same weights, read different text and take the same steps; the first one
    keeps the log and the files.
    """
    s, first = settings, rank == 0
    device = ("cuda" if torch.cuda.is_available() else "cpu") if s.device == "auto" else s.device
    if s.processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // s.processes))
        distributed.init_process_group("gloo", f"file://{meeting}", rank=rank,
                                       world_size=s.processes)
    steps = max(1, s.tokens // (s.rows * s.context * s.processes))
    make, texts_of, loss_of, probe = parts_of(s.model)
    net = make(s).to(device)
    optimizers = optimizers_of(net, s)
    start, before = load_state(net, optimizers, s) if s.resume else (0, 0.0)
    tokenizer = load_tokenizer(s.out)
    stop = min(steps, s.stop_at or steps)
    if first:
        size = sum(weight.numel() for weight in net.parameters())
        print(f"{size:,} parameters on {device}, step {start} of {steps}", flush=True)
    texts = range(start * s.processes + rank, stop * s.processes, s.processes)
    batches = torch.utils.data.DataLoader(texts_of(tokenizer, s, texts), batch_size=None,
                                          num_workers=s.workers)
    began, losses = time.perf_counter(), []
    for step, batch in enumerate(batches, start):
        for optimizer, rate in zip(optimizers, (s.matrix_lr, s.lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(step, steps, s.warmup)
        with torch.autocast(device, torch.bfloat16, enabled=s.dtype == "bf16"):
            loss, count = loss_of(net, *(part.to(device) for part in batch),
                                  attend=attend_without_prefix)
        net.zero_grad()
        loss.backward()
        mean = share_gradients(net, loss, count)
        losses += [mean] if first else []
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        done, last = step + 1, step + 1 == stop
        seconds = before + time.perf_counter() - began
        if first and (last or done % s.probe_every == 0):
            line = {"step": done, "tokens": done * s.rows * s.context * s.processes,
                    "loss": round(torch.stack(losses).mean().item(), 4), **probe(net, tokenizer),
                    "seconds": round(seconds)}
            write_log(s, line)
            print(json.dumps(line), flush=True)
            losses = []
        if first and (last or done % s.save_every == 0):
            save_state(net, optimizers, done, seconds, s)
    if first and stop == steps:
        finish(net, s)
    if s.processes > 1:
        distributed.barrier()           # the first one is still writing
        distributed.destroy_process_group()


def main(argv=None):
    settings = parse(Settings, argv, "Pre-train a bundled model on the micro-world's text.")
    settings.weights = settings.weights or f"weights/{settings.model}"
    if settings.width % settings.heads:
        raise ValueError(f"got --width {settings.width} and --heads {settings.heads}; expected a "
                         "width that the heads can share; choose another")
    if not settings.resume:
        begin(settings)
    if settings.processes == 1:
        pretrain(0, settings, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(pretrain, (settings, f"{folder}/meeting"), settings.processes)


if __name__ == "__main__":
    run(main)
