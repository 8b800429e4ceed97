"""Decoding: the cache, ragged batches, what ends a text, how a token is drawn; and the program."""
import functools
import gzip
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_gpt2

import sample
import train
from data import paper
from data.requests import read_requests
from data.tokenizer import load_tokenizer
from decoding.constraints import Constraints, banned_tokens
from model import ExplicitAttention
from pretrained.checkpoint import load, save
from pretrained.load import load_model
from pretrained.run_directory import save_prefix
from sample import generate, sample_token
from utils.files import read_json, write_json

EOS = 256


@pytest.fixture
def prompts():
    torch.manual_seed(4)
    return [torch.randint(256, (n,)).tolist() for n in (7, 1, 12, 4)]


@pytest.fixture
def prefix():
    torch.manual_seed(5)
    return torch.randn(3, 2, 1, 4, 5, 6, dtype=torch.float64)


def recomputed(model, prompt, prefix, max_new_tokens, sample=sample_token):
    """One prompt, alone, without a cache: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model.head(model.hidden_states(torch.tensor([ids]), prefix)[:, -1])    # (1, V)
        ids.append(sample(logits).item())
        if ids[-1] == EOS:
            return ids[len(prompt):-1]
    return ids[len(prompt):]


def test_cached_decoding_is_recomputation(model, prompts, prefix):
    """Token for token, in a ragged batch. Would catch: a cache, mask or position off by one, a
    short prompt that sees its padding, a prefix that is there in the first step only.
    """
    for given in (None, prefix):
        together = generate(model, prompts, Constraints(EOS, 30), given)
        for prompt, row in zip(prompts, together):
            assert row == recomputed(model, prompt, given, 30)
    assert together != generate(model, prompts, Constraints(EOS, 30))   # the prefix does something


def test_sampled_cached_decoding_is_recomputation(model, prompts, prefix):
    """Would catch: draws that depend on how the logits were computed."""
    for prompt in prompts:
        def draw(logits, generator):
            return sample_token(logits, 1.3, 50, 0.9, generator)
        one, two = (functools.partial(draw, generator=torch.Generator().manual_seed(6))
                    for _ in range(2))
        assert (generate(model, [prompt], Constraints(EOS, 30), prefix, sample=one)[0]
                == recomputed(model, prompt, prefix, 30, two))


def test_a_row_of_prefixes_serves_each_its_own(model, prompts):
    """Would catch: decoding that takes the first row's prefix for all."""
    own = torch.randn(3, 2, 4, 4, 5, 6, dtype=torch.float64)
    together = generate(model, prompts, Constraints(EOS, 20), own)
    for row, prompt in enumerate(prompts):
        assert together[row] == recomputed(model, prompt, own[:, :, row:row + 1], 20)


def test_a_text_ends_at_eos_and_not_before_its_least_length(prompts, prefix):
    """Would catch: tokens after the end, an end that counts as text, a least length off by one."""
    model = random_gpt2()
    likely = generate(model, prompts[:1], Constraints(EOS, 8), prefix)[0]
    # Take the token generated at place 5 as the end: the text stops before its first occurrence.
    end = likely[5]
    cut = generate(model, prompts[:1], Constraints(end, 8), prefix)[0]
    assert cut == likely[:likely.index(end)]
    longer = generate(model, prompts[:1], Constraints(end, 8, 7), prefix)[0]
    assert len(longer) >= 7 and end not in longer
    assert len(generate(model, prompts[:1], Constraints(end, 8, 8), prefix)[0]) == 8
    assert generate(model, prompts, Constraints(EOS, 0), prefix) == [[], [], [], []]


def test_banned_tokens_are_never_generated(model, prompts, prefix):
    """Would catch: a ban that holds for the first token or the first row only."""
    free = generate(model, prompts, Constraints(EOS, 20), prefix)
    banned = {token for row in free for token in row}
    rows = generate(model, prompts, Constraints(EOS, 20, banned_tokens=tuple(banned)), prefix)
    assert not banned & {token for row in rows for token in row} and any(rows)


def test_decoding_stops_where_the_positions_end(model, prefix):
    """64 positions, P = 5, a prompt of 50: 9 tokens. Would catch: an error after long work."""
    row, = generate(model, [[1] * 50], Constraints(EOS, 100, 100), prefix)
    assert len(row) == 9


