"""Whom bench.py runs against: peft and transformers, with the same weights and the same prefix.

Weights are random: speed does not depend on what a model has learned, so nothing is downloaded.
Called by bench.py and bench_train.py. Letters as in model.py.
"""
import torch

from model import GPT2


def random_model(config, device, dtype):
    """A frozen GPT-2 as it is initialised before its training, with biases that count."""
    torch.manual_seed(0)
    model = GPT2(config)
    for name, x in model.named_parameters():
        if "ln_" not in name:
            torch.nn.init.normal_(x, std=0.02)
    return model.to(device, dtype).eval().requires_grad_(False)


def peft_model(ours, prefix, attention):
    """The same weights and the same prefix (L, 2, 1, H, P, D) in transformers and peft."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise ValueError(f"got no package {error.name}; expected it, to compare with; `pip install "
                         "-r requirements-optional.txt`") from error
    c, like = ours.config, ours.wte.weight
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        attn_implementation=attention)
    with torch.device(like.device):             # a GPU draws weights faster, to be replaced
        theirs = transformers.GPT2LMHeadModel(config)
    state = {f"transformer.{name}": x.T if name.endswith(GPT2.checkpoint_transposed) else x
             for name, x in ours.state_dict().items()}
    theirs.load_state_dict(state | {"lm_head.weight": like})
    theirs = peft.get_peft_model(theirs.to(like), peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=prefix.size(4)))
    flat = prefix.squeeze(2).permute(3, 0, 1, 2, 4).flatten(1)                  # (P, 2LC)
    theirs.prompt_encoder.default.embedding.weight.data.copy_(flat)
    # In bf16 on a CPU its head takes a slow path for the last position of a longer tensor. Without
    # this repair we would look several times faster than we are.
    theirs.get_base_model().lm_head.register_forward_pre_hook(lambda m, x: (x[0].contiguous(),))
    return theirs.eval().requires_grad_(False)
