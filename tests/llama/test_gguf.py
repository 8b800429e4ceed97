"""A Llama in a GGUF file is the model it was made of, and so is its tokenizer."""
import functools
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from gguf_cases import MERGES, SPECIAL, TOKENS, ByHand, fuzzed, write_gguf
from llama_cases import SHAPES, difference, in_ours, their_llama

from data.tokenizer import load_tokenizer
from decoding.constraints import Constraints
from llama.model import Llama, LlamaConfig
from pretrained import convert as program
from pretrained.checkpoint import load
from pretrained.gguf_file import convert_gguf, make_tokenizer, read_gguf
from pretrained.hub import PACKAGES
from pretrained.load import load_model
from pretrained.run_directory import load_prefix
from sample import generate
from utils.cli import run_program

gguf = pytest.importorskip("gguf", reason="it reads and writes GGUF: pip install gguf")
pytest.importorskip("tokenizers", reason="it writes tokenizer.json: pip install tokenizers")
PARAMETERS = 134_515_008        # of SmolLM2-135M


def some_llama(shape="6 heads over 2", **options):
    return their_llama(vocab_size=len(TOKENS), **SHAPES[shape] | options)


def logits(model, ids):
    return model.head(model.hidden_states(ids))                                 # (B, T, V)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_of_a_gguf_file_are_those_of_the_original(tmp_path, shape):
    """On 60 tokens, for a wrong order of rows shows late. Would catch: keys put back by the number
    of query heads, a head that is missing and not tied, another theta or epsilon.
    """
    theirs = some_llama(shape, rope_parameters={"rope_type": "default", "rope_theta": 300.0},
                        rms_norm_eps=0.25)
    convert_gguf(write_gguf(tmp_path / "a.gguf", theirs), tmp_path / "out")
    ours, ids = load(tmp_path / "out"), torch.randint(len(TOKENS), (2, 60))
    assert difference(logits(ours, ids), theirs(ids).logits) < 1e-5             # fp32
    assert ours.config.tie_word_embeddings == (shape == "4 over 1, tied")
    for name, weight in in_ours(theirs).state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name       # not a bit is lost


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_numbers_are_what_gguf_says_they_are(tmp_path, kind):
    """Would catch: rows put in order before they are numbers, a kind that is read as another."""
    kind = gguf.GGMLQuantizationType[kind]
    theirs = some_llama(hidden_size=96, head_dim=16, intermediate_size=64)  # in blocks of 32
    path = write_gguf(tmp_path / "a.gguf", theirs, quantize=kind)
    for weight in theirs.parameters():
        if weight.dim() == 2:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
            weight.copy_(torch.from_numpy(rounded.copy()))
    convert_gguf(path, tmp_path / "out")
    ids = torch.randint(len(TOKENS), (2, 60))
    assert difference(logits(load(tmp_path / "out"), ids), theirs(ids).logits) < 1e-5   # fp32