def test_temperature_zero_is_the_likeliest_and_one_the_distribution():
    """20,000 draws within 5 standard errors. Would catch: a temperature upside down."""
    logits, generator = torch.tensor([[0.0, 1.0, 2.0, -3.0]]), torch.Generator().manual_seed(7)
    assert sample_token(logits).tolist() == [2]
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (2.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.7)):
        draws = sample_token(logits.expand(20_000, 4), temperature, top_k, top_p, generator)
        p = (logits[0] / temperature).softmax(0)
        if top_k or top_p < 1:      # .66 < .7 <= .66 + .24: both filters keep the best two
            p = torch.where(torch.tensor([0, 1, 1, 0]) > 0, p, 0) / p[1:3].sum()
        found = torch.bincount(draws, minlength=4) / 20_000
        assert ((found - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all()
    assert sample_token(logits, 1.0, 1, 1.0, generator).tolist() == [2]
    assert sample_token(logits, 1.0, 0, 1e-9, generator).tolist() == [2]    # at least one is kept


# ---- the program

@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_directory):
    """A run on disk: 20 steps on a task of 40 lines."""
    folder = tmp_path_factory.mktemp("run")
    with open(folder / "tiny.jsonl", "w") as file:
        for i in range(40):
            file.write(json.dumps({"source": f"n : {i}", "target": f"it is {i}"}) + "\n")
    train.main(["--model", str(model_directory), "--data", str(folder / "tiny.jsonl"),
                "--lr", "1e-2", "--steps", "20", "--device", "cpu", "--out", str(folder / "out"),
                "--mid-dim", "16"])
    return str(folder / "out")


def output(capsys, *arguments):
    """What the program prints to standard output."""
    sample.main([*arguments, "--device", "cpu", "--max-new-tokens", "12"])
    return capsys.readouterr().out


def test_standard_output_carries_the_text_and_nothing_else(trained, capsys):
    """Would catch: a progress bar or a note about the device in the middle of somebody's file."""
    command = [sys.executable, str(ROOT / "sample.py"), "--run", trained, "--max-new-tokens", "12",
               "--device", "cpu"]
    answered = subprocess.run(command, input="n : 3\n\nn : 4\n", capture_output=True, text=True)
    assert answered.returncode == 0 and "device cpu" in answered.stderr
    expected = [output(capsys, "--run", trained, source) for source in ("n : 3", "n : 4")]
    assert answered.stdout == "".join(expected) and answered.stdout.count("\n") == 2


def test_many_sources_come_back_in_their_order(trained, tmp_path, capsys):
    """Would catch: batches that are sorted and not put back, or padding that changes a text."""
    sources = [f"n : {10 ** (i % 5)}" for i in range(23)]
    (tmp_path / "in.txt").write_text("\n".join(sources) + "\n")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"source": s}) + "\n" for s in sources))
    alone = [output(capsys, "--run", trained, s) for s in sources[:5]]
    lines = output(capsys, "--run", trained, "--input", str(tmp_path / "in.txt"),
                   "--batch-size", "7")
    assert lines.splitlines() == [alone[i % 5].rstrip("\n") for i in range(23)]
    assert output(capsys, "--run", trained, "--input", str(tmp_path / "in.jsonl")) == lines
    assert output(capsys, "--run", trained, "--input", str(tmp_path / "in.jsonl"),
                "--output", str(tmp_path / "out.jsonl")) == ""
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == sources
    assert [row["text"] + "\n" for row in rows][:5] == alone


@pytest.fixture
def talkative(tmp_path, model_directory):
    """A model on disk whose texts have line breaks, and two runs of it: of tables, of a .jsonl."""
    shutil.copytree(model_directory, tmp_path / "model")
    model = random_gpt2(seed=1).float()
    model.wpe.weight.data *= 8                          # not the same token for ever
    model.wte.weight.data[[10, *b"ab"]] *= 5
    save(model, tmp_path / "model")
    model.fingerprint = load_model(str(tmp_path / "model"), "cpu", "fp32")[0].fingerprint
    for data in ("e2e", "my.jsonl"):
        torch.manual_seed(0)
        save_prefix(tmp_path / data / "prefix.pt", torch.randn(3, 2, 1, 4, 2, 6) / 9, model)
        (tmp_path / data / "config.json").write_text(json.dumps({"settings": {
            "model": str(tmp_path / "model"), "data": data}}))
    return tmp_path


