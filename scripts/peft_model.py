"""What bench.py compares with: peft and transformers, with the same weights and the same prefix.

Weights are random: speed does not depend on what a model has learned, so nothing is downloaded.
Letters as in model.py.
"""
import dataclasses

import torch

from prefix import flatten
from pretrained.architectures import architecture


def random_model(size, device, dtype):
    """A frozen GPT-2 or Llama as it is initialised before its training, with biases that count.

    size: the name of its architecture, and its config.
    """
    torch.manual_seed(0)
    name, config = size
    model = architecture(name).model(config)
    for name, x in model.named_parameters():
        if "ln_" not in name and "norm" not in name:
            torch.nn.init.normal_(x, std=0.02)
    return model.to(device, dtype).eval().requires_grad_(False)


def peft_model(model, prefix, attention):
    """The same weights and the same prefix (L, 2, 1, H, P, D) in transformers and peft."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise ValueError(f"got no package {error.name}; expected it, to compare with; `pip install "
                         "-r requirements-optional.txt`") from error
    config = transformers.CONFIG_MAPPING[model.architecture](
        **dataclasses.asdict(model.config), bos_token_id=0, eos_token_id=0, pad_token_id=0,
        attn_implementation=attention)
    with torch.device(model.device):            # a GPU draws weights faster, to be replaced
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    about = architecture(model.architecture)
    state = {about.root + name: x.T if name.endswith(about.transposed) else x
             for name, x in model.state_dict().items()}
    theirs.load_state_dict(state | {"lm_head.weight": model.word_embedding.weight})
    theirs = peft.get_peft_model(theirs.to(model.dtype), peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=prefix.size(4)))
    theirs.prompt_encoder.default.embedding.weight.data.copy_(flatten(prefix))
    # In bf16 on a CPU its head takes a slow path for the last position of a longer tensor. Without
    # this repair we would look several times faster than we are.
    theirs.get_base_model().lm_head.register_forward_pre_hook(lambda m, x: (x[0].contiguous(),))
    return theirs.eval().requires_grad_(False)
