"""Pre-training of the bundled models, from scratch, on the text of the invented world.

    python -m scripts.pretrain                          tiny-gpt2, a language model
    python -m scripts.pretrain --model tiny-bart        which undoes noise

It stands for the pre-training that the paper takes for granted: its models are GPT-2 and BART. The
batch of step n is a function of the seed and n, so a run that was stopped goes on with --resume as
if nothing had happened. Not here: the text (data/toy_world/text.py), what is each model's own
(pretrain_gpt2.py, pretrain_bart.py), the optimiser of the matrices (muon.py). Letters as in
model.py.
"""
import dataclasses
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed

from data.tokenizer import load_tokenizer
from pretrained.checkpoint import (
    UNREADABLE,
    check_finite,
    describe,
    read_tensors,
    save,
    vocabulary_sums,
)
from pretrained.run_directory import append_log, check_settings, put_back, save_state
from scripts import pretrain_gpt2
from scripts.learn_bpe import learn_tokens, world_texts, write_tokens
from scripts.muon import Muon
from scripts.results import read_rows
from utils.cli import flag, parse, run_program, stop_after_this_step
from utils.files import atomic_write, lock, make_folder, memory
from utils.terminal import command


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


# ---- the model, and its text

def parts_of(name):
    """A model's (empty_model, batch_of_step, loss_of, probe, texts to learn the tokenizer from)."""
    if name == "tiny-gpt2":
        own, texts = pretrain_gpt2, world_texts
    else:
        from scripts import pretrain_bart as own
        texts = own.vocabulary_texts
    return own.empty_model, own.batch_of_step, own.loss_of, own.probe, texts


class Batches(torch.utils.data.Dataset):
    """The batches of `steps`, each made when it is asked for by `batch_of_step`."""

    def __init__(self, batch_of_step, tokenizer, settings, steps):
        self.make, self.given, self.steps = batch_of_step, (tokenizer, settings), steps

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index):
        return self.make(*self.given, self.steps[index])


def check_size(settings):
    """A ValueError for a model or for steps that the memory cannot hold: before anything is made or
    written.
    """
    s = settings
    with torch.device("meta"):          # each layer may fit into the memory, and all of them not
        model = parts_of(s.model)[0](s)
    number = sum(weight.numel() for weight in model.parameters())
    # A part of what the backward pass needs: the logits, and each layer's attention weights.
    kept = s.rows * s.context * (s.vocabulary + s.layers * s.heads * s.context)
    if (size := 4 * s.processes * (number + kept)) > (most := memory()):
        raise ValueError(f"got a model of {number:,} parameters and steps of {s.rows} x {s.context}"
                         f" tokens, {size >> 30:,} GiB or more; expected at most the {most >> 30:,}"
                         " GiB of this computer's memory; give a smaller --width, --layers, "
                         "--vocabulary, --rows or --context")


def new_model(settings, empty_model=pretrain_gpt2.empty_model):
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
    """The factor of the learning rates: linear warm-up, then cosine decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


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
        check_settings(state, settings, FREE)
        if state["vocabulary"] != vocabulary_sums(settings.out):
            raise ValueError("the vocabulary beside it is another than it was")
    except UNREADABLE as error:
        raise ValueError(f"got {path}, which cannot be resumed ({describe(error)}); expected what "
                         "this program wrote there, with the same flags; begin a new run in "
                         "another --out") from error
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if first:
        lock(Path(settings.out) / ".lock")
        put_back(settings.out, state)
    return state["step"], state["seconds"]


def begin(settings):
    """A new run: its tokenizer, unless one is there, and the first line of the log."""
    out, s = Path(settings.out), settings
    if (out / "resume.pt").exists():
        raise ValueError(f"got --out {out}, which holds a run; expected a new directory; choose "
                         "another, or go on with --resume")
    recipe = {name: value for name, value in dataclasses.asdict(s).items() if name not in FREE}
    if any(row.get("settings") != recipe for row in read_rows(out / "log.jsonl")[:1]):
        raise ValueError(f"got --out {out}, which has a log.jsonl of something else; expected a "
                         "new directory; choose another")
    make_folder(out)
    lock(out / ".lock")
    if not (out / "tokenizer.tiktoken").exists():
        texts = parts_of(s.model)[-1](20_000, s.seed)
        write_tokens(learn_tokens(texts, s.vocabulary - 1), out / "tokenizer.tiktoken")
    # A BART's numbers: those of the tokenizer, moved by 4.
    if s.model == "tiny-bart" and not (out / "dict.txt").exists():
        with atomic_write(out / "dict.txt", "w") as file:
            file.writelines(f"{number} 1\n" for number in range(s.vocabulary))
    check_texts(s, load_tokenizer(out))
    (out / "log.jsonl").unlink(missing_ok=True)     # of this run, which ended before any saving
    append_log(out, settings=recipe, torch=torch.__version__)


def check_texts(settings, tokenizer):
    """Raise ValueError where the world's texts do not fit into the model."""
    empty_model, *_, probe, _ = parts_of(settings.model)
    model = new_model(settings, empty_model)
    if tokenizer.vocab_size != len(model.word_embedding.weight):
        raise ValueError(f"got {settings.out} with a vocabulary of {tokenizer.vocab_size} tokens; "
                         f"expected {len(model.word_embedding.weight)}, by --vocabulary; change "
                         "one of them")
    try:
        probe(model, tokenizer)                     # its documents are as long as those of a step
    except ValueError as error:
        raise ValueError(f"got --context {settings.context}, into which the world's texts do not "
                         f"fit ({error}); give a longer one, or a larger --vocabulary") from error


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


