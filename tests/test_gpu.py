"""What a GPU would refuse or wait for, found without one (fake_gpu.py): no tensor is left on the
CPU, and Python waits as seldom as it can. That a GPU's own kernels compute the same can be shown on
a GPU only: scripts/gpu_check.sh.
"""
import pytest
import torch
from conftest import random_bart, random_gpt2, random_llama, shared_pairs, some_prefix, some_trainer
from fake_gpu import GPU, fake_gpu

from data.pairs import dev_batches
from decoding.beam import beam_search
from decoding.constraints import Constraints
from decoding.state import DecodingState
from sample import generate, sample_token

MODELS = {"gpt2": random_gpt2, "bart": random_bart, "llama": random_llama}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], [6, 2, 6, 4]]
EOS, TOKENS = 256, 12


@pytest.fixture(params=MODELS)
def new_model(request):
    """A function that makes the same small model again and again, in fp32."""
    if request.param != "gpt2":
        pytest.importorskip(f"{request.param}.model",
                            reason=f"the folder {request.param}/ is not here")

    def make():
        model = MODELS[request.param]().float()
        model.head_weight.data[EOS] *= 2                    # so texts end now and then
        return model
    return make


def test_the_fake_gpu_counts_and_refuses():
    """Would catch: a count of nothing, a mixture that passes."""
    with fake_gpu() as gpu:
        x = torch.arange(4.0).to(GPU, non_blocking=True)
        y = x + 1 + torch.tensor(2.0)                   # a number of no dimension may be anywhere
        y[1:] = x.masked_fill(x > 1, 0).topk(3).values
        assert gpu.syncs == [] and y.device == GPU
        for wait in (x[0].item, x.any().__bool__, x.nonzero, lambda: x[x > 1], x.tolist, x.cpu,
                     lambda: x[[0, 1]], lambda: x[torch.tensor([0])], lambda: x.equal(y),
                     lambda: torch.tensor([1], device=GPU), lambda: torch.ones(4).to(GPU)):
            gpu.syncs.clear()
            wait()
            assert len(gpu.syncs) == 1
        for mixed in (lambda: x + torch.ones(4), lambda: torch.cat((x, torch.ones(4)))):
            with pytest.raises(RuntimeError, match="on the CPU and on the GPU"):
                mixed()


# ---- learning

def plain(model):
    return {}


def checkpointed(model):
    from fast.checkpointing import checkpoint_blocks
    checkpoint_blocks(model)
    return {}


def shared(model):
    from fast import tries
    return {"collate": tries.collate, "dev": tries.dev_batches(shared_pairs(), 8, model)}


def fast(model):
    from fast.frozen_head import frozen_target_loss
    return {"loss": frozen_target_loss}


def sdpa(model):
    from fast.sdpa_attention import SDPAAttention
    model.attention = SDPAAttention()
    return {}


def trainer_of(model, form):
    if form is not plain:
        pytest.importorskip("fast.forms", reason="the folder fast/ is not here")
    return some_trainer(model, **{"dev": dev_batches(shared_pairs(), 8, model)} | form(model))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("form", [plain, fast, shared, pytest.param(checkpointed, marks=SLOW),
                                  pytest.param(sdpa, marks=SLOW)])
def test_a_step_waits_for_no_gpu(new_model, form):
    """Forward, backward, clip and AdamW: 0 times; a dev set: once. Would catch: a tensor that is
    made on the CPU, an .item(), a mask as an index, an optimiser that reads its step.
    """
    pairs = shared_pairs()

    def learn(trainer):
        return [trainer.train_step(pairs[i:i + 4]) for i in (0, 4)]
    trainer = trainer_of(new_model(), form)
    wanted = [*map(float, learn(trainer)), trainer.dev_loss()]
    with fake_gpu() as gpu:
        trainer = trainer_of(new_model().to(GPU), form)
        gpu.syncs.clear()
        losses = learn(trainer)
        assert gpu.syncs == []
        dev_loss = trainer.dev_loss()
        assert len(gpu.syncs) == 1
        losses = [*map(float, losses), dev_loss]
    assert losses == pytest.approx(wanted, rel=1e-5)        # fp32; strides differ, and so sums


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_pytorch_sees_no_wait_in_a_step_on_a_real_gpu(new_model):
    """Would catch: a wait inside an operation, which the count above does not know."""
    trainer, pairs = trainer_of(new_model().to("cuda"), plain), shared_pairs()
    trainer.train_step(pairs[:4])
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(pairs[4:8])
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- decoding

def greedy(model, prefix, rules):
    return generate(model, PROMPTS, rules, prefix)


def sampled(model, prefix, rules):
    torch.manual_seed(5)
    return generate(model, PROMPTS, rules, prefix, lambda logits: sample_token(logits, 1.0, 9, 0.9))


def by_beams(model, prefix, rules):
    state = DecodingState(model, PROMPTS, prefix, rules.max_new_tokens, 3)
    return [row for row, _ in beam_search(state, rules, 3)]


def recorded(model, prefix, rules):
    cuda_graph = pytest.importorskip("fast.cuda_graph", reason="the folder fast/ is not here")
    return cuda_graph.RecordedGenerate(None)(model, PROMPTS, rules, prefix, sample_token)


@pytest.mark.parametrize("decode, waits, many", [
    (greedy, 1 + TOKENS // 8, True),    # now and then to see whether all have ended; the texts
    pytest.param(sampled, 1 + TOKENS // 8, False, marks=SLOW),
    pytest.param(recorded, 1 + TOKENS // 4, False, marks=SLOW),
    (by_beams, TOKENS, True),           # a token: Python chooses among the best
    pytest.param(by_beams, TOKENS, False, marks=SLOW)])
def test_decoding_waits_seldom(new_model, decode, waits, many):
    """Would catch: a question to the GPU at every token, a list as an index, masks and prompts that
    are made on the CPU; and texts that change because nobody looks.
    """
    rules, model = Constraints(EOS, TOKENS, 2, (5, 9)), new_model()
    prefixes = [some_prefix(model, length).fold() for length in (5, 1, 11, 4)]
    wanted = decode(model, prefixes if many else prefixes[0], rules)
    with fake_gpu() as gpu:
        model, prefixes = new_model().to(GPU), [prefix.to(GPU) for prefix in prefixes]
        gpu.syncs.clear()
        assert decode(model, prefixes if many else prefixes[0], rules) == wanted
        assert len(gpu.syncs) <= waits
    assert len(max(wanted, key=len)) > 8
