"""Pictures of a run: lambda is what the weights say, and the page is whole by itself."""
import html.parser
import json
import shutil
import sys

import numpy
import pytest
import torch
from conftest import random_bart, random_gpt2, random_llama, some_pairs, some_prefix

import train
from model import ExplicitAttention, attend, attention_mask
from prefix import tensors_of
from scripts import draw, draw_claims
from scripts.attention_shares import RecordedAttention, attention_shares
from scripts.drawing import save_pictures

MODELS = {"gpt2": random_gpt2, "llama": random_llama, "bart": random_bart}
VOID = {"meta", "img", "br"}


@pytest.fixture(params=MODELS)
def case(request):
    """(model, its prefix or three of them, a pair of texts)."""
    pytest.importorskip("llama" if request.param == "llama" else "bart")
    model = MODELS[request.param]()
    return model, some_prefix(model).fold(), some_pairs()[3]


class Noted(ExplicitAttention):
    """Keeps what every call is given."""

    def __init__(self):
        self.calls = []

    def __call__(self, *given):
        self.calls.append(given)
        return attend(*given)


def test_lambda_is_the_sum_of_the_weights_over_the_prefix(case):
    """By hand, in numpy, for every layer, head and token. Would catch: a sum over the wrong keys, a
    mask that is left out, a layer or one of BART's three places taken for another.
    """
    model, prefix, pair = case
    found = attention_shares(model, prefix, pair)
    model.attention = noted = Noted()
    ids = {place: torch.tensor([tokens]) for place, (tokens, _) in found.items()}
    inputs = {"ids": ids["decoder"], "source": ids["encoder"]} if len(ids) == 3 else {
        "ids": ids["prefix"]}
    model.hidden_states(**inputs, prefix=prefix)
    n_calls = 0
    for place, part in zip(found, tensors_of(prefix)):
        assert found[place][1].shape[0] == len(part)
        for layer, shares in enumerate(found[place][1]):        # (H, T)
            groups = shares.size(0) // part.size(3)     # query heads of a key-value head
            (q, k, _, pk, _, mask), = [given for given in noted.calls if torch.equal(
                given[3][:, ::groups], part[layer, 0])]
            keys, n_calls = numpy.concatenate([pk[0], k[0]], 1), n_calls + 1    # (H, P+S, D)
            weights = numpy.exp(q[0].numpy() @ keys.swapaxes(1, 2) / q.size(-1) ** 0.5)
            weights = weights * mask[0].numpy()                         # (H, T, P+S)
            by_hand = weights[:, :, :5].sum(2) / weights.sum(2)
            assert 0 < by_hand.min() < by_hand.max() - 0.05             # lambda differs
            assert numpy.allclose(shares, by_hand, atol=1e-6)           # kept in fp32
    assert n_calls == len(noted.calls)


def test_layers_below_a_prefix_of_the_upper_ones_give_it_nothing(case):
    """Would catch: BART's encoder layers counted by its prefix, which may have fewer."""
    model, prefix, pair = case
    upper = tuple(part[1:] for part in tensors_of(prefix))
    upper = prefix._make(upper) if isinstance(prefix, tuple) else upper[0]
    for (_, shares), part in zip(attention_shares(model, upper, pair).values(),
                                 tensors_of(prefix)):
        assert len(shares) == len(part) and not shares[0].any() and (shares[1:] > 0).all()


def test_a_head_says_lambda_of_what_the_prefix_says():
    """The mixture of He et al. 2021. Would catch: a lambda that is no share of the output."""
    torch.manual_seed(5)
    q, k, v = torch.randn(3, 1, 2, 4, 8)                                        # (1, 2, 4, 8) each
    pk, pv = torch.randn(2, 1, 2, 3, 8)
    none, mask = pk[:, :, :0], attention_mask(torch.ones(1, 7, dtype=torch.bool), 4, True)
    form = RecordedAttention()
    y, share = form(q, k, v, pk, pv, mask), form.shares[0][..., None]
    text = attend(q, k, v, none, none, mask[..., 3:])
    prefix = attend(q, pk, pv, none, none, mask[..., :3])
    assert torch.allclose(y, (1 - share) * text + share * prefix, atol=1e-6)    # fp32's rounding


def test_a_prefix_of_length_0_gets_0_and_nothing_else_changes(case):
    """Would catch: a picture for a run without a prefix, a model that goes on recording, other
    logits while it is recorded.
    """
    model, prefix, pair = case
    usual = model.attention
    for _, shares in attention_shares(model, model.empty_prefix(), pair).values():
        assert shares.numel() and not shares.any()
    if isinstance(prefix, tuple):               # in one place only: nothing in the others
        only = model.empty_prefix()._replace(cross=prefix.cross)
        sums = {place: shares.sum() for place, (_, shares) in attention_shares(
            model, only, pair).items()}
        assert sums["encoder"] == sums["decoder"] == 0 < sums["cross"]
    assert model.attention is usual
    inputs = {"ids": torch.tensor([pair.ids])} | (
        {"source": torch.tensor([pair.ids])} if isinstance(prefix, tuple) else {})
    plain = model.hidden_states(**inputs, prefix=prefix)
    model.attention = RecordedAttention()
    assert torch.equal(model.hidden_states(**inputs, prefix=prefix), plain)


