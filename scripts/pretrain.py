"""Pre-training of the bundled models, from scratch, on the text of the invented world.

    python -m scripts.pretrain                          tiny-gpt2, a language model
    python -m scripts.pretrain --model tiny-bart        which undoes noise

It stands for the pre-training that the paper takes for granted: its models are GPT-2 and BART. The
batch of step n is a function of the seed and n, so a run that was stopped goes on with --resume as
if nothing had happened. Not here: the text (data/toy_world/text.py), what is BART's own
(pretrain_bart.py), the optimiser of the matrices (muon.py). Letters as in model.py.
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

from data.tokenizer import load_tokenizer
from data.toy_world.text import AGAIN, FIRST, document, encode, sheet_then_prose, world_thing
from model import GPT2, GPT2Config
from prefix import token_losses
from pretrained.checkpoint import UNREADABLE, check_finite, describe, read_tensors, save
from pretrained.run_directory import append_log, put_back, save_state
from scripts.learn_bpe import learn_tokens, world_texts, write_tokens
from scripts.muon import Muon
from utils.cli import flag, parse, run_program
from utils.files import atomic_write, lock, make_folder, memory


@dataclasses.dataclass
class Settings:
    model: str = flag("tiny-gpt2", "tiny-gpt2, a language model; tiny-bart, which undoes noise",
                      choices=["tiny-gpt2", "tiny-bart"])
    tokens: int = flag(150_000_000, "how many tokens to read, packed and padded",
                       within=(1, 10 ** 12))
    vocabulary: int = flag(1280, "tokens of a new tokenizer, <|endoftext|> included",
                           within=(257, 10 ** 6))
    context: int = flag(192, "positions of the model, and tokens of a row of text",
                        within=(1, 100_000))
    width: int = flag(192, "C, the width of the model", within=(1, 10_000))
    layers: int = flag(4, "L, its blocks; of tiny-bart in the encoder and again in the decoder",
                       within=(1, 1000))
    heads: int = flag(4, "H, its attention heads", within=(1, 1000))
    rows: int = flag(16, "rows of text in a step of each process", within=(1, 10_000))
    processes: int = flag(1, "processes that share a step, each with rows of its own; on a CPU as "
                             "many as it has cores is fastest", within=(1, 64))
    lr: float = flag(2e-3, "highest learning rate of words, positions, biases and LayerNorms",
                     within=(1e-12, 1e6))
    matrix_lr: float = flag(0.02, "highest learning rate of the matrices in the blocks",
                            within=(1e-12, 1e6))
    warmup: int = flag(200, "steps in which the rates rise; then they fall in half a cosine to 0",
                       within=(0, 10 ** 9))
    seed: int = flag(0, "of the first weights, the tokenizer and every text", within=(0, 10 ** 12))
    device: str = flag("auto", "auto: cuda where there is one", choices=["auto", "cpu", "cuda"])
    dtype: str = flag("fp32", "bf16: mixed precision, the weights stay in fp32",
                      choices=["fp32", "bf16"])
    workers: int = flag(0, "processes that write text ahead of the model; 0: none",
                        within=(0, 1000))
    probe_every: int = flag(200, "steps between two lines of the log", within=(1, 10 ** 9))
    save_every: int = flag(1000, "steps between two savings of the state", within=(1, 10 ** 9))
    out: str = flag("out/pretrain", "directory of the run: its state, log and tokenizer")
    weights: str = flag("", "directory for the finished model, in 16 bits; left out: weights/MODEL")
    resume: bool = flag(False, "go on with the run in --out")
    stop_at: int = flag(0, "stop after this step, to be resumed; 0: at the end",
                        within=(0, 10 ** 9))


# ---- text: whole documents, packed into rows

def pack(documents, rows, length):
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


def batch_of_step(tokenizer, settings, step):
    """ids (B, T+1), and labels, the same but -100 where none is learned: by seed and step only."""
    s, rng = settings, random.Random(f"text {settings.seed} {step}")
    length, documents, total = s.context + 1, [], 0
    while total < s.rows * length:
        documents.append(list(zip(*encode(document(rng), tokenizer), strict=True)))
        total += len(documents[-1])
    ids = torch.full((s.rows, length), tokenizer.eos_token_id)                      # (B, T+1)
    labels = torch.full((s.rows, length), -100)                                     # (B, T+1)
    for row, items in enumerate(pack(documents, s.rows, length)):
        rng.shuffle(items)                      # else every row would begin with a long document
        pairs = [pair for item in items for pair in item]
        ids[row, :len(pairs)] = torch.tensor([token for token, _ in pairs])
        labels[row, :len(pairs)] = torch.tensor([-100 if role == FIRST else token
                                                 for token, role in pairs])
    return ids, labels


class Batches(torch.utils.data.Dataset):
    """The batches of `steps`, each made when it is asked for by `batch_of_step`."""

    def __init__(self, batch_of_step, tokenizer, settings, steps):
        self.make, self.given, self.steps = batch_of_step, (tokenizer, settings), steps

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index):
        return self.make(*self.given, self.steps[index])


# ---- the model

def empty_model(settings):
    s = settings
    return GPT2(GPT2Config(s.vocabulary, s.context, s.width, s.layers, s.heads))


def check_size(settings):
    """A ValueError for a model that the memory cannot hold: before anything is made or written."""
    with torch.device("meta"):          # each layer may fit into the memory, and all of them not
        model = parts_of(settings.model)[0](settings)
    number = sum(weight.numel() for weight in model.parameters())
    if number * 4 > (most := memory()):
        raise ValueError(f"got a model of {number:,} parameters, {number * 4 >> 30:,} GiB; "
                         f"expected at most the {most >> 30:,} GiB of this computer's memory; give "
                         "a smaller --width, --layers or --vocabulary")


def new_model(settings, empty_model=empty_model):
    """GPT-2's first weights, N(0, 0.02), less where 2L branches add up; but words get N(0, 0.1).

    With words further apart copying begins sooner; after 3M tokens it is no better than with 0.02
    (one run each). BART's are alike.
    """
    torch.manual_seed(settings.seed)
    model = empty_model(settings)
    for name, weight in model.named_parameters():
        if name.endswith(("c_proj.weight", "out_proj.weight", "fc2.weight")):
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * settings.layers))
        elif weight.dim() == 2:
            is_words = weight is model.word_embedding.weight
            torch.nn.init.normal_(weight, std=0.1 if is_words else 0.02)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    return model


def loss_of(model, ids, labels):
    """(summed loss, number) of the learned tokens; no logit is computed for the others."""
    hidden = model.hidden_states(ids[:, :-1])                                       # (B, T, C)
    learned = labels[:, 1:] != -100                                                 # (B, T)
    losses = token_losses(model.head(hidden[learned]), labels[:, 1:][learned])      # (N,)
    return losses.sum(), len(losses)


def share_gradients(model, loss, count):
    """Make every process's gradients those of the mean loss over all processes' tokens.

    loss, count: this process's own, see `loss_of`. Returns the mean loss, a tensor.
    """
    grads = [weight.grad for weight in model.parameters()]
    both = torch.stack((loss.detach(), loss.new_tensor(count)))                     # (2,)
    flat = torch.cat([*(grad.flatten() for grad in grads), both])
    if distributed.is_initialized():
        distributed.all_reduce(flat)
    flat = flat / flat[-1]
    for grad, mean in zip(grads, flat.split([*map(torch.numel, grads), 2])):
        grad.copy_(mean.view_as(grad))
    return flat[-2].clone()                             # a view would keep all of `flat` in memory


def optimizers_of(model, settings):
    """Muon for the matrices of the blocks, AdamW for words, positions, biases and LayerNorms."""
    groups = {True: [], False: []}
    for name, weight in model.named_parameters():
        groups[weight.dim() == 2 and bool(re.search(r"^h\.|layers\.", name))].append(weight)
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    return [Muon(groups[True], settings.matrix_lr, dtype=dtype),
            torch.optim.AdamW(groups[False], settings.lr, betas=(0.9, 0.97), weight_decay=0.0)]


def schedule(step, steps, warmup):
    """The share of the learning rates: up in a line, down in half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@torch.no_grad()