def test_line_breaks_are_forbidden_for_the_papers_tables_only(talkative, capsys):
    """Would catch: targets of several lines that a prefix has learned and may not say."""
    def banned(**settings):
        return sample.Generator(sample.Settings(device="cpu", **settings)).constraints.banned_tokens
    assert banned(run=[str(talkative / "e2e")]) == (10,)
    assert banned(run=[str(talkative / "e2e")], ban=["i"]) == (ord("i"),)
    assert banned(run=[str(talkative / "my.jsonl")]) == banned(model=str(talkative / "model")) == ()
    assert all(paper.banned_after(name) for name in ("e2e", "webnlg", "dart", "world"))
    assert not any(paper.banned_after(name) for name in ("xsum", "my.jsonl", ""))
    assert output(capsys, "--run", str(talkative / "e2e"), "n : 3").count("\n") == 1


def test_a_text_of_several_lines_comes_out_whole(talkative, capsys):
    """Alone and in .jsonl; a line for each source elsewhere. Would catch: lines joined by blanks,
    or texts in a file of lines that belong to the sources above.
    """
    run = str(talkative / "my.jsonl")
    text, other = (output(capsys, "--run", run, source) for source in ("n : 3", "m"))
    assert "\n" in text.strip() and "\n" in other.strip()
    (talkative / "in.txt").write_text("n : 3\nm\n")
    both = ["--run", run, "--input", str(talkative / "in.txt")]
    assert output(capsys, *both).splitlines() == [
        " ".join(x.removesuffix("\n").splitlines()) for x in (text, other)]
    output(capsys, *both, "--output", str(talkative / "out.jsonl"))
    rows = [json.loads(line) for line in (talkative / "out.jsonl").read_text().splitlines()]
    assert [row["text"] + "\n" for row in rows] == [text, other]


