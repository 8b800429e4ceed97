"""The loop: train a prefix for a frozen language model. Li & Liang 2021: 3.3, 4.2, 4.3, 5.3.

    python train.py                                 bundled model and task, a minute on a laptop
    python train.py --model gpt2-medium --data e2e  the paper's run, with the paper's settings
    python train.py --model bart-large --data xsum --data-dir DIR      three prefixes, for BART
    python train.py --data my.jsonl                 your own task
    python train.py --resume out/NAME               goes on where it stopped, bit for bit

A run is a directory (pretrained/run_directory.py), and sample.py decodes with it. Not here: what a
prefix and its loss are (prefix.py), the paper's other methods (baselines/), faster forms of the
same step (fast/), scores (scripts/evaluate.py).
"""
import utils.before_torch  # noqa: F401  passive OpenMP threads; names missing packages

import copy
import dataclasses
import math
import time

import torch

from data import own, paper, tasks
from data.batches import count_labels, epoch_batches
from data.pairs import dev_batches, digest, encode_examples, load_examples, pairs_of, settings_for
from decoding.constraints import constraints_of
from prefix import summarize_parameters, target_loss
from pretrained import run_directory
from pretrained.architectures import flags_of, new_prefix
from pretrained.load import load_model, name_of_dtype
from sample import generate
from utils.cli import flag, optional_module, parse, run_program, stop_after_this_step
from utils.terminal import command, labelled, progress


@dataclasses.dataclass
class Settings:
    model: str = flag("tiny-gpt2", "the frozen model: gpt2, gpt2-medium, ..., another name in "
                                   "weights/, or a directory; with --start-from that run's",
                      group="model and data: --model gpt2 --data my.jsonl")
    data: str = flag("", f"{', '.join(tasks.NAMES)}; or your own, {own.FORMS}; left out: world, "
                         "for tiny-bart world-headlines")
    data_dir: str = flag("", "read the data set from here; left out: it is downloaded, but for "
                             "summarising, whose files you have to fetch")
    source_key: str = flag("source", "of your own data: the key or the column of the source")
    target_key: str = flag("target", "and of the target")
    examples: int = flag(0, "learn from this many sources, drawn by the seed; 0: from all",
                         within=(0, 10 ** 9))
    max_source: int = flag(None, "BART's sources are cut to this many tokens; left out: 512",
                           kind=int, within=(3, 100_000))
    max_target: int = flag(None, "BART's targets are cut to this many tokens; left out: 60",
                           kind=int, within=(3, 100_000))
    method: str = flag("prefix", "what learns", choices=list(paper.TRAINING),
                       group="what learns: --prefix-len 20 --mid-dim 0")
    prefix_len: int = flag(None, "P, keys and values in front of every layer", kind=int,
                           within=(1, 10_000))
    prefix_layers: str = flag("", "FIRST-LAST: a prefix in these upper layers only, numbered from "
                                  "0; left out: in all")
    prefixes: str = flag("", "BART's places and, after =, their lengths where it is not "
                             "--prefix-len: encoder,decoder,cross=20; left out: all three")
    mid_dim: int = flag(None, "hidden width of the prefix's MLP; 0: no MLP; left "
                              "out: 512, for summarising 800", kind=int, within=(0, 10_000))
    init: str = flag("random", "start from N(0, 1), from U(0, 1), or from the keys and values of "
                               "real words", choices=["random", "uniform", "words"])
    init_text: str = flag("table-to-text:", "the words of --init words; P is their length")
    start_from: str = flag("", "start from the prefix of this run, of train.py or of PEFT's: "
                               "exactly with --mid-dim 0, else an MLP is fitted to it")
    lr: float = flag(None, "highest learning rate", kind=float, within=(1e-12, 1e30),
                     alias="learning-rate", group="optimiser: --lr 1e-3 --steps 100")
    epochs: int = flag(None, "times that every pair is seen", kind=int, within=(1, 10 ** 9))
    steps: int = flag(None, "steps of the optimiser, in place of epochs", kind=int,
                      within=(1, 10 ** 9))
    warmup: int = flag(0, "steps of linear lr warmup; then linear decay to 0",
                       within=(0, 10 ** 9), alias="warmup-steps")
    batch_size: int = flag(None, "pairs in a batch", kind=int, within=(1, 100_000))
    accumulate: int = flag(1, "batches whose gradients are summed in a step: a larger batch in "
                              "the memory of one", within=(1, 100_000),
                           alias="gradient-accumulation-steps")
    clip: float = flag(1.0, "largest gradient norm (gradient clipping)", within=(1e-12, 1e30),
                       alias="max-grad-norm")
    weight_decay: float = flag(0.0, "AdamW's, on what learns", within=(0, 100))
    seed: int = flag(101, "of the prefix, the order of the data and the choice of examples",
                     within=(0, 10 ** 12))
    dev_every: int = flag(0, "steps between two evaluations on the dev set; 0: a tenth of the run",
                          within=(0, 10 ** 9), group="dev set: --dev-pairs 100")
    dev_pairs: int = flag(500, "pairs of the dev set, a fixed sample; 0: all", within=(0, 10 ** 9))
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one",
                       group="device and speed: --device cpu --fast")
    dtype: str = flag("auto", "of the frozen weights, the prefix is fp32; auto: bf16 on a GPU that "
                              "has it, else fp32; fp16: with a loss scale, for a GPU without bf16",
                      choices=["auto", "fp32", "bf16", "fp16", "fp64"])
    fast: bool = flag(False, "the forms of fast/ that help on this device; loss and "
                             "gradients stay the same")
    attention: str = flag("explicit", "sdpa: PyTorch's; fused: one kernel that reads the prefix "
                                      "without copying it, for a CUDA GPU with triton",
                          choices=["explicit", "sdpa", "fused"])
    compile: bool = flag(False, "compile the step, once for each of a few shapes; needs a C++ "
                                "compiler, on a GPU triton too, and minutes at the start")
    gradient_checkpointing: bool = flag(False, "recompute each block in the backward pass: "
                                               "less memory, more time")
    share_source: int = flag(0, "up to this many targets of a source meet in a batch; the "
                                "source is computed once; 0: pairs meet at random",
                             within=(0, 10_000))
    out: str = flag("", "directory of the run; left out: out/MODEL-DATA",
                    group="run: --resume out/tiny-gpt2-world")
    resume: str = flag("", "directory of a run to continue; its own settings are used")
    stop_at: int = flag(0, "stop after this step as Ctrl-C would, to be resumed; 0: at the end",
                        within=(0, 10 ** 9))

    given = frozenset()         # no flag: which of them the command line has, where there is one


