"""The tokenizer: a small vocabulary from a file, or GPT-2's; and clear refusals."""
import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken

from data.tokenizer import END_OF_TEXT, GPT2_SPLIT, byte_level_bpe, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["The Vaults pub near Café Adriatic has a 5 star rating.  Prices start at £30.",
         "  two blanks in front, tabs\t\tand\n\nlines at the end \n ", "don't we'll 12345 ...?!",
         "I've they're he'd I'm it's",
         "", "naïve \u6771\u4eac \U0001f600 e\u0301 \u2028 \x00 <|endoftext|>"]


def write_ranks(folder, tokens):
    """A tokenizer.tiktoken with these tokens, numbered in their order."""
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.tiktoken").write_text("\n".join(lines) + "\n")
    return folder


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_from_a_small_vocabulary(tmp_path, text):
    """Would catch a rule for words that leaves characters out."""
    tokenizer = load_tokenizer(write_ranks(tmp_path, BYTES + [b"th", b"the", b" p", b"ub"]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_of_text_is_the_number_after_the_last_token(tmp_path):
    """Would catch an end token that is also a word, or lies outside the model's table."""
    tokenizer = load_tokenizer(write_ranks(tmp_path, BYTES + [b"th", b"the"]))
    assert tokenizer.eos_token_id == 258 and tokenizer.vocab_size == 259
    assert tokenizer.encode("the") == [257]
    assert 258 not in tokenizer.encode(END_OF_TEXT), "written by a user it is only text"


def test_words_are_cut_where_gpt2_cuts_them(tmp_path):
    """Would catch merges over the borders of words, which a checkpoint has never seen."""
    merges = [b"a ", b" b", b"1b", b"b1", b"b.", b"'s", b"s'"]
    tokenizer = load_tokenizer(write_ranks(tmp_path, BYTES + merges))
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("a b1b.'s")]
    assert pieces == ["a", " b", "1", "b", ".", "'", "s"]
    assert tokenizer.encode("b's")[1:] == [256 + merges.index(b"'s")]


def test_without_a_file_it_is_gpt2s(tmp_path):
    """Would catch another encoding than the checkpoints', and a rule for words unlike GPT-2's."""
    try:
        tokenizer = load_tokenizer(tmp_path)
    except OSError as error:
        pytest.skip(f"GPT-2's vocabulary is not here: {error}")
    assert tokenizer.eos_token_id == 50256 and tokenizer.vocab_size == 50257
    assert tokenizer.encode(" Hello world") == [18435, 995]
    gpt2 = byte_level_bpe(tmp_path)
    ranks = {gpt2.decode_single_token_bytes(i): i for i in range(50256)}
    ours = tiktoken.Encoding("ours", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        assert ours.encode_ordinary(text) == tokenizer.encode(text)


@pytest.mark.parametrize("change, words", [
    (lambda lines: lines[:7] + ["no base64!"] + lines[8:], "line 8"),
    (lambda lines: lines[:7] + ["BA== x"] + lines[8:], "line 8"),
    (lambda lines: lines[:7] + ["BA=="] + lines[8:], "line 8"),
    (lambda lines: lines[:-1], "got 255 tokens"),
    (lambda lines: lines + ["dGg= 300"], "got 257 tokens"),
    (lambda lines: [], "got 0 tokens"),
])
def test_a_damaged_vocabulary_is_named(tmp_path, change, words):
    """Would catch a panic inside tiktoken, or texts that are silently encoded wrongly."""
    path = write_ranks(tmp_path, BYTES) / "tokenizer.tiktoken"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unreachable_vocabulary_says_what_to_set(tmp_path):
    """Would catch a page of traceback from the network library on a machine without a network.

    In a process of its own, because tiktoken keeps what it has loaded; the proxy is a closed port.
    """
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"),
                   "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    program = ("from data.tokenizer import load_tokenizer\nfrom utils.cli import run_program\n"
               f"run_program(lambda: load_tokenizer({str(tmp_path)!r}))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: could not get GPT-2's vocabulary")
    assert "TIKTOKEN_CACHE_DIR" in done.stderr and done.stderr.count("\n") == 1
