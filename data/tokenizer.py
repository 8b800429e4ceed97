"""The tokenizer of a model: its own vocabulary from a file, or GPT-2's.

Both are byte-level BPE with GPT-2's rule for cutting text into words, so that any text can be
encoded and comes back the same. The bundled model has a small vocabulary in a file
`tokenizer.tiktoken`, in tiktoken's format: a line for each token with its bytes in base64, a blank,
and its number.
Called by train.py, sample.py and whatever else turns text into numbers. Encode with
`encode_ordinary`: a text in which someone wrote <|endoftext|> must not end there.
"""
import base64
from pathlib import Path

import tiktoken

# How GPT-2 cuts text before bytes are merged: 's, 't and so on; runs of letters, of digits, of
# other signs, each with one blank before it; then the other blanks.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


def read_ranks(path):
    """Token (bytes) -> number, from a file in tiktoken's format; lower numbers are merged first."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:             # of split, of base64 and of int alike
            raise ValueError(f"{path}, line {number}: got {line[:40]!r}, expected a token in "
                             "base64 and its number; take the model's own file") from error
    complete = all(bytes([byte]) in ranks for byte in range(256))
    if not complete or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: got {len(ranks)} tokens, expected the 256 bytes among them and "
                         "the numbers 0, 1, 2, ... once each; take the model's own file")
    return ranks


def load_tokenizer(directory):
    """The tokenizer of the model in `directory`: its tokenizer.tiktoken, or else tiktoken's "gpt2".

    <|endoftext|> is the number after the last token, as in GPT-2 (50,257 numbers, 50256 the last).
    Raises OSError when GPT-2's vocabulary is neither in tiktoken's cache nor to be downloaded.
    """
    path = Path(directory) / "tokenizer.tiktoken"
    if path.exists():
        ranks = read_ranks(path)
        return tiktoken.Encoding(str(path), pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:      # no connection; or a file with a wrong digest
        raise OSError(f"could not get GPT-2's vocabulary ({type(error).__name__}), expected it in "
                      "tiktoken's cache, or a connection to download it once; connect, or set "
                      "TIKTOKEN_CACHE_DIR to a folder where an earlier use has left it") from error