def resolve(args):
    """The settings of a new run with everything that was left out filled in."""
    if args.start_from and "model" not in args.given:
        args = copy.copy(args)
        args.model = run_directory.run_settings(args.start_from)["model"]
    return paper.resolve_training(args)


# ---- what learns, and from what

def make_learner(settings, model, start=None):
    """What learns, by --method: a fresh prefix, or weights of the model itself."""
    torch.manual_seed(settings.seed)
    if settings.method != "prefix":
        finetune = optional_module("baselines.finetune", f"--method {settings.method}")
        return finetune.FineTune(model, top=2 if settings.method == "finetune-top2" else None)
    prefix = new_prefix(model, settings.prefix_len, settings.mid_dim, settings.init,
                        settings.prefixes, settings.prefix_layers)
    if start is not None:
        error = prefix.initialize(start)
        print(f"prefix started from {settings.start_from or repr(settings.init_text)}, length "
              f"{settings.prefix_len}; mean squared error left: {error:.4f}")
    return prefix


def find_forms(settings):
    """The module fast.forms where a flag asks for something of fast/, else None."""
    if not (settings.fast or settings.compile or settings.gradient_checkpointing
            or settings.share_source or settings.attention != "explicit"):
        return None
    forms = optional_module("fast.forms", "--fast, --attention, --compile or the like")
    forms.refuse_clashes(settings)
    return forms


def plain_forms(settings, model, dev, batch_size):
    """(loss, collate, dev batches) as the paper has them; fast.forms has others."""
    return target_loss, pairs_of(model).collate, dev_batches(dev, batch_size, model)


# ---- the loop

