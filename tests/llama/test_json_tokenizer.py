"""A tokenizer.json frames a text: source, a line break, target, end."""
import json
import sys

import pytest

from data.tokenizer import load_tokenizer
from decoding.constraints import banned_tokens

tokenizers = pytest.importorskip("tokenizers", reason="it reads tokenizer.json: pip install "
                                                      "tokenizers")


def on_disk(tokenizer, directory, ends=1):
    """`tokenizer` as the one of a model in `directory`, of which load_tokenizer reads no more."""
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"generation_config": {
        "eos_token_id": ends}}))
    return load_tokenizer(directory)


def with_start(tokenizer):
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def words_with_marks():
    """A tokenizer as Llama 2's: "▁" in front of words and of the text, bytes where it must be."""
    words = ["<s>", "</s>", "▁", *"abc5", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        {word: n for n, word in enumerate(words)}, [("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(words[:2])
    return with_start(tokenizer)


@pytest.fixture
def tokenizer(bytes_tokenizer, tmp_path):
    return on_disk(bytes_tokenizer, tmp_path)


def test_source_and_target_are_one_sequence(tokenizer):
    """Would catch: a target without an end, a source that runs into it, an end in the text."""
    source, target = tokenizer.source_ids("name : Ä"), tokenizer.target_ids("It is Ä.")
    assert tokenizer.decode(source) == "name : Ä\n" and tokenizer.decode(target) == "It is Ä."
    assert target[-1] == 1 and target.count(1) == 1 and 1 not in source
    assert tokenizer.text_of(target) == "It is Ä." and tokenizer.text_of(source) == "name : Ä"
    assert tokenizer.text_of([*target, *source]) == "It is Ä."
    assert tokenizer.decode(source + target) == "name : Ä\nIt is Ä."


def test_a_start_stands_in_front_of_sources_only(bytes_tokenizer, tmp_path):
    """Would catch: a model of the kind that begins with <s>, without it, or with a second one in
    the middle; a start that is shown as text.
    """
    plain = on_disk(bytes_tokenizer, tmp_path).source_ids("x")
    tokenizer = on_disk(with_start(bytes_tokenizer), tmp_path)
    assert tokenizer.source_ids("x") == [0, *plain]
    assert 0 not in tokenizer.target_ids("x") and 0 not in tokenizer.encode("x")
    assert tokenizer.text_of(tokenizer.source_ids("x")) == "x"


@pytest.mark.parametrize("text", ["a<|im_end|>b", "</s>", "<s></s> <|im_end|>", "<|im_end|>\n"])
def test_an_end_that_is_typed_is_text(tokenizer, text):
    """Would catch: a user who ends the text of a table, or of an answer."""
    assert not {0, 1, 2} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.text_of(tokenizer.target_ids(f"x{text}x")) == f"x{text}x"


def test_of_several_ends_the_first_is_learned(bytes_tokenizer, tmp_path):
    """Would catch: a list where a number is wanted."""
    tokenizer = on_disk(bytes_tokenizer, tmp_path, [2, 1])
    assert tokenizer.eos_token_id == 2
    assert tokenizer.target_ids("x")[-1] == 2
    # A padded row of the model may be an end too; a text never has it.
    assert on_disk(bytes_tokenizer, tmp_path, [2, 49155]).eos_token_id == 2
    for nothing in (None, [], [None], "2"):
        with pytest.raises(ValueError, match="whose config.json has no eos_token_id; expected"):
            on_disk(bytes_tokenizer, tmp_path, nothing)


def test_numbers_may_have_gaps(bytes_tokenizer, tmp_path):
    """Would catch: the count of tokens taken for the largest number, which the model must have."""
    about = json.loads(bytes_tokenizer.to_str())
    about["model"]["vocab"]["!"] = 400
    tokenizer = on_disk(tokenizers.Tokenizer.from_str(json.dumps(about)), tmp_path)
    assert tokenizer.max_id == 400 == tokenizer.encode("!")[0] and tokenizer.vocab_size < 400


def test_a_mark_of_words_is_not_banned_with_a_line_break(tmp_path):
    """Of a line break such a tokenizer makes "▁" and the byte 10. Would catch: the mark banned,
    and with it every number, "5" being "▁" and "5".
    """
    tokenizer = on_disk(words_with_marks(), tmp_path)
    assert tokenizer.encode("\n") == [2, 8 + 10] and tokenizer.encode("5") == [2, 6]
    assert banned_tokens(tokenizer, ["\n"]) == (8 + 10,)
    assert tokenizer.text_of(tokenizer.target_ids("a 5 b")) == "a 5 b"


def test_a_damaged_file_is_one_sentence(tokenizer, tmp_path):
    """Would catch: an exception of the package's own kind, which no program catches."""
    whole = (tmp_path / "tokenizer.json").read_text()
    for text in ("", "{}", whole[:500]):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="got .*tokenizer.json.*; expected .*; ") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(tokenizer, tmp_path, monkeypatch):
    """Would catch: a traceback for a package that is optional."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="expected the package tokenizers.*`pip install tokeniz"):
        load_tokenizer(tmp_path)
