"""The tokenizer: a small vocabulary from a file, or GPT-2's; and clear refusals."""
import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from conftest import random_gpt2
from test_convert import foreign, write

import sample
import train
from data.tokenizer import END_OF_TEXT, GPT2_SPLIT, byte_level_bpe, load_tokenizer
from pretrained.hugging_face import convert
from pretrained.load import load_model

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


# ---- a GPT-2 with a vocabulary of its own: tokenizer.json, by the package tokenizers

@pytest.fixture
def german():
    """A byte-level BPE that knows a few German words."""
    tokenizers = pytest.importorskip("tokenizers", reason="it reads tokenizer.json: pip install "
                                                          "tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(["Das ist ein Haus und ein Garten"] * 20, tokenizers.trainers.
                                  BpeTrainer(vocab_size=300, show_progress=False,
                                             special_tokens=[END_OF_TEXT, "</s>"],
                                             initial_alphabet=tokenizer.pre_tokenizer.alphabet()))
    return tokenizer


def checkpoint(folder, tokenizer, **options):
    """A Hugging Face GPT-2 with more rows than `tokenizer` has tokens, and its tokenizer.json."""
    model = random_gpt2(vocab_size=310, n_positions=33, n_embd=12, n_layer=1, n_head=3).float()
    write(folder, foreign(model), config=model.config, **options)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_gpt2_with_its_own_tokenizer_json_reads_its_own_tokens(german, tmp_path):
    """Framed as GPT-2's, though: one end behind source and target. Would catch: German read with
    English BPE without a word; the default end of the config, which this model does not have.
    """
    directory = checkpoint(tmp_path / "hf", german, eos_token_id=50256)
    (directory / "vocab.json").write_text(json.dumps(german.get_vocab()))   # says less; left alone
    convert(directory, tmp_path / "ours")
    _, tokenizer = load_model(tmp_path / "ours", "cpu", "fp32")
    text = "Das ist ein Haus, naïve <|endoftext|>"
    assert tokenizer.encode("Das ist ein Haus") == german.encode("Das ist ein Haus").ids
    assert len(tokenizer.encode("Das ist ein Haus")) == 4 and tokenizer.eos_token_id == 0
    assert tokenizer.source_ids(text) == tokenizer.target_ids(text) == [
        *tokenizer.encode(f" {text} "), 0]
    assert 0 not in tokenizer.encode(text) and tokenizer.text_of(tokenizer.target_ids(text)) == text


@pytest.mark.parametrize("ends, own", [(1, (1, ())), ([1, 2], (1, (2,))), (50256, None),
                                       (None, None)])
def test_without_the_usual_end_it_is_the_configs(german, tmp_path, ends, own):
    """Would catch: an end that the vocabulary does not have, and texts that never end."""
    text = german.to_str().replace(END_OF_TEXT, "<|another|>")
    directory = checkpoint(tmp_path / "hf", type(german).from_str(text), eos_token_id=ends)
    convert(directory, tmp_path / "ours")
    if own is None:
        with pytest.raises(ValueError, match="has no eos_token_id; expected .*; convert the model"):
            load_tokenizer(tmp_path / "ours")
    else:
        tokenizer = load_tokenizer(tmp_path / "ours")
        assert tokenizer.eos_token_id == own[0]         # the others: `constraints_of`


def test_a_tokenizer_json_that_is_gpt2s_needs_no_package(tmp_path):
    """As transformers 5 saves every GPT-2. Would catch: a copy that only another package reads."""
    directory = write(tmp_path / "hf", foreign(random_gpt2()), config=random_gpt2().config)
    words = {"\u0120the": 262, END_OF_TEXT: 50256}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    convert(directory, tmp_path / "ours")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"config.json", "model.pt"}
    for damaged in ("{}", "[]", '{"model": {"vocab": 5}}', '{"mod'):
        (directory / "tokenizer.json").write_text(damaged)
        with pytest.raises(ValueError, match="got .*tokenizer.json, which is damaged.*; expected"):
            convert(directory, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_a_gpt2_with_its_own_tokens_learns_and_speaks(german, tmp_path, capsys):
    """Would catch: a program that asks this tokenizer for what only tiktoken's have."""
    convert(checkpoint(tmp_path / "hf", german), tmp_path / "ours")
    rows = [{"source": f"Haus {n}", "target": "Das ist ein Garten"} for n in range(4)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tmp_path / "ours"), "--device", "cpu"]
    train.main([*words, "--data", str(tmp_path / "my.jsonl"), "--steps", "1", "--batch-size", "2",
                "--prefix-len", "2", "--mid-dim", "4", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    sample.main(["--run", str(tmp_path / "run"), "--device", "cpu", "--max-new", "3", "Haus 1"])
    assert capsys.readouterr().out.endswith("\n")
