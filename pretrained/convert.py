"""Hugging Face checkpoints, by name or from disk -> weights/NAME; prefixes to and from PEFT.

    python -m pretrained.convert gpt2-medium                    downloads, checks, converts
    python -m pretrained.convert DIRECTORY --out weights/NAME   from config.json and its weights
    python -m pretrained.convert --run out/NAME --to-peft DIR   a prefix, for the package peft
    python -m pretrained.convert --from-peft DIR --model gpt2 --out out/NAME      and one of peft's

The prefix belongs to one frozen language model (Li & Liang 2021, section 4.2); this brings that
model in. Only the command line: hugging_face.py, hub.py and peft_adapter.py do the work.
"""
import dataclasses
from pathlib import Path

from pretrained.gguf_file import convert_gguf
from pretrained.hub import NAMES, PACKAGES, fetch
from pretrained.hugging_face import convert
from pretrained.load import WEIGHTS
from pretrained.peft_adapter import read_peft, write_peft
from utils.cli import flag, nearest, parse, run_program
from utils.terminal import command

KNOWN = (*NAMES, *PACKAGES)


@dataclasses.dataclass
class Settings:
    source: str = flag("", f"one of {', '.join(KNOWN)}; OWNER/NAME on the hub; a "
                           "directory with config.json and model.safetensors or "
                           "pytorch_model.bin; or a .gguf file")
    out: str = flag("", "the directory to write; empty: weights/ and the name of the source")
    run: str = flag("", "with --to-peft: the run of train.py whose prefix is wanted")
    to_peft: str = flag("", "write the prefix of --run to this directory, for the package peft")
    from_peft: str = flag("", "make a run, --out, of the prefix in this directory of peft's")
    model: str = flag("", "with --from-peft: its frozen model; left out: as peft's file names it")


def convert_prefix(settings):
    """A prefix to peft's format, or from it."""
    if settings.to_peft:
        others = settings.from_peft, settings.source, settings.out, settings.model
        if not settings.run or any(others):
            raise ValueError("got --to-peft; expected --run out/NAME beside it, and nothing else; "
                             "`python -m pretrained.convert --run out/NAME --to-peft DIR`")
        write_peft(settings.run, settings.to_peft)
        print(f"wrote {settings.to_peft}/adapter_config.json and adapter_model.safetensors; read "
              f"them with PeftModel.from_pretrained(model, {settings.to_peft!r})")
        return
    if not settings.out or settings.run or settings.source:
        raise ValueError("got --from-peft; expected --out out/NAME beside it, and --model; `python "
                         "-m pretrained.convert --from-peft DIR --model gpt2 --out out/NAME`")
    read_peft(settings.from_peft, settings.out, settings.model)
    print(f"wrote {settings.out}; decode with: "
          f"{command('sample.py', '--run', settings.out)}\ntrain on with: "
          f"{command('train.py', '--start-from', settings.out, '--data')} ...")


def main(argv=None):
    settings = parse(Settings, argv, "Hugging Face files -> weights/NAME", positional="source")
    if settings.to_peft or settings.from_peft:
        convert_prefix(settings)
        return
    if settings.run or settings.model:
        raise ValueError("got --run or --model, which belong to --to-peft DIR and --from-peft DIR; "
                         "expected one of these beside; add it, or leave the other out")
    source = settings.source
    out = Path(settings.out or WEIGHTS / Path(source).resolve().name.removesuffix(".gguf"))
    if source and Path(source).resolve() == out.resolve():
        raise ValueError(f"got {out} to read and to write; expected two directories, for both have "
                         "a config.json; choose another one with --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"got {out} to write, which is a file; expected a new directory; choose "
                         "another one with --out")
    # Anything that is there could be another model's, as an old tokenizer; hf is of an earlier try.
    there = sorted(path.name for path in out.iterdir() if path.name != "hf") if out.exists() else []
    if there:
        raise ValueError(f"got {out}, which has a {there[0]} already; expected a new directory; "
                         "choose another one with --out, or delete that one first")
    folder = source and Path(source).is_dir()
    if folder and ((Path(source) / "config.json").exists() or source not in KNOWN):
        convert(source, out)
    elif source.endswith(".gguf") and Path(source).is_file():
        convert_gguf(source, out)
    elif source in KNOWN or source.count("/") == 1 and not source.startswith("."):
        fetch(source, out)
    else:
        raise ValueError(f"got {source!r}; expected a directory, a .gguf file, OWNER/NAME on the "
                         f"hub or one of {', '.join(KNOWN)}; " + nearest(
                             source, KNOWN, "`python -m pretrained.convert --help` has more"))
    print(f"wrote {out}/config.json and {out}/model.pt")


if __name__ == "__main__":
    run_program(main)
