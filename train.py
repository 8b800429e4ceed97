"""The loop: learn a prefix for a frozen language model. Li & Liang 2021: 3.3, 4.2, 4.3, 5.3.

    python train.py                                 bundled model and task, a minute on a laptop
    python train.py --model gpt2-medium --data e2e  the paper's run, with the paper's settings
    python train.py --model bart-large --data xsum --data-dir DIR      three prefixes, for BART
    python train.py --data my.jsonl                 your own task
    python train.py --resume out/NAME               goes on where it stopped, bit for bit

A run is a directory: config.json (all settings), log.jsonl (a line each logged step), prefix.pt
(the best prefix so far, folded; a fine-tuned model/ instead) and resume.pt (everything needed to go
on). sample.py decodes with it. Not here: what a prefix is (prefix.py), the other methods of the
paper (baselines.py), scores.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

# PyTorch's threads, while they wait for each other, spin: on a busy laptop that makes a small model
# several times slower. Asleep they cost nothing. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch  # noqa: E402
from tqdm import tqdm

from batches import batch_of, batches_of_epoch, tokens_of
from beam import Rules
from checkpoint import UNREADABLE, why
from data import sequence, tasks
from loss import dev_loss, target_nats
from model import attend
from opening import find_attention, find_step, name_of_dtype, open_model
from plumbing import parse, whole_file
from plumbing import run as run_program
from prefix import Prefix, Prefixes, counts, keys_and_values, load_prefix, parts
from sample import LINE_BREAKS, generate
from settings import NOTES, Settings, places_of, resolve, resumed, room_for

# ---- the run: its settings, its state, what is kept on disk

def load_examples(settings):
    """The examples to learn from and those of the dev set, as text."""
    train = tasks.load(settings.data, "train", settings.data_dir or None)
    dev = tasks.load(settings.data, "dev", settings.data_dir or None)
    if settings.examples:
        if settings.examples > len(train):
            raise ValueError(f"got --examples {settings.examples}; expected at most {len(train)}, "
                             f"the sources of {settings.data}")
        train = random.Random(settings.seed).sample(train, settings.examples)
    return train, dev


def make_pairs(train, dev, settings, tokenizer, room):
    """The pairs to learn from and the dev pairs to be scored, at most `room` tokens each; for BART
    `room` is two numbers, the source's and the target's.
    """
    encode = sequence.encode_apart if isinstance(room, tuple) else sequence.encode_pairs
    train_pairs, note = encode(train, tokenizer, room)
    dev_pairs, dev_note = encode(dev, tokenizer, room)
    for part, text in (("train", note), ("dev", dev_note)):
        if text:
            print(f"{part}: {text}")
    if 0 < settings.dev_pairs < len(dev_pairs):
        # Not the first ones: files are sorted by name. Not by --seed: runs are to be comparable.
        dev_pairs = random.Random(0).sample(dev_pairs, settings.dev_pairs)
    return train_pairs, dev_pairs


def make_prefix(settings, model, tokenizer):
    """A fresh prefix by the settings; --init words and --start-from decide its length."""
    torch.manual_seed(settings.seed)
    device, init = model.wte.weight.device, settings.init
    if settings.start_from and not settings.resume:
        start = load_prefix(Path(settings.start_from) / "prefix.pt", model)
        settings.prefix_len = max(part.size(4) for part in parts(start))
        if model.architecture == "bart":
            settings.prefixes = ",".join(f"{place}={part.size(4)}" for place, part in
                                         zip(model.places, start) if part.size(4))
    if init == "words":
        words = tokenizer.encode_ordinary(" " + settings.init_text)
        settings.prefix_len, init = len(words), "random"
    lengths = places_of(settings, model)
    if model.architecture == "bart":
        prefix = Prefixes(model.config, lengths, settings.mid_dim, init).to(device)
    else:
        prefix = Prefix(model.config, lengths["decoder"], settings.mid_dim, init).to(device)
    if settings.init == "words" and not settings.resume:
        error = prefix.start_from(keys_and_values(model, words))
        print(f"prefix started from the {len(words)} tokens of {settings.init_text!r}; "
              f"mean squared error left: {error:.4f} a number")
    if settings.start_from and not settings.resume:
        error = prefix.start_from(start)
        print(f"prefix started from {settings.start_from}; mean squared error left: {error:.4f} a "
              "number")
    return prefix


def make_learner(settings, model, tokenizer):
    """What learns, by --method: a fresh prefix, or the model itself."""
    if settings.method == "prefix":
        return make_prefix(settings, model, tokenizer)
    from baselines import FineTune              # a side door
    return FineTune(model, top=2 if settings.method == "finetune-top2" else None)


class Run:
    """Everything that changes while learning, and the directory that keeps it."""

    def __init__(self, settings, model, learner, data="", attend=attend, nats=target_nats):
        self.settings, self.model, self.learner = settings, model, learner
        self.data = data                            # a name for the very pairs it learns from
        self.attend, self.nats = attend, nats       # what --attention and --compile ask for
        self.directory = Path(settings.out)
        # Only what learns is handed over: the optimiser could not touch a frozen weight.
        self.optimizer = torch.optim.AdamW(learner.parameters(), lr=settings.lr, betas=(0.9, 0.999),
                                           eps=1e-8, weight_decay=settings.weight_decay)
        self.step, self.best, self.first = 0, math.inf, None    # steps done; dev losses

    def begin(self, told):
        """Create the directory and write down all settings, and what was told of the sizes."""
        commit = None
        if shutil.which("git"):
            commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                    capture_output=True, text=True).stdout.strip() or None
        about = {"settings": dataclasses.asdict(self.settings),
                 "counts": told, "fingerprint": self.model.fingerprint, "commit": commit,
                 "versions": {"python": platform.python_version(), "torch": torch.__version__}}
        with whole_file(self.directory / "config.json", "w") as file:
            json.dump(about, file, indent=1)

    def restore(self):
        """Go back to the last saved step; lines of the log that came after it are dropped."""
        path = self.directory / "resume.pt"
        try:
            # On the CPU AdamW counts its steps; on a GPU every step would wait for that number.
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["fingerprint"] != self.model.fingerprint:
                raise ValueError("it was trained with other weights of the model")
            if state["data"] != self.data:
                raise ValueError("the data or its tokens have changed since")
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best, self.first = state["step"], state["best"], state["first"]
            log = self.directory / "log.jsonl"
            lines = [line for line in log.read_text("utf-8").splitlines() if line.endswith("}")]
            lines = [line for line in lines if json.loads(line)["step"] <= self.step]
        except UNREADABLE as error:
            raise ValueError(f"got {path}, which cannot be resumed ({why(error)}); expected what "
                             "train.py wrote there; start a new run") from error
        with whole_file(log, "w") as file:
            file.writelines(f"{line}\n" for line in lines)
        for left_behind in self.directory.rglob("*.tmp"):       # of a kill in the middle of a write
            left_behind.unlink()

    def save(self):
        """Keep the state of this step in resume.pt."""
        with whole_file(self.directory / "resume.pt") as file:
            torch.save({"fingerprint": self.model.fingerprint, "data": self.data,
                        "step": self.step, "best": self.best, "first": self.first,
                        "learner": self.learner.state_dict(),
                        "optimizer": self.optimizer.state_dict()}, file)

    def log(self, **numbers):
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step} | numbers) + "\n")

    def learning_rate(self):
        """Up in a line for --warmup steps, then down in a line, to 0 after the last step."""
        s = self.settings
        if self.step < s.warmup:
            return s.lr * (self.step + 1) / s.warmup
        return s.lr * (s.steps - self.step) / max(1, s.steps - s.warmup)

    def update(self, pairs):
        """One step: the paper's equation 2 on one batch. Returns the batch's nats, a tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        batch = batch_of(self.model, pairs, self.settings.share_source)
        prefix = self.learner().to(self.model.wte.weight.dtype)  # the MLP, once for the whole batch
        nats = self.nats(self.model, prefix, batch, self.attend)
        # A prefix of GPT-2: summed over a target, averaged over the batch, as in the official code;
        # so long targets weigh more. BART and the baselines: the mean over tokens, as there.
        whole = self.settings.method == "prefix" and self.model.architecture != "bart"
        (nats / (len(pairs) if whole else tokens_of(pairs))).backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return nats.detach()

    def look(self, dev):
        """The dev loss now. The best learner so far is kept; then the whole state."""
        batch_size = max(16, self.settings.batch_size)
        loss = dev_loss(self.model, self.learner, dev, batch_size, self.attend)
        self.check(loss)
        self.first = loss if self.first is None else self.first
        self.log(dev_loss=loss)
        if loss < self.best:
            self.best = loss
            self.learner.keep(self.directory, self.model)
        self.save()
        return loss

    def check(self, loss):
        if not math.isfinite(loss):
            kept = "look at the model's weights"
            if self.first is not None:
                kept = (f"the last good {self.settings.method} is kept in {self.directory}; start "
                        "again with a lower --lr")
            raise ValueError(f"got a loss of {loss} at step {self.step}, expected a finite number; "
                             + kept)