@pytest.mark.slow
def test_a_prefix_says_the_lines_that_it_learned(tmp_path, capsys):
    """Would catch: a ban or a join anywhere between training and the output, in `train.show` too.
    """
    rows = [{"source": f"name : Rudibis | length : {i}", "target": "It is a bridge.\nIt is long."}
            for i in range(300)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main(["--data", str(tmp_path / "my.jsonl"), "--model", "tiny-gpt2", "--steps", "100",
                "--lr", "3e-3", "--prefix-len", "5", "--device", "cpu", "--out",
                str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "prefix     It is a bridge.\nIt is long.\nreference" in shown, shown
    sample.main(["--run", str(tmp_path / "run"), rows[7]["source"], "--device", "cpu"])
    assert capsys.readouterr().out == "It is a bridge.\nIt is long.\n"


def test_an_empty_text_is_not_an_absent_one(trained, model_directory, capsys, monkeypatch):
    """Would catch: a program that asks, and so eats the lines of the loop that calls it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the next line of a loop\n"))
    model, tokenizer = load(model_directory), load_tokenizer(model_directory)
    row, = generate(model, [[EOS]], Constraints(EOS, 12))
    assert output(capsys, "--model", str(model_directory), "") == tokenizer.text_of(row) + "\n"
    assert output(capsys, "--run", trained, "").count("\n") == 1
    with pytest.raises(ValueError, match="which cannot be read"):
        output(capsys, "--run", trained, "--input", "")
    assert sys.stdin.read() == "the next line of a loop\n"
    generator = sample.Generator(sample.Settings(model=str(model_directory), device="cpu",
                                                 max_new_tokens=12))
    generator.model.generation_config = {"bos_token_id": 65}            # as of a Llama
    assert generator.prompt("", model.empty_prefix()) == [65]


def test_the_frozen_model_continues_a_text(trained, model_directory, capsys):
    """Would catch: a prefix in front of the frozen model, or a source's frame around plain text."""
    tokenizer, model = load_tokenizer(model_directory), load(model_directory)
    row, = generate(model, [tokenizer.encode("Hello")], Constraints(EOS, 12))
    text = output(capsys, "--model", str(model_directory), "Hello")
    assert text == tokenizer.decode(row).strip() + "\n"
    assert text != output(capsys, "--run", trained, "Hello")


def test_the_seed_decides_what_is_drawn(trained, capsys):
    """Would catch: a generator that is not seeded, or not used."""
    draw = functools.partial(output, capsys, "--run", trained, "--temperature", "1.5", "n : 3",
                             "--seed")
    assert draw("1") == draw("1") != draw("2")


def test_the_flags_reach_the_decoder(trained, model_directory, capsys, monkeypatch):
    """Would catch: a flag that is read and then forgotten."""
    one = functools.partial(output, capsys, "--run", trained, "n : 3")
    greedy = one()
    assert one("--temperature", "9", "--top-k", "1") == greedy != one("--temperature", "9")
    assert one("--temperature", "9", "--top-p", "1e-9") == greedy
    assert "i" in greedy and "i" not in one("--ban", "i")


def test_the_settings_reach_the_decoder(trained, model_directory, monkeypatch):
    """Would catch: a flag that is read and then forgotten."""
    def generator(**settings):
        return sample.Generator(sample.Settings(device="cpu", **settings))
    constraints = generator(run=[trained], max_new_tokens=12, min_new_tokens=3,
                            no_repeat_ngram_size=4).constraints
    assert constraints == Constraints(EOS, 12, 3, (), 4)
    calls = []
    monkeypatch.setattr(sample, "beam_search",
                        lambda state, *rest: calls.append(rest) or [([1], 0.0)])
    beams = generator(run=[trained], num_beams=3, length_penalty=0.7, early_stopping="never",
                      max_new_tokens=5)
    beams.generate(["n : 3"])
    assert calls == [(beams.constraints, 3, 0.7, "never")]


def test_the_attention_of_the_model_is_the_one_that_is_used(model):
    """Would catch: a form from fast/ that is set on the model, and decoding that goes past it."""
    calls = []

    class Counted(ExplicitAttention):
        def __call__(self, *inputs):
            calls.append(1)
            return super().__call__(*inputs)
    model.attention = Counted()
    generate(model, [[1, 2, 3]], Constraints(EOS, 2))
    assert len(calls) == 2 * 3                      # two tokens, three layers


def test_forced_tokens_come_from_the_models_config(model_directory, tmp_path):
    """Would catch: texts of a BART without the <s> and </s> that the model's makers force."""
    shutil.copytree(model_directory, tmp_path / "model")
    about = read_json(tmp_path / "model/config.json")
    about["generation_config"] = {"forced_bos_token_id": 65, "forced_eos_token_id": 66}
    write_json(tmp_path / "model/config.json", about)
    generator = sample.Generator(sample.Settings(model=str(tmp_path / "model"), device="cpu",
                                                 max_new_tokens=3))
    assert generator.constraints.forced_bos_token_id == 65
    assert generator.constraints.forced_eos_token_id == 66
    text, = generator.generate(["x"])
    assert text[0] == "A" and text[-1] == "B"


def test_a_long_text_is_continued_from_its_end(model_directory):
    """Of the frozen model alone. Would catch: the beginning kept, and the end cut off."""
    generator = sample.Generator(sample.Settings(model=str(model_directory), device="cpu",
                                                 max_new_tokens=10))
    ids = generator.prompt("x" * 60 + "end", generator.model.empty_prefix())
    assert bytes(ids) == b"x" * 51 + b"end"         # 64 positions


def test_prefixes_of_several_lengths_leave_each_other_room(model):
    """Would catch: the longest prefix added to the longest prompt of another row."""
    own = [torch.randn(3, 2, 1, 4, P, 6, dtype=torch.float64) for P in (20, 1)]
    rows = generate(model, [[1] * 5, [1] * 50], Constraints(EOS, 100, 100), own)
    assert [len(row) for row in rows] == [13, 13]   # 64 positions, 50 + 1 of them taken


def test_files_of_sources_come_from_everywhere(tmp_path):
    """Would catch: line ends of Windows in the source, a packed file taken for text."""
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert list(read_requests(tmp_path / "a.txt", ["r"])) == [("one", "r"), ("two", "r")]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"source": "x"}\n'))
    assert list(read_requests(tmp_path / "a.jsonl.gz", ["r"])) == [("x", "r")]


def test_the_line_breaks_of_gpt2_are_two_tokens(tmp_path):
    """Would catch: an empty line, a token of its own, in the middle of a text of one line."""
    try:
        tokenizer = load_tokenizer(tmp_path)
    except OSError as error:
        pytest.skip(f"GPT-2's vocabulary is not here: {error}")
    assert banned_tokens(tokenizer, paper.LINE_BREAKS) == (198, 628)


def test_summaries_are_decoded_as_the_official_code_does():
    """Its 11 and 62 count the token that BART starts from. Would catch: these numbers as they are.
    """
    assert paper.DECODING["xsum"] == dict(num_beams=6, min_new_tokens=10, max_new_tokens=61,
                                          length_penalty=0.8)
    assert paper.DECODING["e2e"] == dict(num_beams=5, min_new_tokens=5, max_new_tokens=100,
                                         length_penalty=1.0)


def test_prompts_that_cannot_be_continued_are_refused(model, prefix):
    """Would catch: an empty answer in silence, or a row that goes on from its padding."""
    for prompts in ([], [[]], [[], [1, 2]]):
        with pytest.raises(ValueError, match="got an empty prompt, or none"):
            generate(model, prompts, Constraints(EOS), prefix)
    with pytest.raises(ValueError, match="got a prefix of 5 and a prompt of 59 tokens"):
        generate(model, [[1] * 59], Constraints(EOS), prefix)


def test_a_source_that_is_too_long_is_cut_aloud(trained, capsys):
    """Would catch: a source cut in silence, or a failure for one line among thousands."""
    sample.main(["--run", trained, "--device", "cpu", "--max-new-tokens", "12", "x" * 80])
    assert "cut 36 tokens of 'xxx" in capsys.readouterr().err      # 80 + 3 of frame + 12 + P - 64


@pytest.mark.parametrize("arguments, words", [
    ([], "got neither of --run and --model"),
    (["--run", "RUN", "--model", "gpt2"], "got both of --run and --model"),
    (["--run", "nowhere", "x"], "got nowhere, which is no run"),
    (["--model", "tiny-gpt", "x"], "got the model 'tiny-gpt'.*did you mean tiny-gpt2"),
    (["--run", "RUN", "x", "--top-p", "0"], "got --top-p 0.0; expected a number from"),
    (["--run", "RUN", "x", "--top-k", "5"], "got --top-k or --top-p without --temperature"),
    (["--run", "RUN", "x", "--max-new-tokens", "60"], "leaves no room for a source"),
    (["--run", "RUN", "--input", "empty.txt"], "empty.txt, line 1: got the source ''"),
    (["--run", "RUN", "--input", "absent.txt"], "absent.txt"),
    (["--run", "RUN", "--input", "gap.txt"], "gap.txt, line 2: got the source ''"),
    (["--run", "RUN", "--input", "bad.jsonl", "--output", "."], "got --output ., which is no file"),
    (["--run", "RUN", "x", "--max-new", "-5"], "got --max-new-tokens -5; expected a number from 1"),
    (["--run", "RUN", "x", "--temperature", "nan"], "got --temperature nan"),
    (["--run", "RUN", "x", "--device", "meta"], "got --device meta, which PyTorch cannot use"),
    (["--run", "RUN", "--input", "bad.jsonl"], r"bad.jsonl, line 2: got the keys \['sauce'\]"),
    (["--run", "RUN", "--input", "latin.txt"], "latin.txt, line 1: got the byte 0xe9"),
    (["--run", "RUN", "--input", "gap.txt", "--output", "./gap.txt"], "gap.txt, which is --input"),
    (["--run", "RUN", "x", "--output", "o.txt"], "got --output without --input"),
    (["--run", "RUN", "x", "--input", "empty.txt"], "got a prompt and --input"),
    (["--run", "RUN", "x", "--temprature", "1"], "did you mean --temperature"),
])
def test_a_mistake_is_told_in_one_sentence(trained, arguments, words, tmp_path, monkeypatch):
    """Would catch: a traceback, or an output file that is begun and not finished."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gap.txt").write_text("n : 1\n\nn : 2\n")
    (tmp_path / "bad.jsonl").write_text('{"source": "x"}\n{"sauce": "y"}\n')
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises((ValueError, OSError), match=words):
        sample.main([trained if a == "RUN" else a for a in arguments])
    assert not (tmp_path / "o.txt").exists()
    assert (tmp_path / "gap.txt").read_text() == "n : 1\n\nn : 2\n"


def test_texts_are_not_written_under_the_name_of_a_table(tmp_path):
    """Would catch: bare lines in a file called .csv, where a comma makes two fields of a text."""
    (tmp_path / "in.txt").write_text("name : A\n")
    for name in ("out.csv", "out.JSON"):
        with pytest.raises(ValueError, match=f"got --output .*{name}; expected a .jsonl file"):
            sample.main(["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / name)])
