"""A Llama in one GGUF file (llama.cpp's format), quantised or not -> our config, weights, tokens.

The weights come out in fp32. Traps: llama.cpp turns neighbouring numbers of a head where Hugging
Face's layout turns its two halves, so the rows of the query and key weights are in another order,
each by its own number of heads (undone wrongly, the text is right for some twenty tokens and then
falls apart); a file without a head has a tied one. Needs the package gguf.
"""
from pathlib import Path

import torch

from pretrained.checkpoint import save
from pretrained.hugging_face import check_names, our_config, rename
from utils.files import atomic_write

NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
# How a vocabulary cuts text before its merges, by the file's own word for it.
DIGITS_ALONE = {"smollm": True, "gpt-2": False}


def read_gguf(path):
    """The file, opened, as (fields: name -> value, its tensors)."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"got {path}; expected the package gguf, which reads it; `pip install "
                         "gguf`") from error
    try:
        file = gguf.GGUFReader(path)
        return {name: field.contents() for name, field in file.fields.items()}, file.tensors
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ValueError(f"got {path}, which is no whole GGUF file ({str(error)[:80]}); expected "
                         "one; download it again") from error


def our_name(name):
    """`blk.3.attn_q.weight` -> `layers.3.self_attn.q_proj.weight`; unknown names stay."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4:
        return f"layers.{parts[1]}.{NAMES.get(parts[2], parts[2])}.{parts[3]}"
    return ".".join([OUTSIDE.get(parts[0], parts[0]), *parts[1:]])


def halves_of_pairs(weight, heads):
    """Rows that are neighbours in a head, in llama.cpp's order, as the two halves of it."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)    # (heads * D, C)


def hugging_face_config(fields, tensors):
    """What Hugging Face's config.json would say."""
    kind = fields.get("general.architecture")
    about = {"model_type": kind, "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
             "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in tensors)}
    for name, field in (("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"),
                        ("intermediate_size", "feed_forward_length"),
                        ("num_attention_heads", "attention.head_count"),
                        ("num_key_value_heads", "attention.head_count_kv"),
                        ("head_dim", "rope.dimension_count"),
                        ("max_position_embeddings", "context_length"),
                        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
                        ("rope_theta", "rope.freq_base"), ("rope_scaling", "rope.scaling.type")):
        if f"{kind}.{field}" in fields:
            about[name] = fields[f"{kind}.{field}"]
    return about


def state_dict(tensors, config):
    """Our state dict, in fp32, of a file's tensors."""
    from gguf.quants import dequantize
    state = {}
    for tensor in tensors:
        name = our_name(tensor.name)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("q_proj.weight"):
            weight = halves_of_pairs(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = halves_of_pairs(weight, config.num_key_value_heads)
        state[name] = weight
    return state


def write_tokenizer(fields, path):
    """Write the file's own vocabulary as tokenizer.json: a byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    kind = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") != "gpt2" or kind not in DIGITS_ALONE:
        raise ValueError(f"got a GGUF file with the tokenizer {fields.get('tokenizer.ggml.model')} "
                         f"{kind}; expected gpt2 with {' or '.join(DIGITS_ALONE)}; convert the "
                         "model's Hugging Face directory")
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    bpe = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)},
                               merges=[tuple(merge.split(" ")) for merge in merges]))
    # Every digit is cut off first, and only then GPT-2's expression cuts the pieces: two blanks
    # before a digit are one token of two blanks.
    digits = [pre_tokenizers.Digits(individual_digits=True)] if DIGITS_ALONE[kind] else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token, kind in
                            zip(tokens, fields["tokenizer.ggml.token_type"]) if kind != 1])
    with atomic_write(path, "w") as file:
        file.write(bpe.to_str())


def convert_gguf(path, out_directory):
    """Read the Llama in the GGUF file `path`, write what `load` reads to a directory."""
    out = Path(out_directory)
    fields, tensors = read_gguf(path)
    config, classes = our_config(hugging_face_config(fields, tensors), path)
    with torch.device("meta"):
        model = classes.model(config)
    state = rename(state_dict(tensors, config), model, classes, path)
    check_names(state, model, path)
    model.load_state_dict(state, assign=True)
    names = ("bos_token_id", "eos_token_id")
    model.generation_config = {name: fields[f"tokenizer.ggml.{name}"] for name in names
                               if f"tokenizer.ggml.{name}" in fields}
    write_tokenizer(fields, out / "tokenizer.json")
    save(model, out)
