"""Makes the tokenizer of a bundled model: byte-level BPE, learned from the invented world's text.

A part of pretrain.py, for a run that has no tokenizer.tiktoken yet; needs the package `tokenizers`.
The file has a line "base64(token) rank" for each byte and each merge; <|endoftext|> is not in it,
its number is the number of lines. Not here: reading that file (data/tokenizer.py).
"""
import base64
import random

from data.tokenizer import byte_of_letter
from data.toy_world.text import document
from utils.files import atomic_write


def world_texts(documents, seed):
    """Pre-training text as the model will see it: a space at both ends, no braces."""
    rng = random.Random(f"tokenizer {seed}")
    for _ in range(documents):
        for part in document(rng):
            yield f" {part} ".replace("{", "").replace("}", "")


def learn_tokens(texts, size):
    """`size` tokens as bytes: the 256 single bytes, then the merges in the order of learning."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ValueError("got no package `tokenizers`, expected it to make a tokenizer; install "
                         "it, or copy weights/tiny-gpt2/tokenizer.tiktoken into the run") from error
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    vocabulary, byte_of = bpe.get_vocab(), byte_of_letter()
    tokens = sorted(vocabulary, key=vocabulary.get)
    return [bytes(byte_of[letter] for letter in token) for token in tokens]


def write_tokens(tokens, path):
    with atomic_write(path, "w") as file:
        for rank, token in enumerate(tokens):
            file.write(f"{base64.b64encode(token).decode()} {rank}\n")
