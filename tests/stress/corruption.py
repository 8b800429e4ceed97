"""One flipped bit in each file that is read: refused, harmless, or other numbers without a word?

    python tests/stress/corruption.py --count 200

For each file, `count` bits at random places, one at a time. "refused": an error in one line.
"mended": put back from resume.pt, and said. "same": what is loaded is the same, the bit meant
nothing. "other": it is not. The last must be 0 for every file that has a checksum; files of others
have none of their own, and their rows are for information.
"""
import contextlib
import dataclasses
import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import torch
from common import (
    METHODS,
    empty_folder,
    end,
    equal,
    finished,
    make_task,
    parse,
    tensors_in,
    write_vocabulary,
)
from conftest import random_bart, random_gpt2

import train
from pretrained.checkpoint import load, save
from pretrained.hugging_face import convert
from pretrained.load import load_model
from pretrained.peft_adapter import read_peft, write_peft
from pretrained.run_directory import COPIED, load_prefix, load_run, load_state, run_settings

TEXT = "n : 7 | it is, e.g., 9"


def model_and_text(model, tokenizer):
    """Everything that a model's directory says."""
    return {**model.state_dict(), "config": str(dataclasses.asdict(model.config)),
            "generation": str(model.generation_config), "fingerprint": model.fingerprint,
            "ids": str(tokenizer.encode(TEXT)), "text": tokenizer.decode(tokenizer.encode(TEXT)),
            "words": str([tokenizer.decode([n]) for n in range(tokenizer.max_id + 1)])}


def load_converted(source):
    """A Hugging Face directory, as `convert` reads it."""
    shutil.rmtree("converted", ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        convert(source, "converted")
    return load("converted").state_dict()


def load_peft(source, model):
    shutil.rmtree("from-peft", ignore_errors=True)
    read_peft(source, "from-peft", model)
    return {"prefix": load_prefix("from-peft/prefix.pt", load_model(model, "cpu", "fp32")[0])}


def state_and_files(run, saved):
    """What --resume goes on from, and the files that it leaves beside. saved: resume.pt, whole."""
    shutil.rmtree("going-on", ignore_errors=True)
    shutil.copytree(run, "going-on")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        settings = train.Settings(**saved["settings"] | {"out": "going-on"})
        state = load_state(settings, saved["fingerprint"], saved["data"])
    files = {name: (Path("going-on") / name).read_bytes() for name in COPIED
             if (Path("going-on") / name).exists()}
    return tensors_in(state) | files, "put back" in said.getvalue()


def make_others(folder):
    """Files of other programs: [(file, how it is loaded)], as far as their packages are there."""
    hf, peft, other = folder / "hf", folder / "peft", []
    hf.mkdir()
    model = random_gpt2(vocab_size=61, n_positions=33, n_embd=12, n_layer=2, n_head=3).float()
    state = {name: tensor.t().contiguous() if name.endswith((
        "c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
        for name, tensor in model.state_dict().items()}
    (hf / "config.json").write_text(json.dumps({
        "model_type": "gpt2", **dataclasses.asdict(model.config), "activation_function":
        "gelu_new"}))
    torch.save(state, hf / "pytorch_model.bin")
    other += [(hf / "config.json", lambda: load_converted(hf), False),
              (hf / "pytorch_model.bin", lambda: load_converted(hf), True)]
    try:
        import safetensors.torch
    except ImportError:
        print("safetensors is not installed: no row for its files")
        return other
    st = folder / "hf-safetensors"
    st.mkdir()
    shutil.copy(hf / "config.json", st)
    safetensors.torch.save_file(state, st / "model.safetensors")
    with contextlib.redirect_stdout(io.StringIO()):
        write_peft("whole", peft)
    theirs = folder / "theirs"
    shutil.copytree(peft, theirs)
    name = "adapter_model.safetensors"          # as peft writes it: without our checksum
    safetensors.torch.save_file(safetensors.torch.load_file(peft / name), theirs / name)
    other.append((st / "model.safetensors", lambda: load_converted(st), False))
    base = str(folder / "bytes")
    other += [(theirs / name, lambda: load_peft(theirs, base), False),
              (peft / name, lambda: load_peft(peft, base), True)]
    return other


def files(folder):
    """[(file, how it is loaded, whether it has a checksum)]."""
    task = make_task(folder)
    finished([*task, *METHODS["prefix"], "--out", "whole"])
    finished([*task, *METHODS["finetune"], "--out", "tuned"])
    write_vocabulary(folder / "bart")
    (folder / "bart" / "dict.txt").write_text("".join(f"{256 - n} 1\n" for n in range(257)))
    save(random_bart().float(), folder / "bart")
    bytes_model = str(folder / "bytes")
    frozen = load_model(bytes_model, "cpu", "fp32")[0]
    saved = torch.load("whole/resume.pt", weights_only=True)
    found = [("whole/config.json", lambda: run_settings("whole"), True),
             ("whole/prefix.pt", lambda: {"p": load_prefix("whole/prefix.pt", frozen)}, True),
             ("whole/log.jsonl", lambda: state_and_files("whole", saved), True),
             ("whole/resume.pt", lambda: state_and_files("whole", saved), True)]
    found += [(f"tuned/model/{name}", lambda: load_run("tuned", "cpu", "fp32")[0].state_dict(),
               True) for name in ("config.json", "model.pt")]
    found += [(f"bytes/{name}", lambda: model_and_text(*load_model(bytes_model, "cpu", "fp32")),
               True) for name in ("config.json", "model.pt", "tokenizer.tiktoken")]
    found += [("bart/dict.txt", lambda: model_and_text(*load_model("bart", "cpu", "fp32")), True)]
    return found + make_others(folder)


def outcome(read, right):
    """How a load went: a word of the table, or the error that should never be."""
    mended = False
    try:
        found = read()
    except (ValueError, OSError):
        return "refused"
    except Exception as error:                  # a traceback for the user
        return f"error: {type(error).__name__}: {str(error)[:60]}"
    if isinstance(found, tuple):
        found, mended = found
        right = right[0]
    same = found.keys() == right.keys() and all(equal(found[k], right[k]) for k in right)
    return "other" if not same else "mended" if mended else "same"


def main():
    args, failures, rng, total = parse(__doc__, 200), [], random.Random(0), Counter()
    words = ("refused", "mended", "same", "other", "error")
    with empty_folder() as folder, contextlib.redirect_stderr(io.StringIO()):
        print(f"{args.count} flips in each".ljust(44) + "".join(word.rjust(9) for word in words))
        for path, read, summed in files(folder):
            whole, right, counts = Path(path).read_bytes(), read(), dict.fromkeys(words, 0)
            for _ in range(args.count):
                place = rng.randrange(8 * len(whole))
                damaged = bytearray(whole)
                damaged[place // 8] ^= 1 << place % 8
                Path(path).write_bytes(damaged)
                found = outcome(read, right)
                counts[found.split(":")[0]] += 1
                total[found.split(":")[0]] += 1
                if found.startswith("error") or summed and found == "other":
                    failures.append(f"{path}, bit {place}: {found}")
            Path(path).write_bytes(whole)
            name = f"{Path(path).parent.name}/{Path(path).name}" + ("" if summed else " (no sum)")
            print(name.ljust(44) + "".join(str(counts[word]).rjust(9) for word in words))
    end("flipped bits", failures, refused=total["refused"], mended=total["mended"])


if __name__ == "__main__":
    main()
