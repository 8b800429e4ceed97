"""A Llama's prefix goes to the package peft and comes back: of the few key-value heads.

peft knows two widths of such a model: what its prefix has is the one of keys and values.
"""
import json

import pytest
import torch
from llama_cases import SHAPES, difference, in_ours, their_llama

from decoding.constraints import Constraints
from pretrained import convert
from pretrained.checkpoint import save
from pretrained.load import load_model
from pretrained.run_directory import load_prefix, save_prefix
from sample import generate

pytest.importorskip("safetensors", reason="peft's files: pip install safetensors")
peft = pytest.importorskip("peft", reason="the oracle: pip install peft")
EOS = 1


@pytest.fixture(params=SHAPES)
def both(request, tmp_path, bytes_tokenizer):
    """A random Llama of transformers, the directory of ours with its weights, and ours."""
    theirs = their_llama(vocab_size=300, **SHAPES[request.param])
    save_with_tokenizer(in_ours(theirs), tmp_path / "llama", bytes_tokenizer)
    return theirs, tmp_path / "llama", load_model(str(tmp_path / "llama"), "cpu", "fp32")[0]


def save_with_tokenizer(model, directory, tokenizer):
    model.generation_config = {"eos_token_id": EOS}
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))       # config.json has its checksum
    save(model, directory)


def same(theirs, ours, prefix):
    """The same logits and the same greedy texts, with their adapter and with our prefix."""
    torch.manual_seed(2)
    prompts = torch.randint(2, 256, (3, 7))                                     # (B, T)
    ones = torch.ones_like(prompts)
    wanted = theirs(prompts, attention_mask=ones).logits                        # (B, T, V)
    found = ours.head(ours.hidden_states(prompts, prefix))                      # (B, T, V)
    assert difference(found, wanted) < 1e-4                                     # fp32
    assert difference(ours.head(ours.hidden_states(prompts)), wanted) > 1e-2    # it does something
    texts = theirs.generate(input_ids=prompts, attention_mask=ones, max_new_tokens=12,
                            do_sample=False)[:, 7:].tolist()
    texts = [row[:row.index(EOS)] if EOS in row else row for row in texts]
    assert generate(ours, prompts.tolist(), Constraints(EOS, 12), prefix) == texts


def test_peft_reads_what_we_write(both, tmp_path):
    """Would catch: the query heads in peft's config, a width that is the model's."""
    theirs, directory, ours = both
    L, _, _, G, _, D = ours.empty_prefix().shape
    torch.manual_seed(1)
    prefix = torch.randn(L, 2, 1, G, 4, D)
    save_prefix(tmp_path / "run" / "prefix.pt", prefix, ours)
    about = {"settings": {"model": str(directory), "data": "x", "data_dir": ""}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    convert.main(["--run", str(tmp_path / "run"), "--to-peft", str(tmp_path / "peft")])
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    same(theirs, ours, prefix)
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for name in ("token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size"):
        assert about[name] == getattr(theirs.peft_config["default"], name), name
    convert.main(["--from-peft", str(tmp_path / "peft"), "--model", str(directory),
                  "--out", str(tmp_path / "back")])
    assert torch.equal(load_prefix(tmp_path / "back" / "prefix.pt", ours), prefix)


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_we_read_what_peft_writes(both, tmp_path, projection):
    """Would catch: a check of heads or width that refuses what peft says of grouped heads."""
    theirs, directory, ours = both
    torch.manual_seed(3)
    theirs = peft.get_peft_model(theirs, peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection)).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data += torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "peft")
    convert.main(["--from-peft", str(tmp_path / "peft"), "--model", str(directory),
                  "--out", str(tmp_path / "run")])
    same(theirs, ours, load_prefix(tmp_path / "run" / "prefix.pt", ours))


def test_a_prefix_of_all_query_heads_is_refused(tmp_path, bytes_tokenizer):
    """As old versions of peft made them. Would catch: numbers that are put into other heads."""
    theirs = their_llama(vocab_size=300, **SHAPES["6 heads over 2"])
    save_with_tokenizer(in_ours(theirs), tmp_path / "llama", bytes_tokenizer)
    from safetensors.torch import save_file
    (tmp_path / "peft").mkdir()
    save_file({"prompt_embeddings": torch.randn(5, 2 * 3 * 48)},
              tmp_path / "peft" / "adapter_model.safetensors")
    about = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5,
             "token_dim": 48, "num_layers": 3, "num_attention_heads": 6}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="'token_dim': 48, .*expected .*'token_dim': 16, "):
        convert.main(["--from-peft", str(tmp_path / "peft"), "--model", str(tmp_path / "llama"),
                      "--out", str(tmp_path / "run")])