@contextlib.contextmanager
def stop_politely():
    """Ctrl-C (or a cluster's SIGTERM) fills the list: the loop ends after the step it is in.

    A second one ends the program at once.
    """
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def learn(run, pairs, dev):
    """Steps until the settings' last one. Returns False where it was asked to stop before."""
    s = run.settings
    per_epoch = math.ceil(len(pairs) / s.batch_size)
    every = s.dev_every or max(1, s.steps // 10)
    epoch, nats, targets, seen, clock = None, 0.0, 0, 0, time.perf_counter()
    bar = tqdm(total=s.steps, initial=run.step, unit="step", disable=None)
    with stop_politely() as asked, bar:
        shown = run.look(dev) if run.first is None else run.best
        while run.step < s.steps:
            if asked or 0 < s.stop_at <= run.step:
                run.check(float(nats))              # never keep a state that is lost
                run.save()
                return False
            if epoch != run.step // per_epoch:
                epoch = run.step // per_epoch
                order = batches_of_epoch(pairs, s.batch_size, s.seed, epoch, s.share_source)
            batch = [pairs[i] for i in order[run.step % per_epoch]]
            nats += run.update(batch)
            targets += tokens_of(batch)
            seen += sum(len(p.ids) for p in batch)
            bar.update()
            if run.step % 10 == 0 or run.step == s.steps:
                loss, rate = float(nats) / targets, seen / (time.perf_counter() - clock)
                run.check(loss)
                run.log(loss=loss, tokens_per_second=round(rate))
                bar.set_postfix(loss=f"{loss:.3f}", dev=f"{shown:.3f}", tokens_per_s=round(rate))
                nats, targets, seen, clock = 0.0, 0, 0, time.perf_counter()
            if run.step % every == 0 or run.step == s.steps:
                before = time.perf_counter()
                shown = run.look(dev)
                clock += time.perf_counter() - before      # the dev set's time is not training time
    return True


def show(run, tokenizer, pair):
    """One table that was not learned from, and what is said to it, before learning and after."""
    prompt, target = pair.ids[:pair.start], sequence.text_of(tokenizer, pair.ids[pair.start:])
    source = sequence.text_of(tokenizer, prompt)
    print(f"\ntable      {source}")
    banned = {token for text in LINE_BREAKS for token in tokenizer.encode_ordinary(text)}
    rules = Rules(tokenizer.eot_token, banned=tuple(banned), **run.model.config.forced)
    said = {"no prefix": (run.model, None)} if run.settings.method == "prefix" else {}
    said[run.settings.method] = run.learner.kept(run.directory, run.model)
    for name, (model, prefix) in said.items():
        words, = generate(model, [prompt], rules, prefix, attend=run.attend)
        print(f"{name:10} {' '.join(sequence.text_of(tokenizer, words).split())}")
    print(f"a person   {target}\n\ndecode with: python sample.py --run {run.directory} "
          f"{shlex.quote(source)}")


def main(argv=None):
    asked = parse(Settings, argv, "Learn a prefix for a frozen language model.", notes=NOTES)
    settings = resumed(asked) if asked.resume else resolve(asked)
    train_examples, dev_examples = load_examples(settings)
    if settings.method != "prefix" and settings.dtype == "auto":
        settings.dtype = "fp32"         # steps of 1e-5 would be rounded away in bf16 weights
    model, tokenizer = open_model(settings.model, settings.device, settings.dtype)
    settings.dtype = name_of_dtype(model.wte.weight.dtype)      # a resumed run keeps it
    attend = find_attention(settings.attention, model)
    learner = make_learner(settings, model, tokenizer)
    room = room_for(settings, model, learner)
    pairs, dev = make_pairs(train_examples, dev_examples, settings, tokenizer, room)
    settings.steps = settings.steps or settings.epochs * math.ceil(len(pairs) / settings.batch_size)
    told, nats = counts(learner, model), find_step(settings, model, target_nats)
    print(f"{settings.model}: {told}\n"
          f"{settings.data}: {len(pairs):,} pairs to learn from, {len(dev):,} dev pairs scored; "
          f"{settings.steps:,} steps of {settings.batch_size} -> {settings.out}")
    data = hashlib.sha256(repr([(p.ids, p.start) for p in pairs + dev]).encode()).hexdigest()
    run = Run(settings, model, learner, data, attend, nats)
    if settings.resume:
        run.restore()
    else:
        run.begin(told)
    start = time.perf_counter()
    if not learn(run, pairs, dev):
        print(f"stopped after step {run.step}; go on with: python train.py --resume {settings.out}")
        return
    seconds = time.perf_counter() - start
    print(f"dev loss {run.first:.3f} -> {run.best:.3f} nats a token, {seconds:.0f} s")
    show(run, tokenizer, dev[0])


if __name__ == "__main__":
    run_program(main)