class Trainer:
    """Everything that changes while learning, and what a step of it does.

    pairs: the pairs to learn from. dev: the Batches of the dev set. loss, collate: see
    `plain_forms`. data: a name of exactly these pairs, which a resumed run compares.
    """
    with_state = "learner", "optimizer", "scaler"

    def __init__(self, settings, model, learner, pairs, dev, loss=target_loss, collate=None,
                 data=""):
        self.settings, self.model, self.learner = settings, model, learner
        self.pairs, self.dev, self.data = pairs, dev, data
        self.loss, self.collate = loss, collate or pairs_of(model).collate
        # Only what learns is handed over: the optimiser could not touch a frozen weight.
        self.optimizer = torch.optim.AdamW(learner.parameters(), lr=settings.lr, betas=(0.9, 0.999),
                                           eps=1e-8, weight_decay=settings.weight_decay)
        half = model.dtype == torch.float16     # gradients below 6e-8 would be lost, so the loss is
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)     # scaled up
        self.step, self.best_loss, self.first_loss = 0, math.inf, None      # steps done; dev losses

    def learning_rate(self):
        """Linear warmup for --warmup steps, then linear decay to 0 after the last step."""
        s = self.settings
        if self.step < s.warmup:
            return s.lr * (self.step + 1) / s.warmup
        return s.lr * (s.steps - self.step) / max(1, s.steps - s.warmup)

    def train_step(self, pairs):
        """One step: the paper's equation 2 on these pairs, in --accumulate parts. Returns the
        summed loss, a tensor.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        n = len(pairs) if self.learner.loss_per == "pair" else count_labels(pairs)
        total, size = 0, math.ceil(len(pairs) / self.settings.accumulate)
        for i in range(0, len(pairs), size):
            batch = self.collate(pairs[i:i + size], self.model).to(self.model.device)
            prefix = self.learner().to(self.model.dtype)    # the MLP, once for the whole batch
            loss = self.loss(self.model, prefix, batch)
            self.scaler.scale(loss / n).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return total

    @torch.no_grad()
    def dev_loss(self, prefix=None, n=None):
        """-log p of a target token, averaged over the dev set, or over n batches of it."""
        loss = self.loss if prefix is None else target_loss     # compiled for one prefix length
        prefix = (self.learner.fold() if prefix is None else prefix).to(self.model.dtype)
        losses = [loss(self.model, prefix, batch.to(self.model.device)) for batch in self.dev[:n]]
        return sum(torch.stack(losses).tolist()) / sum(batch.n_labels for batch in self.dev[:n])

    def evaluate(self):
        """The dev loss now. Saves what learns, if it is the best so far, and the whole state.

        Differs from the paper: its official code stores the last prefix, not the best.
        """
        loss = self.dev_loss()
        self.check_finite(loss)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.log(dev_loss=loss)
        if loss < self.best_loss:
            self.best_loss = loss
            run_directory.save_learned(self.settings.out, self.learner, self.model)
        self.save()
        return loss

    def check_finite(self, loss):
        if not math.isfinite(loss):
            advice = "look at the model's weights" if self.first_loss is None else (
                f"the last good {self.settings.method} is saved in {self.settings.out}; start "
                "again with a lower --lr")
            raise ValueError(f"got a loss of {loss} at step {self.step}, expected a finite number; "
                             f"{advice}")

    def log(self, **values):
        run_directory.append_log(self.settings.out, step=self.step, **values)

    def save(self):
        run_directory.save_state(self.settings, {
            "fingerprint": self.model.fingerprint, "data": self.data, "step": self.step,
            "best": self.best_loss, "first": self.first_loss,
            **{name: getattr(self, name).state_dict() for name in self.with_state}})

    def restore(self):
        """Go back to the last saved step."""
        state = run_directory.load_state(self.settings, self.model.fingerprint, self.data)
        for name in self.with_state:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.best_loss, self.first_loss = state["step"], state["best"], state["first"]


def train(trainer):
    """All steps, up to --steps. Returns what stopped it before: a signal, or 0 for --stop-at."""
    s, pairs, epoch = trainer.settings, trainer.pairs, None
    size = s.batch_size * s.accumulate
    per_epoch = math.ceil(len(pairs) / size)
    dev_every = s.dev_every or max(1, s.steps // 10)
    loss, n_labels, n_tokens, clock = 0.0, 0, 0, time.perf_counter()
    bar = progress(total=s.steps, initial=trainer.step)
    with stop_after_this_step() as signals, bar:
        dev_loss = trainer.evaluate() if trainer.first_loss is None else trainer.best_loss
        while trainer.step < s.steps:
            if signals or 0 < s.stop_at <= trainer.step:
                trainer.check_finite(trainer.dev_loss(n=1))        # never save a NaN state
                trainer.save()
                return signals[0] if signals else 0
            if epoch != trainer.step // per_epoch:
                epoch = trainer.step // per_epoch
                batches = epoch_batches(pairs, size, s.seed, epoch, s.share_source)
            batch_pairs = [pairs[i] for i in batches[trainer.step % per_epoch]]
            loss += trainer.train_step(batch_pairs)
            n_labels += count_labels(batch_pairs)
            n_tokens += sum(len(pair.ids) for pair in batch_pairs)
            bar.update()
            last = trainer.step == s.steps
            if trainer.step % 10 == 0 or last:
                mean, rate = float(loss) / n_labels, n_tokens / (time.perf_counter() - clock)
                trainer.check_finite(mean)
                trainer.log(loss=mean, tokens_per_second=round(rate))
                bar.set_postfix_str(f"loss {mean:.3f}, dev {dev_loss:.3f}, {rate:.0f} tokens/s",
                                    refresh=False)
                loss, n_labels, n_tokens, clock = 0.0, 0, 0, time.perf_counter()
            if trainer.step % dev_every == 0 or last:
                before = time.perf_counter()
                dev_loss = trainer.evaluate()
                clock += time.perf_counter() - before   # the dev set's time is not training time
    return None


def show(trainer, tokenizer, pair):
    """One source of the dev set, and what is generated for it before and after training."""
    s, model = trainer.settings, trainer.model
    prompt, source = pair.ids[:pair.start], tokenizer.text_of(pair.ids[:pair.start])
    constraints = constraints_of(model, tokenizer, paper.banned_after(s.data))
    print(f"\n{labelled('source', source)}")
    outputs = {"no prefix": (model, None)} if s.method == "prefix" else {}
    outputs[s.method] = run_directory.load_learned(s.out, model)
    for name, (model, prefix) in outputs.items():
        ids, = generate(model, [prompt], constraints, prefix)
        print(labelled(name, tokenizer.text_of(ids)))
    print(labelled("reference", tokenizer.text_of(pair.ids[pair.start:])))
    print(f"\ndecode with: {command('sample.py', '--run', s.out, text=source)}")


def main(argv=None):
    args = parse(Settings, argv, "Train a prefix for a frozen language model.",
                 notes=paper.training_notes())
    settings = run_directory.resumed_settings(args) if args.resume else resolve(args)
    forms, examples = find_forms(settings), load_examples(settings)
    model, tokenizer = load_model(settings.model, settings.device, settings.dtype)
    settings = settings_for(model, settings)
    if forms:
        forms.set_attention(settings.attention, model)
    start = None if settings.resume else run_directory.starting_point(settings, model, tokenizer)
    if start is not None:
        settings = dataclasses.replace(settings, **flags_of(start, model, settings))
    pairs, dev = encode_examples(*examples, settings, model, tokenizer)
    del examples                    # as text they take several times the memory of their tokens
    learner = make_learner(settings, model, start)
    size = settings.batch_size * settings.accumulate
    steps = settings.steps or settings.epochs * math.ceil(len(pairs) / size)
    settings = dataclasses.replace(settings, steps=steps, dtype=name_of_dtype(model.dtype))
    summary = summarize_parameters(learner, model)
    make_forms = forms.training_forms if forms else plain_forms
    loss, collate, batches = make_forms(settings, model, dev, max(16, settings.batch_size))
    if not settings.resume:
        settings = run_directory.create(settings, summary, model)
    print(f"{settings.model}: {summary}\n{settings.data}: {len(pairs):,} pairs to learn from, "
          f"{len(dev):,} dev pairs; {steps:,} steps of {size} -> {settings.out}")
    trainer = Trainer(settings, model, learner, pairs, batches, loss, collate,
                      digest(pairs, dev))
    if settings.resume:
        trainer.restore()
    began = time.perf_counter()
    stopped = train(trainer)
    if stopped is not None:
        print(f"stopped after step {trainer.step}; go on with: "
              f"{command('train.py', '--resume', settings.out)}")
        return stopped and 128 + stopped        # the exit status, 0 after --stop-at
    seconds = time.perf_counter() - began
    if settings.method == "prefix":
        print("lower is better; the frozen model without a prefix has "
              f"{trainer.dev_loss(model.empty_prefix()):.3f}")
    print(f"dev loss {trainer.first_loss:.3f} -> {trainer.best_loss:.3f} per target token, "
          f"{seconds:.0f} s")
    show(trainer, tokenizer, dev[0])


if __name__ == "__main__":
    run_program(main, "--batch-size smaller by --accumulate, --gradient-checkpointing, --fast")
