"""A Llama in one GGUF file (llama.cpp's format), quantised or not -> our config, weights, tokens.

The weights come out in fp32. Traps: RoPE rotates pairs of neighbours of a head in llama.cpp, and
pairs from its two halves in Hugging Face's layout, so the rows of the query and key weights are in
another order, each by its own number of heads (undone wrongly, the text is right for some twenty
tokens and then falls apart); a file without a head has a tied one. Needs the package gguf.
"""
from pathlib import Path

import torch

from pretrained.checkpoint import UNREADABLE, describe, save
from pretrained.hugging_face import check_names, our_config, rename
from utils.files import atomic_write

NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
# Pre-tokeniser, by its name in the file -> whether every digit is cut off alone.
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
    except UNREADABLE as error:
        raise ValueError(f"got {path}, which is no whole GGUF file ({describe(error)[:80]}); "
                         "expected one; download it again") from error


def our_name(name):
    """`blk.3.attn_q.weight` -> `layers.3.self_attn.q_proj.weight`; unknown names stay."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4:
        return f"layers.{parts[1]}.{NAMES.get(parts[2], parts[2])}.{parts[3]}"
    return ".".join([OUTSIDE.get(parts[0], parts[0]), *parts[1:]])


def halves_of_pairs(weight, heads):
    """From llama.cpp's order of rows, rotated pairs side by side, to Hugging Face's two halves."""
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
        if fields.get(f"{kind}.{field}", "none") != "none":
            about[name] = fields[f"{kind}.{field}"]
    return about


def read_tensor(tensor, path):
    """One of the file's tensors, in fp32."""
    from gguf.quants import dequantize
    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except UNREADABLE as error:
        raise ValueError(f"got {path} with {tensor.name} as {tensor.tensor_type.name}; expected "
                         "numbers that the package gguf can read (" + describe(error)[:80] +
                         "); choose another file of the model") from error


def state_dict(tensors, model, classes, path):
    """The state dict of `model`, in fp32, of a file's tensors; classes: its `Architecture`."""
    theirs = {our_name(tensor.name): read_tensor(tensor, path) for tensor in tensors}
    state, config = rename(theirs, model, classes, path), model.config
    check_names(state, model, path)
    for end, heads in (("q_proj.weight", config.num_attention_heads),
                       ("k_proj.weight", config.num_key_value_heads)):
        for name in state:
            if name.endswith(end):
                state[name] = halves_of_pairs(state[name], heads)
    return state


def make_tokenizer(fields):
    """The file's own vocabulary, a byte-level BPE, as the package tokenizers has it."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    except ImportError as error:
        raise ValueError("got a GGUF file, which has a vocabulary; expected the package "
                         "tokenizers, which writes it; `pip install tokenizers`") from error
    model, kind, tokens, merges, types, bos, add_bos = (
        fields.get(f"tokenizer.ggml.{name}") for name in
        ("model", "pre", "tokens", "merges", "token_type", "bos_token_id", "add_bos_token"))
    if model != "gpt2" or kind not in DIGITS_ALONE or not merges or not types:
        raise ValueError(f"got a GGUF file with the tokenizer {model} {kind}; expected gpt2 with "
                         f"{' or '.join(DIGITS_ALONE)}, its merges and types of tokens; convert "
                         "the model's Hugging Face directory")
    bpe = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)},
                               merges=[tuple(merge.split(" ")) for merge in merges]))
    # Every digit is cut off first, and only then GPT-2's expression cuts the pieces: two blanks
    # before a digit are one token of two blanks.
    digits = [pre_tokenizers.Digits(individual_digits=True)] if DIGITS_ALONE[kind] else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False)
                            for token, kind in zip(tokens, types) if kind != 1])
    if add_bos and bos is not None:
        bpe.post_processor = processors.TemplateProcessing(
            single="bos $A",
            special_tokens=[{"id": "bos", "ids": [bos], "tokens": [tokens[bos]]}])
    return bpe


def convert_gguf(path, out_directory):
    """Read the Llama in the GGUF file `path`, write what `load` reads to a directory."""
    out = Path(out_directory)
    fields, tensors = read_gguf(path)
    config, classes = our_config(hugging_face_config(fields, tensors), path)
    tokenizer = make_tokenizer(fields)
    with torch.device("meta"):
        model = classes.model(config)
    model.load_state_dict(state_dict(tensors, model, classes, path), assign=True)
    names = ("bos_token_id", "eos_token_id")
    model.generation_config = {name: fields[f"tokenizer.ggml.{name}"] for name in names
                               if f"tokenizer.ggml.{name}" in fields}
    with atomic_write(out / "tokenizer.json", "w") as file:
        file.write(tokenizer.to_str())
    save(model, out)