def test_the_learning_rate_is_drawn_as_it_was():
    """Would catch: a schedule of its own in the picture."""
    assert draw.learning_rates({"lr": 8.0, "steps": 4, "warmup": 0}) == [8, 6, 4, 2]
    assert draw.learning_rates({"lr": 8.0, "steps": 4, "warmup": 2}) == [4, 8, 8, 4]


# ---- the page

class Page(html.parser.HTMLParser):
    """Every element is closed where it was opened; what the page refers to is kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in (
            "src", "href", "srcset", "data", "action", "poster")]
        self.open += [tag] if tag not in VOID else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_directory, bart_directory):
    """{name: a run of three steps} on a task with signs of HTML."""
    tmp_path = tmp_path_factory.mktemp("runs")
    rows = [{"source": f"<b>{n} & $x", "target": f"a <i> {n}"} for n in range(20)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prefix = ["--prefix-len", "4", "--mid-dim", "8"]
    for name, directory, flags in (("gpt2", model_directory, prefix), ("bart", bart_directory,
                                   prefix), ("tuned", model_directory, ["--method", "finetune"])):
        train.main(["--model", str(directory), "--data", str(tmp_path / "my.jsonl"), "--steps", "3",
                    "--device", "cpu", "--lr", "1e-2", "--out", str(tmp_path / name), *flags])
    return {name: tmp_path / name for name in ("gpt2", "bart", "tuned")}


def test_the_page_is_whole_by_itself(runs, tmp_path):
    """Would catch: a script, a picture or a font from elsewhere; a text read as HTML; a lambda or
    a score that is not on it.
    """
    pytest.importorskip("matplotlib", reason="it draws: pip install matplotlib")
    scores = {"data": "my", "split": "test", "scores": {"all": {"tables": 3, "BLEU": 12.345}}}
    (runs["bart"] / "test.scores.json").write_text(json.dumps(scores))
    draw.main([str(runs["bart"]), "--examples", "2", "--device", "cpu", "--out", str(tmp_path),
               "--max-new-tokens", "20"])
    source = (tmp_path / "page.html").read_text("utf-8")
    found = Page(source)
    text = " ".join(found.text)
    assert source.startswith("<!DOCTYPE html>") and not {"script", "link"} & set(found.tags)
    assert len(found.links) == 2 and "url(" not in source and "http://" not in source
    assert all(link.startswith("data:image/svg+xml;base64,") for link in found.links)
    assert "<b>" not in source and "& $x" in text
    assert "without the prefix" in text and "prefix_len" in text
    assert all(f"λ of the {place}," in text for place in ("encoder", "decoder", "cross"))
    assert "12.35" in text or "12.34" in text
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("lambda.png", "loss.png"))


def test_runs_that_lack_something_have_a_page_too(runs, tmp_path, model_directory):
    """Fine-tuning has no prefix, a prefix of peft's no log. Would catch: lambda or "before" of
    nothing, a page that asks for what is not there.
    """
    flags = ["--examples", "2", "--device", "cpu", "--max-new-tokens", "9", "--out", str(tmp_path)]
    draw.main([str(runs["tuned"]), *flags])
    text = " ".join(Page((tmp_path / "page.html").read_text("utf-8")).text)
    assert "with finetune" in text and "λ" not in text and "without the prefix" not in text
    shutil.copy(runs["gpt2"] / "prefix.pt", tmp_path / "prefix.pt")
    settings = {"model": str(model_directory), "data": "", "data_dir": "", "method": "prefix"}
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings, "fingerprint": "?"}))
    with pytest.raises(ValueError, match="got the data ''"):
        draw.main([str(tmp_path), *flags])
    draw.main([str(tmp_path), *flags, "--data", str(runs["gpt2"].parent / "my.jsonl")])
    text = " ".join(Page((tmp_path / "page.html").read_text("utf-8")).text)
    assert "λ of the prefix," in text and "Loss" not in text


def test_without_matplotlib_the_rest_is_done_and_it_is_said(runs, tmp_path, monkeypatch, capsys):
    """Would catch: no table and no page because there is no picture; a picture missed in silence.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw.main([str(runs["gpt2"]), "--examples", "2", "--device", "cpu", "--max-new-tokens", "20"])
    err = capsys.readouterr().err
    assert err.count("matplotlib, so") == err.count("pip install matplotlib") == 1
    assert "loss.png" in err and "lambda.png" in err
    found = Page((runs["gpt2"] / "page.html").read_text("utf-8"))
    assert not found.links and "λ of the prefix," in " ".join(found.text)
    assert not list(runs["gpt2"].glob("*.png"))
    page = tmp_path / "page.md"
    page.write_text("<!-- claims -->\n<!-- end of claims -->")
    draw_claims.main(["--page", str(page), "--picture", str(tmp_path / "claims.png")])
    assert "| near | 50 |" in page.read_text() and "claims.png" in capsys.readouterr().err
    assert not save_pictures({tmp_path / "x.png": (draw.draw_losses, [], {})})
