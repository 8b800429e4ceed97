"""A comparison is fair only where all learn the same from the same: a step beside peft's."""
import copy
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from data.batches import Pair
from prefix import Prefix
from scripts import bench, bench_data, bench_train, draw_speed
from scripts.bench_data import kinds_of_batches, make_case, some_pairs
from scripts.bench_train import added, multiplications, useful

SMALL = {"gpt2": dict(vocab_size=211, n_positions=128, n_embd=24, n_layer=2, n_head=4),
         "llama": dict(vocab_size=211, max_position_embeddings=128, hidden_size=24,
                       intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=6)}


@pytest.fixture(params=SMALL)
def name(request, monkeypatch):
    """Of an architecture, whose measured size is a small one."""
    if request.param != "gpt2":
        pytest.importorskip(f"{request.param}.model",
                            reason=f"the folder {request.param}/ is not here")
    monkeypatch.setitem(bench_train.SIZES[request.param], "cpu", SMALL[request.param])
    return request.param


def peft_or_skip():
    pytest.importorskip("peft", reason="ours is compared with it: pip install peft")
    pytest.importorskip("transformers", reason="ours is compared with it: pip install transformers")


def test_all_forms_have_the_same_loss_and_gradient(name):
    """Would catch: a peft that reads padding, another prefix or other weights, a loss on the source
    too; a trie whose targets see each other.
    """
    peft_or_skip()
    size = bench_train.size_of(name, torch.device("cpu"))
    model = bench_train.random_model(size, torch.device("cpu"), torch.float32)
    for parameter in model.parameters():        # far from where all words are equally likely
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.manual_seed(3)
    start = Prefix.for_model(model, bench_train.P, mid_dim=0)
    half = copy.deepcopy(model).to(torch.bfloat16)
    batches = kinds_of_batches(some_pairs("train", 211, ""), 8, 1, model)
    reference = bench_train.ours("reference", model, start)

    def off_of(frozen):
        forms = bench_train.all_forms(model, frozen, start, 8, compiled=False)
        return bench_train.differences(forms, reference, batches)
    off = off_of(model)
    assert {"ours, fast, shared", "peft, sdpa", "peft, eager, random"} <= off.keys()
    for form, (loss, gradient) in off.items():          # fp32's rounding over a few layers: 1e-6
        assert loss < 1e-5 and gradient < 1e-4, form
    off = off_of(half)
    assert {"ours", "peft, autocast", "peft, autocast, random"} <= off.keys()
    own = off["ours"]                           # bf16's rounding, as large as ours finds it
    for form, (loss, gradient) in off.items():
        assert loss < 10 * own[0] + 1e-3 and gradient < 3 * own[1], form


def test_the_tokens_of_a_batch_are_counted_without_padding(model):
    """Would catch: padding sold as speed; a shared source that counts as work done."""
    case = make_case([Pair([1, 2, 3, 4, 5], 3), Pair([1, 2, 3, 4], 3), Pair([7, 8], 1)], model)
    assert (case.n_tokens, case.n_read, case.n_labels) == (11, 8, 4)
    # The two sources, 3 + 1, and of the targets all but each one's last: 1 + 0 + 0. The 4 behind
    # the first source is learned twice.
    assert (case.n_nodes, case.n_learned) == (5, 3)
    assert case.ids.shape == (3, 5) and case.mask.sum() == 11
    assert case.labels.tolist() == [[-100, -100, -100, 4, 5], [-100, -100, -100, 4, -100],
                                    [-100, 8, -100, -100, -100]]


def test_the_limit_does_exactly_the_useful_multiplications(model):
    """Would catch: a limit that is too low or too high, so that we seem nearer to it or farther.
    """
    from torch.utils.flop_counter import FlopCounterMode
    case = make_case([Pair([1, 2, 3, 4, 5], 3), Pair([1, 2, 3, 6], 3)], model)
    with FlopCounterMode(display=False) as counted:
        multiplications(model)(case)
    assert counted.get_total_flops() == useful(model, case.n_read, case.n_labels)
    start = Prefix.for_model(model, 3, mid_dim=0).double()
    # One source that is read once, no padding: then only attention comes on top.
    pairs = [Pair([1, 2, 3, 4, 5, 6], 3), Pair([1, 2, 3, 4, 8, 7], 3)]
    form, case = bench_train.ours("tries", model, start, kind="tables"), make_case(pairs, model)
    with FlopCounterMode(display=False) as counted:
        form.loss(case).backward()
    config = model.config
    # q k^T and weights v: 2 T (P+S) C operations each, and backward each twice as many. In the
    # first layer nobody asks for the gradient of q.
    one = 2 * 6 * (3 + 6) * config.n_embd
    assert counted.get_total_flops() == useful(model, case.n_nodes, case.n_learned) + one * (
        6 * config.n_layer - 1)


def test_what_a_recording_reads_lives_as_long_as_it(model, monkeypatch):
    """As on a GPU. Would catch: the limit replayed over memory that is somebody else's by now."""
    alive = []

    def randn(*size, **options):
        alive.append(weakref.ref(made := torch.zeros(*size, dtype=torch.float64)))
        return made
    monkeypatch.setattr(bench_train, "replay_of", lambda once, device: once() or (lambda: None))
    case = make_case([Pair([1, 2, 3, 4, 5], 3)], model)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", randn)
        replay = bench_train.replayed(multiplications(model), [case], SimpleNamespace(type="cuda"))
    assert replay(case) is None and alive and all(buffer() is not None for buffer in alive)