def test_the_command_converts_a_gguf_file(tmp_path, capsys, monkeypatch):
    """Would catch: a directory called a.gguf, a file taken for a name on the hub."""
    path = write_gguf(tmp_path / "a.gguf", some_llama())
    program.main([str(path), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(program, "WEIGHTS", tmp_path / "weights")
    program.main([str(path)])
    assert "weights/a/config.json" in capsys.readouterr().out
    for out in (tmp_path / "out", tmp_path / "weights" / "a"):
        assert {x.name for x in out.iterdir()} == {"config.json", "model.pt", "tokenizer.json"}
    assert load(tmp_path / "out").generation_config == {"bos_token_id": 1, "eos_token_id": 2}


def refused(path, out, *words):
    """Converting `path` is refused in one line, in three parts, and nothing is written."""
    with pytest.raises(ValueError) as caught:
        convert_gguf(path, out)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("got ") and "; expected " in message
    assert message.count("; ") >= 2, f"no next step in: {message}"
    for word in words:
        assert word in message, message
    assert not out.exists()


def test_a_gguf_file_cut_short_is_refused_wherever_it_ends(tmp_path):
    """Would catch: half a download taken for a model, an error from inside numpy."""
    path = write_gguf(tmp_path / "a.gguf", some_llama(num_hidden_layers=1))
    whole = path.read_bytes()
    for length in [0, 1, 4, 8, 12, 24, 40, 100, *range(500, len(whole), len(whole) // 12),
                   len(whole) - 40]:
        path.write_bytes(whole[:length])
        refused(path, tmp_path / "out", "a.gguf, which is no whole GGUF file", "download it again")


@pytest.mark.parametrize("body", [b"hello, this is no model", b"GGUF", b"GGUF" + b"\xff" * 400,
                                  b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_gguf_is_refused_by_the_command(tmp_path, capsys, body):
    """Would catch: a traceback, or exit status 0."""
    (tmp_path / "a.gguf").write_bytes(body)
    words = [str(tmp_path / "a.gguf"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        run_program(functools.partial(program.main, words))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "no whole GGUF file" in error


def test_what_a_gguf_file_may_hold_and_we_cannot_do_is_refused_by_name(tmp_path):
    """Would catch: a model that nearly fits and generates nonsense, KeyErrors."""
    theirs, path, out = some_llama(), tmp_path / "a.gguf", tmp_path / "out"
    write_gguf(path, theirs, {"llama.rope.scaling.type": ("add_string", "linear")})
    refused(path, out, "rope_type = 'linear'")
    write_gguf(path, theirs, kind="llama-bpe")
    refused(path, out, "the tokenizer gpt2 llama-bpe", "smollm or gpt-2")
    write_gguf(path, theirs, drop=["blk.1.attn_k.weight"])
    refused(path, out, "without layers.1.self_attn.k_proj.weight")
    write_gguf(path, their_llama(vocab_size=len(TOKENS) + 5, **SHAPES["4 over 4"]))
    refused(path, out, "embed_tokens.weight of shape (280, 40)")
    for name, words in (("llama", "expected a positive int"), ("mamba", "model_type 'mamba'")):
        writer = gguf.GGUFWriter(path, name)
        writer.add_block_count(2)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file,
                     writer.write_tensors_to_file, writer.close):
            step()
        refused(path, out, words)


def test_rope_scaling_of_none_is_none(tmp_path):
    """As some files say it. Would catch: a plain model refused for a word."""
    theirs = some_llama()
    convert_gguf(write_gguf(tmp_path / "a.gguf", theirs,
                            {"llama.rope.scaling.type": ("add_string", "none")}), tmp_path / "out")


def test_without_the_package_gguf_the_error_says_what_to_install(tmp_path, monkeypatch):
    """Would catch: a traceback for a package that is optional."""
    path = write_gguf(tmp_path / "a.gguf", some_llama())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(path, tmp_path / "out", "`pip install tokenizers`")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, tmp_path / "out", "`pip install gguf`")


# ---- the tokenizer

def same_tokens(ours, tokens, merges, digits_alone, count):
    """On fuzzed texts: the tokens are those of BPE by hand, and of the package tokenizers with the
    pieces of its own; the text comes back; no typed word is a special token.
    """
    import tokenizers
    from tokenizers import pre_tokenizers
    by_hand = ByHand(tokens, merges, digits_alone)
    package = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: n for n, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    package.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), level]) if digits_alone else level
    special = {tokens.index(word) for word in SPECIAL}
    for text in fuzzed(count):
        ids = ours.encode(text)
        assert ids == by_hand.encode(text) == package.encode(text).ids, repr(text)
        assert ours.decode(ids) == text, repr(text)
        assert not special & set(ids), repr(text)


@pytest.mark.parametrize("kind", ["smollm", "gpt-2"])
def test_a_gguf_files_tokens_are_those_of_bpe_by_hand(tmp_path, kind):
    """Would catch: digits that are merged, or the blank before a digit put to it (transformers'
    own conversion forgets the digits); an end that somebody typed taken for the end.
    """
    convert_gguf(write_gguf(tmp_path / "a.gguf", some_llama(), kind=kind), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    same_tokens(tokenizer, TOKENS, MERGES, kind == "smollm", 2000)
    blanks = [TOKENS[i] for i in tokenizer.encode("a  1 00")]
    assert blanks == (["a", "ĠĠ", "1", "Ġ", "0", "0"] if kind == "smollm" else
                      ["a", "Ġ", "Ġ1", "Ġ", "00"])
    assert tokenizer.eos_token_id == 2 and tokenizer.max_id == len(TOKENS) - 1
    assert tokenizer.source_ids("the") == [*tokenizer.encode("the"), TOKENS.index("Ċ")]


def test_a_start_that_the_file_asks_for_stands_in_front_of_sources(tmp_path):
    """Would catch: a model that never begins a text without its start token, made to."""
    fields = {"tokenizer.ggml.add_bos_token": ("add_bool", True)}
    convert_gguf(write_gguf(tmp_path / "a.gguf", some_llama(), fields), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.source_ids("the")[0] == 1 and 1 not in tokenizer.target_ids("the")
    assert tokenizer.text_of(tokenizer.source_ids("the")) == "the"


# ---- the real file

@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2's GGUF file, in its package."""
    module, file, command = PACKAGES["smollm2"]
    found = importlib.util.find_spec(module)
    if found is None:
        pytest.skip(f"SmolLM2 is not here: {command}")
    return Path(found.submodule_search_locations[0]) / file


@pytest.fixture(scope="session")
def smollm2_directory(smollm2, tmp_path_factory):
    """The same, converted."""
    directory = tmp_path_factory.mktemp("weights") / "smollm2"
    convert_gguf(smollm2, directory)
    return directory


def test_smollm2_has_the_published_number_of_parameters():
    """Would catch: a layer too many, a head that is not tied, defaults of another model."""
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS


@pytest.mark.slow
def test_smollm2s_tokens_are_those_of_bpe_by_hand(smollm2, tmp_path):
    """10,000 texts. Would catch: what a small vocabulary does not show."""
    fields, _ = read_gguf(smollm2)
    (tmp_path / "tokenizer.json").write_text(make_tokenizer(fields).to_str())
    (tmp_path / "config.json").write_text(json.dumps({"generation_config": {"eos_token_id": 2}}))
    same_tokens(load_tokenizer(tmp_path), fields["tokenizer.ggml.tokens"],
                fields["tokenizer.ggml.merges"], True, 10_000)


@pytest.mark.slow
def test_smollm2s_logits_are_those_of_transformers(smollm2, smollm2_directory):
    """From the same file. Would catch: whatever random weights do not show."""
    transformers = pytest.importorskip("transformers",
                                       reason="the oracle: pip install transformers")
    ours, tokenizer = load(smollm2_directory), load_tokenizer(smollm2_directory)
    assert sum(weight.numel() for weight in ours.parameters()) == PARAMETERS
    text = ("The Vaults is a pub near Café Adriatic with a 5 star rating. Prices start at £30, "
            "and it is not family-friendly. " * 3)
    ids = torch.tensor([tokenizer.encode(text)])                                # (1, T)
    assert 80 < ids.size(1) < 200
    with torch.no_grad():
        found = logits(ours, ids)
        likely = found.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean()
        assert likely > -3.5            # nats: it has read English, and so rows are in order
        del ours
        theirs = transformers.LlamaForCausalLM.from_pretrained(
            smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
        assert difference(found, theirs(ids).logits) < 1e-5                     # fp32


@pytest.mark.slow
def test_the_trained_prefix_writes_about_its_table(smollm2_directory):
    """Would catch: a prefix in the repository that no longer belongs to the model that is made of
    the package, or that is put in front of it in another way than it was trained. The food, which
    greedy decoding leaves out here, is not asked for.
    """
    model, tokenizer = load_model(str(smollm2_directory), "cpu", "fp32")
    prefix = load_prefix(ROOT / "prefixes/smollm2-e2e/prefix.pt", model)
    source = ("name : Blue Spice | Type : restaurant | food : Thai | price : cheap | area : city "
              "centre | near : The Portland Arms")
    constraints = Constraints(tokenizer.eos_token_id, max_new_tokens=40)
    ids, = generate(model, [tokenizer.source_ids(source)], constraints, prefix)
    text = tokenizer.text_of(ids)
    for value in ("Blue Spice", "restaurant", "cheap", "city centre", "The Portland Arms"):
        assert value in text, text
