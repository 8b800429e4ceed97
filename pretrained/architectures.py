"""The models by the name that config.json gives them: the one place that knows them all.

For each: its config, its class, the class of its prefix, and how a Hugging Face checkpoint of it
differs from our state dict. A model is imported when it is needed: a run of GPT-2 never loads
bart/. Another model is another function and another line in ARCHITECTURES.
"""
import dataclasses
import typing

from model import GPT2, GPT2Config
from prefix import Prefix, tensors_of


class Architecture(typing.NamedTuple):
    config: type                    # of a dataclass
    model: type
    prefix: type
    # Of a Hugging Face checkpoint, by the ends of its names:
    root: str                       # what may stand in front of every name
    transposed: tuple               # weights that are (in, out) there; nn.Linear has (out, in)
    ignored: tuple                  # buffers that are no weights
    tied: dict                      # a second name of a tensor -> its name here
    zero: tuple                     # what a checkpoint may leave out: it is 0 then
    # Options of config.json that change the function: another value than this is refused. A missing
    # one has this value; of several names of one function the first is the usual one.
    fixed_options: dict
    vocabularies: tuple             # files that have the tokens, one is enough
    fill_config: typing.Callable = dict     # from their config.json to one with all our fields


GELU = ("gelu", "gelu_python")
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
SILU = ("silu", "swish")


def gpt2_config(theirs):
    """A GPT-2's config.json; an `n_inner` of 4 times the width, the only one here, becomes None."""
    usual = type(theirs.get("n_embd")) is int and theirs.get("n_inner") == 4 * theirs["n_embd"]
    return theirs | {"n_inner": None} if usual else theirs


def gpt2():
    return Architecture(
        GPT2Config, GPT2, Prefix, "transformer.",
        ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
        ("attn.bias", "attn.masked_bias"), {"lm_head.weight": "wte.weight"}, (),
        {"activation_function": GELU_TANH, "scale_attn_weights": True, "n_inner": None,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        ("tokenizer.json", "vocab.json"), gpt2_config)


def bart_config(theirs):
    """A BART's config.json; uploads before October 2020 have no decoder_start_token_id."""
    return {"decoder_start_token_id": 2} | theirs


def bart():
    from bart.model import BART, BARTConfig
    from bart.prefix import BARTPrefix
    tied = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
                          "lm_head.weight"), "shared.weight")
    return Architecture(
        BARTConfig, BART, BARTPrefix, "model.", (), ("encoder.version", "decoder.version"), tied,
        ("final_logits_bias",),
        {"activation_function": GELU, "scale_embedding": False, "normalize_before": False,
         "add_final_layer_norm": False, "normalize_embedding": True, "add_bias_logits": False,
         "static_position_embeddings": False, "extra_pos_embeddings": 2,
         "is_encoder_decoder": True, "tie_word_embeddings": True},
        ("vocab.json", "dict.txt", "tokenizer.json"), bart_config)


def llama_config(theirs):
    """A Llama's config.json, of an old or a new upload, with what it may leave out filled in."""
    rope, scaling = (value if isinstance(value, dict) else {"rope_type": value} for value in
                     (theirs.get("rope_parameters"), theirs.get("rope_scaling")))
    heads, width = theirs.get("num_attention_heads"), theirs.get("hidden_size")
    filled = {"rope_theta": rope.get("rope_theta", 10000.0), "num_key_value_heads": heads,
              "tie_word_embeddings": False, "max_position_embeddings": 2048,
              "rope_type": rope.get("rope_type") or scaling.get("rope_type", scaling.get("type"))}
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        filled["head_dim"] = width // heads
    return filled | {name: value for name, value in theirs.items() if value is not None}


def llama():
    from llama.model import Llama, LlamaConfig
    return Architecture(
        LlamaConfig, Llama, Prefix, "model.", (), ("rotary_emb.inv_freq",),
        {"lm_head.weight": "embed_tokens.weight"}, (),
        {"hidden_act": SILU, "attention_bias": False, "mlp_bias": False, "rope_type": "default",
         "sliding_window": None, "use_qk_norm": False},
        ("tokenizer.json",), llama_config)


ARCHITECTURES = {"gpt2": gpt2, "bart": bart, "llama": llama}


def architecture(name):
    """The `Architecture` of that name. Raises ValueError for one that is not here."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"got model_type {name!r}; expected one of {', '.join(ARCHITECTURES)}; "
                         "choose a checkpoint of these")
    try:
        return ARCHITECTURES[name]()
    except ImportError as error:            # its folder was deleted
        raise ValueError(f"got model_type {name!r}, but there is no {error.name} here; expected "
                         "the folder of that model; restore it") from error


def check_config(config, path):
    """Raise ValueError unless each number of a model's `config`, read from the file `path`, is of
    its type and of a size that a model may have. Even without weights every layer takes memory, so
    a wrong number could fill it.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name
        token = name.endswith("_token_id")                          # 0 is one, too
        low, high = {bool: (False, True), float: (1e-30, 1e30), int: (1, 10 ** 7)}[field.type]
        if token:
            low, high = 0, config.vocab_size - 1
        elif "layer" in name and field.type is int:
            high = 1000
        if type(value) is not field.type or not low <= value <= high:
            raise ValueError(f"got {path} with {name} = {value!r:.60}; expected a "
                             + ("token of its vocabulary" if token else "bool" if field.type is bool
                                else f"positive {field.type.__name__}, at most {high:,}")
                             + "; correct it or download it again")


def parse_layers(text, model):
    """How many upper layers `text`, such as "10-29", names; layers count from 0, "" means all.

    Raises ValueError for layers that do not reach the top: the backward pass is spared only in the
    layers below a prefix.
    """
    totals = {len(part) for part in tensors_of(model.empty_prefix())}   # encoder and decoder
    first, dash, last = text.partition("-")
    right = [total - int(first) for total in totals
             if first.isdecimal() and last == f"{total - 1}" and int(first) < total]
    if text and len(right) < len(totals):
        top = " and ".join(f"{total - 1}" for total in sorted(totals))
        raise ValueError(f"got --prefix-layers {text}; expected FIRST-LAST, numbered from 0, with "
                         f"the model's highest layer, {top}, as LAST")
    return right[0] if text else max(totals)


def new_prefix(model, length, mid_dim=512, init="random", places="", layers=""):
    """A fresh prefix for `model`: see `Prefix`. places: where an encoder-decoder has prefixes.
    layers: see `parse_layers`.
    """
    cls, options = architecture(model.architecture).prefix, {"places": places} if places else {}
    return cls.for_model(model, length, mid_dim, init, n_layers=parse_layers(layers, model),
                         **options)


def flags_of(start, model, settings):
    """The flags of train.py that tell the shape of `start`, the prefix that a new one starts from.

    Of --init words only the length; of --start-from the layers, and a BART's places, too.
    """
    flags = {"prefix_len": max(part.size(4) for part in tensors_of(start))}
    if settings.start_from:
        (n, total), *_ = ((len(part), len(full)) for part, full
                          in zip(tensors_of(start), tensors_of(model.empty_prefix())))
        flags["prefix_layers"] = f"{total - n}-{total - 1}" if n < total else ""
        if isinstance(start, tuple):
            flags["prefixes"] = ",".join(f"{place}={part.size(4)}" for place, part
                                         in start._asdict().items() if part.size(4))
    return flags