def test_the_memory_of_a_step_is_its_fullest_moment():
    """Would catch: a sum over all tensors, or what is left at the end, in place of the peak."""
    def once():
        first = torch.ones(1000)
        second = torch.ones(2000)
        del first
        return second + torch.ones(500)[0]
    # Fullest: second (8000 bytes), the result (8000) and the 500 ones.
    assert added(once, torch.device("cpu")) == 4 * (2000 + 2000 + 500)


def test_a_row_of_figures_for_each_form_of_a_step(name, monkeypatch, tmp_path, capsys):
    """Would catch: a bench that fails after its minutes of work, a ratio upside down."""
    peft_or_skip()
    monkeypatch.setattr(bench_train, "CASES", {"cpu": {"4 pairs": (4, 1, None)}})
    out = tmp_path / "figures.jsonl"
    bench.main(["train", "--model", name, "--device", "cpu", "--rounds", "1", "--out", str(out)])
    copied, *rows, limit = [json.loads(line) for line in out.read_text().splitlines()]
    assert copied["GB/s"] > 0 and limit["GFLOP/s"] > 0 and copied["texts"].startswith("drawn")
    rates = {row["form"]: row["tokens/s"] for row in rows}
    best = max(rate for form, rate in rates.items() if form.startswith("peft"))
    assert {"ours", "ours, fast, checkpointed", "peft, sdpa", "peft, eager, random"} <= rates.keys()
    assert all(row["over best peft"] == row["tokens/s"] / best for row in rows)
    assert all(row["MB"] > 0 and row["loss off"] < 1e-5 for row in rows)
    assert "ours, fast, shared" in capsys.readouterr().out


def test_a_row_of_figures_for_each_number_of_upper_layers(name, tmp_path, capsys):
    """Would catch: figures beside the wrong number of layers, a ratio to something else."""
    out = tmp_path / "figures.jsonl"
    bench.main(["layers", "--model", name, "--device", "cpu", "--rounds", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    total = 2
    assert [row["layers"] for row in rows] == list(range(total, 0, -1))
    assert all(row["of"] == total for row in rows)
    for column in ("s/step", "MB"):
        for row in rows:
            assert row[f"{column} over all"] == pytest.approx(row[column] / rows[0][column])
    # The graph of a step ends at the lowest layer with a prefix, so less is kept.
    memory = [row["MB"] for row in rows]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == total > 1
    assert "upper layers" in capsys.readouterr().out


def test_the_dev_loss_is_the_same_with_each_source_read_once(name, monkeypatch, tmp_path):
    """Would catch: a comparison of a figure with another figure; a peft that reads padding."""
    peft_or_skip()
    monkeypatch.setitem(bench_data.TABLES, "dev", 2)
    out = tmp_path / "figures.jsonl"
    bench.main(["dev", "--model", name, "--device", "cpu", "--rounds", "1", "--out", str(out)])
    apart, once, *peft = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["form"] for row in (apart, once)] == ["ours", "ours, fast"]
    assert [row["form"] for row in peft] == ["peft, sdpa", "peft, eager"]
    for row in (apart, *peft):
        assert abs(once["loss"] - row["loss"]) < 1e-5           # fp32, in another order
    best = max(row["tokens/s"] for row in peft)
    assert all(row["over best peft"] == row["tokens/s"] / best for row in (apart, once, *peft))
    # There are 8 references for each table.
    assert apart["by multiplications"] == 1 < once["by multiplications"] < 8


def test_the_picture_tells_the_ratios_of_the_figures():
    """Would catch: a bar over the wrong form, sizes of batch mixed up, a limit upside down."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="it draws: pip install matplotlib")
    rows = [{"measure": "train", "dtype": "fp32", "what": what, "form": form, "tokens/s": rate,
             "of the limit": part, "MB": 10 * rate}
            for what, form, rate, part in (
                ("8 pairs", "ours", 300, 0.75), ("8 pairs", "peft, sdpa", 200, 0.5),
                ("40 pairs", "ours", 500, 0.8), ("40 pairs", "peft, sdpa", 250, 0.4))]
    rows += [{"measure": "decode", "dtype": "bf16", "what": "greedy", "form": form,
              "tokens/s": rate} for form, rate in (("ours", 60), ("peft, sdpa", 20),
                                                   ("peft, eager", 40))]
    figure = draw_speed.draw(rows)
    rates, memory, decoding = [[text.get_text().strip() for text in panel.texts]
                               for panel in figure.axes]
    pyplot.close(figure)
    assert rates[:4] == ["1.50 ×, 75%", "1.00 ×, 50%", "2.00 ×, 80%", "1.00 ×, 40%"]
    assert memory[:4] == ["3,000 MB", "2,000 MB", "5,000 MB", "2,500 MB"]
    assert decoding[0] == "1.50 ×\nbf16"


def test_a_flag_that_would_do_nothing_is_refused():
    """Would catch: figures of something else than what was asked for."""
    for given in (["decode", "--compile"], ["attention", "--data-dir", "x"], ["dev", "--compile"]):
        with pytest.raises(ValueError, match=f"got {given[0]} with --compile or --data-dir; expec"):
            bench.main(given)
