"""BART's numbers for GPT-2's tokens: from dict.txt, vocab.json or tokenizer.json, as transformers
has them.
"""
import json
import shutil

import pytest

from data import seq2seq
from data.example import Example
from data.pairs import tokenized
from data.tokenizer import BARTTokenizer, load_tokenizer

TEXTS = ["The Vaults pub near Café Adriatic has a 5 star rating.  Prices start at £30.",
         "  two blanks in front, tabs\t\tand\n\nlines at the end \n ", "don't we'll 12345 ...?!",
         "", "naïve \u6771\u4eac \U0001f600 e\u0301 \u2028 \x00 <|endoftext|> madeupword0001"]


@pytest.fixture(scope="module")
def bart(real_data, tmp_path_factory):
    """The real tokenizer, from fairseq's file."""
    folder = tmp_path_factory.mktemp("bart")
    if not (real_data / "bart" / "dict.txt").exists():
        pytest.skip(f"no {real_data / 'bart' / 'dict.txt'}")
    shutil.copy(real_data / "bart" / "dict.txt", folder)
    try:
        return load_tokenizer(folder)
    except OSError as error:
        pytest.skip(f"GPT-2's vocabulary is not here: {error}")


def test_every_number_is_that_of_vocab_json(bart, real_data, tmp_path):
    """All 50,265. Would catch: a shift by one, the made-up words in the place of real ones."""
    shutil.copy(real_data / "bart" / "vocab.json", tmp_path)
    other = load_tokenizer(tmp_path)
    assert bart.theirs == other.theirs and len(bart.theirs) == 50257 and bart.vocab_size == 50265
    for tokenizer in (bart, other):
        assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id,
                tokenizer.mask_token_id) == (0, 1, 2, 50264)


def json_alone(folder, vocabulary):
    """A BART's directory as converted from what transformers 5 saves: with tokenizer.json alone."""
    (folder / "config.json").write_text('{"architecture": "bart"}')
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return folder


def test_a_tokenizer_json_has_the_same_numbers(bart, real_data, tmp_path):
    """Would catch: a BART that transformers 5 has saved, refused for a file that nobody has."""
    vocabulary = json.loads((real_data / "bart" / "vocab.json").read_text("utf-8"))
    other = load_tokenizer(json_alone(tmp_path, vocabulary))
    assert isinstance(other, BARTTokenizer) and bart.theirs == other.theirs
    assert bart.mask_token_id == other.mask_token_id


@pytest.mark.parametrize("vocabulary", [
    {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "\u0120Strasse": 5},
    [["<s>", 0.0], ["\u2581der", -3.5]]])
def test_a_barts_own_vocabulary_is_refused_by_name(bart_directory, tmp_path, vocabulary):
    """Would catch: a BART in another language that is fed GPT-2's tokens."""
    shutil.copy(bart_directory / "tokenizer.tiktoken", json_alone(tmp_path, vocabulary))
    with pytest.raises(ValueError, match="tokenizer.json: got .*expected numbers of GPT-2's tok"):
        load_tokenizer(tmp_path)


def test_texts_are_encoded_as_transformers_encodes_them(bart, real_data):
    """Would catch: a blank put in front, another rule for words, <s> or </s> left out."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    merges = real_data / "gpt2" / "vocab.bpe"
    if not merges.exists():
        pytest.skip(f"no {merges}")
    pairs = [tuple(line.split(" ")) for line in merges.read_text("utf-8").split("\n")[1:] if line]
    vocabulary = json.loads((real_data / "bart" / "vocab.json").read_text("utf-8"))
    theirs = transformers.BartTokenizer(vocab=vocabulary, merges=pairs)
    for text in TEXTS:
        if "endoftext" in text:         # a token of theirs, plain text of ours
            text = text.replace("<|endoftext|>", "")
        assert bart.source_ids(text) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_without_its_frame(bart, text):
    """Would catch: <s> printed, bytes lost, an end in the middle of a text that mentions one."""
    ids = bart.source_ids(text)
    assert bart.decode(ids) == text and ids[0] == 0 and ids[-1] == 2 and 2 not in ids[:-1]
    assert bart.text_of(ids[1:] + [5, 6]) == text.strip()


def test_a_small_vocabulary_can_be_numbered_too(bart_directory):
    """Would catch: GPT-2's tokens where the model has its own; the numbers taken backwards."""
    tokenizer = load_tokenizer(bart_directory)
    assert isinstance(tokenizer, BARTTokenizer) and tokenizer.target_ids("") == [0, 2]
    assert tokenizer.vocab_size == 262
    assert tokenizer.encode("ab") == [4 + 256 - 97, 4 + 256 - 98]
    assert tokenizer.decode(tokenizer.source_ids("né")) == "né"
    with pytest.raises(ValueError, match="got a text with 100,000 blanks in a row or more"):
        tokenizer.encode(" " * 10 ** 6 + "x")           # tiktoken would panic


@pytest.mark.parametrize("file, change", [
    ("dict.txt", lambda text: text.replace("7 1\n", "", 1)), ("dict.txt", lambda text: text * 2),
    ("dict.txt", lambda text: text.replace("7 1\n", "8 1\n", 1)), ("dict.txt", lambda text: ""),
    ("vocab.json", lambda text: "{"), ("vocab.json", lambda text: "[]"),
    ("vocab.json", lambda text: '{"<s>": 0, "no such token": 1}')])
def test_a_damaged_numbering_is_named(bart_directory, tmp_path, file, change):
    """Would catch: a traceback, or words that are silently others."""
    shutil.copy(bart_directory / "tokenizer.tiktoken", tmp_path)
    (tmp_path / file).write_text(change((bart_directory / "dict.txt").read_text()))
    with pytest.raises(ValueError, match=f"{file}: got .*, expected .*; take the model's own"):
        load_tokenizer(tmp_path)


def test_sources_and_targets_are_each_cut_and_keep_their_ends(bart_directory):
    """Would catch: a target that pays for a long source, a cut </s>, a cut in silence."""
    tokenizer = load_tokenizer(bart_directory)
    examples = [Example("a" * 20, ("b" * 3, "c" * 9)), Example("d", ("e",))]
    pairs, note = seq2seq.encode(tokenized(examples, tokenizer), (10, 6))
    read = [(tokenizer.decode(p.ids[:p.start]), tokenizer.decode(p.ids[p.start:])) for p in pairs]
    assert read == [("a" * 8, "bbb"), ("a" * 8, "cccc"), ("d", "e")]
    for pair in pairs:
        for ids in (pair.ids[:pair.start], pair.ids[pair.start:]):
            assert ids[0] == 0 and ids[-1] == 2
    assert note == ("of 3 pairs 2 had their source cut to 10 tokens, 1 their target to 6")
    assert seq2seq.encode(tokenized(examples[1:], tokenizer), (10, 6))[1] == ""
    assert tokenizer.source_ids("d") == pairs[2].ids[:pairs[2].start]
    assert seq2seq.prompt(tokenizer, "d", 10) == (pairs[2].ids[:pairs[2].start], 0)
    assert seq2seq.prompt(tokenizer, "a" * 20, 10) == (pairs[0].ids[:pairs[0].start], 12)