def probe(model, tokenizer, count=64):
    """How well prose follows from its own sheet, in pre-training's notations, for names never read.

    prose: loss of the prose. copy: loss of the values of facts in it. copied: share of these copied
    without a fault, that is, each token the likeliest after the true ones before it. The thing's
    own name is left out: whether a sentence begins with it or with "It" is a matter of taste.
    """
    rng, prose, copy, copied = random.Random("probe"), [], [], []
    for _ in range(count):
        thing = world_thing(rng, groups=(0,))
        ids, roles = encode(sheet_then_prose(thing, rng), tokenizer)
        target = torch.tensor(ids[1:], device=model.device)                         # (T,)
        hidden = model.hidden_states(torch.tensor([ids[:-1]], device=model.device))
        logits = model.head(hidden[0])                                              # (T, V)
        losses = token_losses(logits, target).tolist()
        hits = (logits.argmax(1) == target).tolist()
        places = range(len(roles) - roles[::-1].index(FIRST), len(roles))   # after the sheet
        prose += [losses[n - 1] for n in places]
        for role, value in itertools.groupby(places, key=roles.__getitem__):
            value = list(value)
            words = f"{{{tokenizer.decode([ids[n] for n in value]).strip()}}}"
            if role == AGAIN and words in dict(thing.facts).values():
                copy += [losses[n - 1] for n in value]
                copied.append(all(hits[n - 1] for n in value))
    return {name: round(sum(numbers) / len(numbers), 4) for name, numbers in
            (("prose", prose), ("copy", copy), ("copied", copied))}


