"""Of two processes that write the same files the second is refused, whichever program it is."""
import shutil
import subprocess
import sys

from conftest import ROOT

import train
from pretrained.load import load_model
from pretrained.run_directory import create, save_prefix
from utils.files import lock, make_folder

DOORS = """
import sys
sys.path.insert(0, sys.argv[1])
import train
from pretrained.run_directory import remove_unsaved, save_state, mend
from scripts import claims, evaluate, pretrain, real_data, tune
cpu = ["--device", "cpu"]
doors = {
    "evaluate": lambda: evaluate.main(["--run", "run", "--examples", "1", *cpu]),
    "pretrain": lambda: pretrain.main(["--out", "pretrain", *cpu]),
    "tune": lambda: tune.main(["--data", "world", "--out", "tune", *cpu]),
    "real_data": lambda: real_data.main(["--out", "real", "--results", "a/rows.jsonl"]),
    "its rows": lambda: real_data.main(["--out", "new", "--results", "rows/a.jsonl"]),
    "claims": lambda: claims.main(["--results", "rows/a.jsonl"]),
    "remove": lambda: remove_unsaved("run"), "mend": lambda: mend("saved")}
for name, door in doors.items():
    try:
        door()
        print(name, "was let in")
    except ValueError as error:
        print(name, "refused" if "another process is writing" in str(error) else error)
"""


def test_a_second_process_is_refused_everywhere(tmp_path, monkeypatch):
    """Would catch: lines of two calls in one file of results, a run that is removed while another
    process trains it.
    """
    monkeypatch.chdir(tmp_path)
    model, _ = load_model("tiny-gpt2", "cpu", "fp32")
    create(train.Settings(out="run", data="world"), "", model)
    save_prefix(tmp_path / "run" / "prefix.pt", model.empty_prefix(), model)
    shutil.copytree("run", "saved", ignore=shutil.ignore_patterns(".lock"))     # reading frees it
    (tmp_path / "saved" / "resume.pt").touch()
    for name in ("pretrain/.lock", "tune/.lock", "real/.lock", "rows/.a.lock", "run/.test.lock",
                 "saved/.lock"):
        make_folder((tmp_path / name).parent)
        lock(tmp_path / name)
    ended = subprocess.run([sys.executable, "-c", DOORS, ROOT], capture_output=True, text=True)
    said = ended.stdout.splitlines()
    assert len(said) == 8 and all(line.endswith(" refused") for line in said), said + [ended.stderr]
    assert (tmp_path / "run" / "prefix.pt").exists()
