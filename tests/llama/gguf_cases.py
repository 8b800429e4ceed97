"""A Llama of transformers as a GGUF file, as llama.cpp writes it; and its tokenizer by hand."""
import functools

import pytest
import regex
import torch

GPT2_SPLIT = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Some need others; "00" and "Ġ1" can never come about where every digit stands alone.
MERGES = ["t h", "Ġ t", "th e", "Ġ the", "Ġ Ġ", "ĠĠ ĠĠ", "0 0", "Ġ 1", "i n", "in g", "Ã ©",
          "< |", "| >", "i m", "Ċ Ċ", "' s"]


def letters():
    """The letters that stand for the 256 bytes, in their order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


TOKENS = [*SPECIAL, *letters(), *(merge.replace(" ", "") for merge in MERGES)]


def rows_of_llama_cpp(weight, heads):
    """Line by line from convert_hf_to_gguf.py, whose `permute` this is."""
    return (weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            .swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path, theirs, fields=(), kind="smollm", drop=(), quantize=None):
    """Write a Llama of transformers, with the tokens above.

    fields: more of them, {name: (method of the writer, value)}. drop: tensors that are left out.
    quantize: of gguf's kinds of numbers, for all matrices; None: F32.
    """
    gguf = pytest.importorskip("gguf", reason="the package reads and writes it: pip install gguf")
    c = theirs.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, (method, value) in dict(fields).items():
        getattr(writer, method)(name, value)
    for name, tensor in theirs.state_dict().items():
        new = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
               "model.norm.weight": "output_norm.weight"}.get(name)
        if new is None:
            _, _, layer, *middle, end = name.split(".")
            new = f"blk.{layer}.{NAMES['.'.join(middle)]}.{end}"
        numbers = tensor.numpy()
        if ".attn_q." in new or ".attn_k." in new:
            heads = c.num_attention_heads if ".attn_q." in new else c.num_key_value_heads
            numbers = rows_of_llama_cpp(numbers, heads)
        if new in drop or new == "output.weight" and c.tie_word_embeddings:
            continue
        if quantize is not None and numbers.ndim == 2:
            writer.add_tensor(new, gguf.quants.quantize(numbers, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(new, numbers.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class ByHand:
    """Byte-level BPE as its paper has it, in plain Python, with every digit alone or not."""

    def __init__(self, tokens, merges, digits_alone=True):
        self.numbers = {token: n for n, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): n for n, merge in enumerate(merges)}
        self.letters, self.digits_alone = letters(), digits_alone
        self.merge = functools.cache(self.merge)

    def merge(self, word):
        parts = [self.letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, i = min((self.ranks.get(pair, 1e9), i) for i, pair in
                          enumerate(zip(parts, parts[1:])))
            if rank == 1e9:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.numbers[part] for part in parts]

    def encode(self, text):
        pieces = regex.split(r"(\p{N})", text) if self.digits_alone else [text]
        return [number for piece in pieces for word in regex.findall(GPT2_SPLIT, piece)
                for number in self.merge(word)]


def fuzzed(count, seed=0):
    """Texts of what is easily cut wrongly: digits, blanks, accents, signs, tokens that are typed.
    """
    bits = ["0", "1", "23", "100", "²", "½", "٣", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n",
            "the", "The", "thing", "ing", " the", "é", "e\u0301", "naïve", "東京", "\U0001f600",
            "'s", "'ll", "don't", ",", ".", "...", "?!", "-", "_", "|", ":", "<|im_end|>", "</s>",
            "<|endoftext|>", "<|", "|>", "\u00a0", "\u3000", "\u200b", "\x00", "\x7f", "ß", "£"]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        n = int(torch.randint(1, 12, (1,), generator=generator))
        picks = torch.randint(len(bits), (n,), generator=generator).tolist()
        yield "".join(bits[i] for i in picks)