def parts_of(name):
    """A model's (empty_model, batch_of_step, loss_of, probe, texts to learn the tokenizer from)."""
    if name == "tiny-gpt2":
        return empty_model, batch_of_step, loss_of, probe, world_texts
    from scripts import pretrain_bart as bart
    return bart.empty_model, bart.batch_of_step, bart.loss_of, bart.probe, bart.vocabulary_texts


# ---- the run: what is kept on disk

# Settings that are no part of the recipe: they may change from one part of a run to the next.
FREE = {"resume", "stop_at", "device", "workers", "save_every", "out", "weights"}


def load_state(model, optimizers, settings, first):
    """Go on from what was saved last. first: of several processes the one that writes. Returns
    (step, seconds).
    """
    path = Path(settings.out) / "resume.pt"
    if not path.exists():
        raise ValueError(f"got --resume, expected {path} of a run that was begun; start without it")
    try:
        state = read_tensors(path)
    except UNREADABLE as error:
        raise ValueError(f"got {path}, which is damaged ({describe(error)}); expected what this "
                         "program wrote there; begin a new run in another --out") from error
    now = dataclasses.asdict(settings)
    other = [f"--{name.replace('_', '-')} {value}" for name, value in state["settings"].items()
             if name not in FREE and now[name] != value]
    if other:
        raise ValueError(f"got other settings than those of the run in {settings.out}, expected "
                         f"{' '.join(other)}; give these, or begin a new run in another --out")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if first:
        lock(Path(settings.out) / ".lock")
        put_back(settings.out, state)
    return state["step"], state["seconds"]


def begin(settings):
    """A new run: its tokenizer, unless one is there, and the first line of the log."""
    out = Path(settings.out)
    if (out / "resume.pt").exists():
        raise ValueError(f"got --out {out}, which holds a run; expected a new directory; choose "
                         "another, or go on with --resume")
    make_folder(out)
    lock(out / ".lock")
    if not (out / "tokenizer.tiktoken").exists():
        texts = parts_of(settings.model)[-1](20_000, settings.seed)
        write_tokens(learn_tokens(texts, settings.vocabulary - 1), out / "tokenizer.tiktoken")
    if settings.model == "tiny-bart":           # its numbers: those of the tokenizer, moved by 4
        with atomic_write(out / "dict.txt", "w") as file:
            file.writelines(f"{number} 1\n" for number in range(settings.vocabulary))
    (out / "log.jsonl").unlink(missing_ok=True)     # of a run that ended before its first saving
    recipe = {name: value for name, value in dataclasses.asdict(settings).items()
              if name not in FREE}
    append_log(out, settings=recipe, torch=torch.__version__)