def stopped_by(signals, told):
    """The number of the signal that stops the run, 0 while none does: one for any of its processes,
    or for the one that started them, which has `told` it.
    """
    number = torch.tensor(max([told.value if told else 0, *signals]))
    if distributed.is_initialized():
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
    return number.item()


def ignore_signals(worker):
    """For a process that writes text: the model's own ends it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def write_log(model, tokenizer, settings, probe, done, losses, seconds):
    """Add a line to the log. Raises ValueError where the run has diverged: the loss is that before
    the last update, the probe's losses are those after it.
    """
    row = {"step": done, "tokens": done * settings.rows * settings.context * settings.processes,
           "loss": round(torch.stack(losses).mean().item(), 4), **probe(model, tokenizer),
           "seconds": round(seconds)}
    if not all(map(math.isfinite, row.values())):
        raise ValueError(f"got a loss of {row['loss']} by step {done} ({row}), expected finite "
                         "numbers; what was there before is untouched; begin again in "
                         "another --out with a lower --lr or --matrix-lr")
    append_log(settings.out, **row)
    print(json.dumps(row), flush=True)


def pretrain(rank, settings, meeting=None, told=None):
    """One process of the run. `meeting`: a path that no file has yet, where the processes meet.

    All of them have the same weights, read different text and take the same steps; the first one
    keeps the log and the files. told: see `stopped_by`. Returns the exit status.
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
    done, before = load_state(model, optimizers, s, first) if s.resume else (0, 0.0)
    tokenizer = load_tokenizer(s.out)
    stop, stopped, losses = min(steps, s.stop_at or steps), 0, []
    if first:
        size = sum(weight.numel() for weight in model.parameters())
        print(f"{size:,} parameters on {device}, step {done} of {steps}", flush=True)
    texts = range(done * s.processes + rank, stop * s.processes, s.processes)
    batches = torch.utils.data.DataLoader(Batches(batch_of_step, tokenizer, s, texts),
                                          batch_size=None, num_workers=s.workers,
                                          worker_init_fn=ignore_signals)
    began = time.perf_counter()
    with stop_after_this_step() as signals:
        for step, batch in enumerate(batches, done):
            share = schedule(step, steps, s.warmup)
            mean = train_step(model, optimizers, batch, loss_of,
                              (s.matrix_lr * share, s.lr * share), s.dtype)
            losses += [mean] if first else []
            done, stopped = step + 1, stopped_by(signals, told)
            last = stopped or done == stop
            seconds = before + time.perf_counter() - began
            saved = first and (last or done % s.save_every == 0)
            if saved or first and done % s.probe_every == 0:
                write_log(model, tokenizer, s, probe, done, losses, seconds)
                losses = []
            if saved:
                save_state(s, {"model": model.state_dict(), "step": done, "seconds": seconds,
                               "vocabulary": vocabulary_sums(s.out),
                               "optimizers": [one.state_dict() for one in optimizers]})
            if stopped:
                break
        if first and done == steps:
            finish(model, s)
    if s.processes > 1:
        distributed.barrier()           # the first one is still writing
        distributed.destroy_process_group()
    return 128 + stopped if stopped and done < stop else 0


def child(rank, *given):
    """`pretrain` as a program of its own. Of the processes one says what went wrong with all."""
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run_program(lambda: pretrain(rank, *given))


def pretrain_in_processes(settings):
    """`pretrain` in --processes of them; returns their exit status."""
    told = torch.multiprocessing.get_context("spawn").Value("i", 0)
    with tempfile.TemporaryDirectory() as folder, stop_after_this_step() as signals:
        children = torch.multiprocessing.spawn(
            child, (settings, f"{folder}/meeting", told), settings.processes, join=False)
        try:
            while not children.join(0.2):
                told.value = max([0, *signals])
        except torch.multiprocessing.ProcessExitedException as error:
            status = children.processes[0].exitcode or error.exit_code  # the others' follow from it
            return status if status > 0 else 128 - status
        finally:
            for process in children.processes:      # none where all have ended
                process.kill()
    return 0


def main(argv=None):
    settings = parse(Settings, argv, "Pre-train a bundled model on the invented world's text.")
    settings.weights = settings.weights or f"weights/{settings.model}"
    if settings.width % settings.heads:
        raise ValueError(f"got --width {settings.width} and --heads {settings.heads}; expected a "
                         "width that the heads can share; choose another")
    check_size(settings)
    if not settings.resume:
        begin(settings)
    status = (pretrain(0, settings) if settings.processes == 1 else
              pretrain_in_processes(settings))
    if status > 128 and (Path(settings.out) / "resume.pt").exists():
        words = sys.argv[1:] if argv is None else argv
        print("stopped; go on with:", command("-m", "scripts.pretrain", *words, *(
            [] if settings.resume else ["--resume"])))
    return status


if __name__ == "__main__":
    run_program(main)
