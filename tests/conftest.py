"""What the tests share: small random models, a tokenizer that knows bytes only, real data."""
import base64
import collections
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                # results that do not depend on how many cores there are
if not torch.cuda.is_available():       # Triton's kernels then run as Python on a CPU, slowly:
    os.environ["TRITON_INTERPRET"] = "1"                # read once, when triton is imported

from data.batches import Pair  # noqa: E402
from data.pairs import pairs_of  # noqa: E402
from model import GPT2, GPT2Config  # noqa: E402
from prefix import target_loss  # noqa: E402
from pretrained.architectures import new_prefix  # noqa: E402
from pretrained.checkpoint import save  # noqa: E402

# Where a room has been deleted, its tests are not collected.
ROOMS = ("baselines", "bart", "llama", "fast", "scripts")
collect_ignore_glob = [f"{room}/*" for room in ROOMS if not (ROOT / room).exists()]


def pytest_collection_modifyitems(items):
    """The proof comes first."""
    items.sort(key=lambda item: item.path.name != "test_only_the_prefix_learns.py")


def pytest_terminal_summary(terminalreporter):
    """Why tests were skipped: a line for each reason, with how many."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else
        str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if reasons:
        terminalreporter.section("skipped")
    for reason, n in reasons.most_common():
        terminalreporter.line(f"{n:4}  {reason}")


def random_gpt2(vocab_size=257, n_positions=64, n_embd=24, n_layer=3, n_head=4, seed=0):
    """A frozen GPT-2 in float64, its weights and biases far from their initial values."""
    torch.manual_seed(seed)
    model = GPT2(GPT2Config(vocab_size, n_positions, n_embd, n_layer, n_head)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.fingerprint = f"random {seed}"
    return model.requires_grad_(False).eval()


def random_bart(vocab_size=262, d_model=24, encoder_layers=2, decoder_layers=3, seed=0,
                positions=64):
    """A frozen BART in float64, alike; its encoder and decoder differ in all their sizes."""
    from bart.model import BART, BARTConfig
    torch.manual_seed(seed)
    model = BART(BARTConfig(vocab_size, positions, d_model, encoder_layers, decoder_layers,
                            encoder_attention_heads=2, decoder_attention_heads=4,
                            encoder_ffn_dim=20, decoder_ffn_dim=28)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    model.fingerprint = f"random BART {seed}"
    return model.requires_grad_(False).eval()


def random_llama(vocab_size=257, n_layer=3, heads=6, kv_heads=2, head_dim=4, width=20, seed=0):
    """A frozen Llama in float64, alike; H * D is not C, 3 query heads share a key-value head."""
    from llama.model import Llama, LlamaConfig
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size, 64, width, 28, n_layer, heads, kv_heads, head_dim)
    model = Llama(config).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.fingerprint = f"random Llama {seed}"
    return model.requires_grad_(False).eval()


def shared_pairs():
    """14 pairs of 5 sources, mixed; one source begins as another does, two have one target only."""
    torch.manual_seed(4)
    counts = {(5, 6, 7): 6, (5, 6): 3, (9, 8, 7, 6, 5): 3, (11,): 1, (12, 13): 1}
    pairs = [Pair([*source, *torch.randint(257, (1 + i % 5,)).tolist()], len(source))
             for source, n in counts.items() for i in range(n)]
    return [pairs[i] for i in torch.randperm(len(pairs)).tolist()]


def some_pairs(n=12):
    """Sources of 3 to 6 tokens and targets of 2 to 6, all different."""
    torch.manual_seed(2)
    lengths = [(3 + i % 4, 2 + i % 5) for i in range(n)]
    return [Pair(torch.randint(257, (s + t,)).tolist(), s) for s, t in lengths]


def batch_of(model, pairs):
    """The plain Batch of some pairs, on the model's device."""
    return pairs_of(model).collate(pairs, model).to(model.device)


def loss_and_gradients(model, learner, batch, loss=target_loss):
    """The loss, and the gradients of everything that learns."""
    theta = list(learner.parameters())
    value = loss(model, learner(), batch)
    return [value.detach(), *torch.autograd.grad(value, theta)]


def some_prefix(model, length=5, mid_dim=16):
    """A fresh prefix, or three of a BART, in the model's dtype."""
    torch.manual_seed(3)
    return new_prefix(model, length, mid_dim).to(model.dtype)


def some_trainer(model, mid_dim=16, pairs=(), dev=(), loss=target_loss, collate=None, **settings):
    """A Trainer of a fresh prefix of length 5, or of three of a BART."""
    from train import Settings, Trainer
    settings = Settings(**{"lr": 1e-2, "steps": 10, "batch_size": 4, "out": "unused"} | settings)
    return Trainer(settings, model, some_prefix(model, 5, mid_dim), list(pairs), list(dev), loss,
                   collate)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """The servers of the tests are on this very machine, whatever stands between it and others."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def model():
    return random_gpt2()


@pytest.fixture
def bart():
    return random_bart()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A model on disk as pretrained.convert writes it, fp32, with a tokenizer of the 256 bytes."""
    directory = tmp_path_factory.mktemp("weights") / "bytes"
    directory.mkdir()
    lines = [base64.b64encode(bytes([b])).decode() + f" {b}\n" for b in range(256)]
    (directory / "tokenizer.tiktoken").write_text("".join(lines))
    save(random_gpt2().float(), directory)
    return directory


@pytest.fixture(scope="session")
def bart_directory(tmp_path_factory, model_directory):
    """A BART on disk in fp32, whose words are the 256 bytes, numbered backwards by a dict.txt."""
    directory = tmp_path_factory.mktemp("weights") / "bart"
    directory.mkdir()
    (directory / "tokenizer.tiktoken").write_bytes(
        (model_directory / "tokenizer.tiktoken").read_bytes())
    (directory / "dict.txt").write_text("".join(f"{256 - n} 1\n" for n in range(257)))
    save(random_bart().float(), directory)
    return directory


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real data sets, as --data-dir takes it."""
    folder = os.environ.get("PREFIX_TUNING_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set PREFIX_TUNING_DATA to a folder with e2e/, webnlg/ and dart/ to run this")
    return Path(folder)


@pytest.fixture
def bytes_tokenizer():
    """A byte-level tokenizer.json of the package tokenizers: three special tokens, then bytes."""
    tokenizers = pytest.importorskip("tokenizers", reason="it reads tokenizer.json: pip install "
                                                          "tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<|im_end|>", *letters]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={word: n for n, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:3])
    return tokenizer
