"""What the tests share: small random models, a tokenizer that knows bytes only, real data."""
import base64
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                # results that do not depend on how many cores there are
if not torch.cuda.is_available():       # fused.py then runs as Python on a CPU, slowly: Triton
    os.environ["TRITON_INTERPRET"] = "1"                # looks at this once, when it is imported.

from checkpoint import save  # noqa: E402
from data.sequence import Pair  # noqa: E402
from loss import target_nats  # noqa: E402
from model import BART, GPT2, BARTConfig, GPT2Config  # noqa: E402
from prefix import Prefix  # noqa: E402

# Where a side door has been deleted, its tests are not looked at.
SIDE_DOORS = ("baselines", "bench", "bench_train", "claims", "convert", "denoise", "evaluate",
              "fused", "graphs", "packed", "peft_format", "pretrain", "step")
collect_ignore = [f"test_{name}.py" for name in SIDE_DOORS if not (ROOT / f"{name}.py").exists()]


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
    torch.manual_seed(seed)
    model = BART(BARTConfig(vocab_size, positions, d_model, encoder_layers, decoder_layers,
                            encoder_attention_heads=2, decoder_attention_heads=4,
                            encoder_ffn_dim=20, decoder_ffn_dim=28)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    model.fingerprint = f"random BART {seed}"
    return model.requires_grad_(False).eval()


def shared_pairs():
    """14 pairs of 5 sources, mixed; one source begins as another does, two have one target only."""
    torch.manual_seed(4)
    counts = {(5, 6, 7): 6, (5, 6): 3, (9, 8, 7, 6, 5): 3, (11,): 1, (12, 13): 1}
    pairs = [Pair([*source, *torch.randint(257, (1 + i % 5,)).tolist()], len(source))
             for source, n in counts.items() for i in range(n)]
    return [pairs[i] for i in torch.randperm(len(pairs)).tolist()]


def gradients(model, learner, batch, nats=target_nats):
    """The loss, and the gradients of everything that learns."""
    theta = list(learner.parameters())
    loss = nats(model, learner(), batch)
    return [loss.detach(), *torch.autograd.grad(loss, theta)]


def some_learner(model, mid_dim=16):
    torch.manual_seed(3)
    return Prefix(model.config, 5, mid_dim).to(model.wte.weight)


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
    """A model on disk as convert.py writes it, in fp32, with a tokenizer of the 256 bytes."""
    directory = tmp_path_factory.mktemp("weights") / "bytes"
    save(random_gpt2().float(), directory)
    lines = [base64.b64encode(bytes([b])).decode() + f" {b}\n" for b in range(256)]
    (directory / "tokenizer.tiktoken").write_text("".join(lines))
    return directory


@pytest.fixture(scope="session")
def bart_directory(tmp_path_factory, model_directory):
    """A BART on disk in fp32, whose words are the 256 bytes, numbered backwards by a dict.txt."""
    directory = tmp_path_factory.mktemp("weights") / "bart"
    save(random_bart().float(), directory)
    (directory / "tokenizer.tiktoken").write_bytes(
        (model_directory / "tokenizer.tiktoken").read_bytes())
    (directory / "dict.txt").write_text("".join(f"{256 - n} 1\n" for n in range(257)))
    return directory


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real data sets, as --data-dir takes it."""
    folder = os.environ.get("PREFIX_TUNING_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set PREFIX_TUNING_DATA to a folder with e2e/, webnlg/ and dart/ to run this")
    return Path(folder)