def finish(model, settings):
    """Write the model in 16 bits, its tokenizer, and the log of how it came about."""
    model = model.half()
    check_finite(model.state_dict(), settings.weights)      # first: nothing there may be replaced
    copies = {"tokenizer.tiktoken": "tokenizer.tiktoken", "log.jsonl": "pretrain_log.jsonl"}
    if settings.model == "tiny-bart":
        copies["dict.txt"] = "dict.txt"
    for name, copy in copies.items():
        with atomic_write(Path(settings.weights) / copy) as file:
            file.write((Path(settings.out) / name).read_bytes())
    save(model, settings.weights)


def train_step(model, optimizers, batch, loss_of, rates, dtype):
    """One step of all processes. Returns the mean loss of a learned token, a tensor."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        loss, count = loss_of(model, *(part.to(model.device) for part in batch))
    model.zero_grad()
    loss.backward()
    mean = share_gradients(model, loss, count)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, rate in zip(optimizers, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return mean


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
    empty_model, batch_of_step, loss_of, probe, _ = parts_of(s.model)
    model = new_model(s, empty_model).to(device)
    optimizers = optimizers_of(model, s)
    start, before = load_state(model, optimizers, s, first) if s.resume else (0, 0.0)
    tokenizer = load_tokenizer(s.out)
    stop = min(steps, s.stop_at or steps)
    if first:
        size = sum(weight.numel() for weight in model.parameters())
        print(f"{size:,} parameters on {device}, step {start} of {steps}", flush=True)
    texts = range(start * s.processes + rank, stop * s.processes, s.processes)
    batches = torch.utils.data.DataLoader(Batches(batch_of_step, tokenizer, s, texts),
                                          batch_size=None, num_workers=s.workers)
    began, losses = time.perf_counter(), []
    for step, batch in enumerate(batches, start):
        share = schedule(step, steps, s.warmup)
        mean = train_step(model, optimizers, batch, loss_of, (s.matrix_lr * share, s.lr * share),
                          s.dtype)
        losses += [mean] if first else []
        done, last = step + 1, step + 1 == stop
        seconds = before + time.perf_counter() - began
        if (last or done % min(s.probe_every, s.save_every) == 0) and not mean.isfinite():
            raise ValueError(f"got a loss of {mean.item()} by step {done}, expected a finite "
                             f"number; what was there before is untouched; begin again in another "
                             "--out with a lower --lr or --matrix-lr")
        if first and (last or done % s.probe_every == 0):
            row = {"step": done, "tokens": done * s.rows * s.context * s.processes,
                   "loss": round(torch.stack(losses).mean().item(), 4), **probe(model, tokenizer),
                   "seconds": round(seconds)}
            append_log(s.out, **row)
            print(json.dumps(row), flush=True)
            losses = []
        if first and (last or done % s.save_every == 0):
            check_finite(model.state_dict(), s.out)         # the loss is that before the update
            save_state(s.out, {
                "model": model.state_dict(), "step": done, "seconds": seconds,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "settings": dataclasses.asdict(s)})
    if first and stop == steps:
        finish(model, s)
    if s.processes > 1:
        distributed.barrier()           # the first one is still writing
        distributed.destroy_process_group()


def main(argv=None):
    settings = parse(Settings, argv, "Pre-train a bundled model on the invented world's text.")
    settings.weights = settings.weights or f"weights/{settings.model}"
    if settings.width % settings.heads:
        raise ValueError(f"got --width {settings.width} and --heads {settings.heads}; expected a "
                         "width that the heads can share; choose another")
    check_size(settings)
    if not settings.resume:
        begin(settings)
    if settings.processes == 1:
        pretrain(0, settings, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(pretrain, (settings, f"{folder}/meeting"), settings.processes)


if __name__ == "__main__":
    run_program(main)
