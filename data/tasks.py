"""The tasks by name: where their files are, how they get here, which part is train, dev and test.

A task is a list of Examples. Training takes each (source, target) as a pair of its own, so that
E2E's train split gives the 42,061 pairs of the official file; dev and test are decoded once an
Example and scored against all its targets.
An Example is one distinct table in E2E, whose file has a line for each reference, and one entry of
the official file in WebNLG and DART: these are scored by entry, equal tables included.
Not here: the formats of the files (formats.py), summarising (summaries.py), the invented world
(toy_world/), how long a text may be (causal.py, seq2seq.py).
"""
from pathlib import Path

from data import formats, own, summaries
from data.example import examples, gather, without_blanks
from data.toy_world import headlines, tables
from utils.cli import nearest
from utils.files import fetch_file

SPLITS = ("train", "dev", "test")
E2E = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
DART = "https://raw.githubusercontent.com/Yale-LILY/dart/master/data/v1.1.1/"
# The release itself is XML; the paper's repository has it in one JSON file a split, at this commit.
WEBNLG = ("https://raw.githubusercontent.com/XiangLi1999/PrefixTuning/"
          "6519d30e69b15a180f23e2cd41b766d3f62b8e82/data/webnlg_challenge_2017/")

# Task and split: where the official file is, its SHA-256, and the names under which it is looked
# for (each also with .gz; the first is the name that a download gets).
FILES = {
    ("e2e", "train"): (E2E + "trainset.csv",
                       "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
                       ("trainset.csv",)),
    ("e2e", "dev"): (E2E + "devset.csv",
                     "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
                     ("devset.csv",)),
    ("e2e", "test"): (E2E + "testset_w_refs.csv",
                      "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
                      ("testset_w_refs.csv",)),
    ("webnlg", "train"): (WEBNLG + "train.json",
                          "180edb6011360608c8548d4551366a9d55f140cbf9bc9397fbf4d97f6a89c639",
                          ("webnlg_challenge_2017_train.json", "train.json",
                           "webnlg_challenge_2017/train", "train")),
    ("webnlg", "dev"): (WEBNLG + "dev.json",
                        "50f5a2c24d760bc84ba3e852707cd3b43b0cf2da035b425f87945a2440880488",
                        ("webnlg_challenge_2017_dev.json", "dev.json",
                         "webnlg_challenge_2017/dev", "dev")),
    ("webnlg", "test"): (WEBNLG + "test.json",
                         "2574896b23b5959d1a0cd4bb501ffbeff1a11790a9996c4cb8efed289149ff4f",
                         ("webnlg_challenge_2017_test.json", "test.json",
                          "webnlg_challenge_2017/test/testdata_with_lex.xml",
                          "test/testdata_with_lex.xml")),
    ("dart", "train"): (DART + "dart-v1.1.1-full-train.json",
                        "0671b56f4b090ccf1c0187364d45c6f1214421d6f1081a21800596860f314e70",
                        ("dart-v1.1.1-full-train.json", "dart-v1.1.1-full-train.jsonl")),
    ("dart", "dev"): (DART + "dart-v1.1.1-full-dev.json",
                      "5038f3543b6d59b94ac4e3f69d15a0b01d8578913f862142e7c560200dd6e434",
                      ("dart-v1.1.1-full-dev.json", "dart-v1.1.1-full-dev.jsonl")),
    ("dart", "test"): (DART + "dart-v1.1.1-full-test.json",
                       "c772553b482dd5fc7b8ad90d68889062a2603e28d4449ee1f162006819e0565e",
                       ("dart-v1.1.1-full-test.json", "dart-v1.1.1-full-test.jsonl")),
}
DOWNLOADS = Path(__file__).parent / "downloads"
WORLDS = ("world", "world-hard", "world-headlines")
NAMES = (*WORLDS, "e2e", "webnlg", "dart", *summaries.NAMES)

# WebNLG's categories that train has. The test set has five more; "unseen" is the score on those.
WEBNLG_SEEN = frozenset(("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food",
                         "Monument", "SportsTeam", "University", "WrittenWork"))


def guess(got, expected):
    """The end of an error message: what was expected, and what was probably meant."""
    return f"{', '.join(expected)}; {nearest(got, expected, 'choose one')}"


def official_file(name, split, data_dir):
    """The path of an official file: in `data_dir` if one is given, else downloaded once and kept.

    The SHA-256 is not checked for files in `data_dir`, nor for a file under another of its names:
    these are the user's own choice.
    """
    url, sha256, names = FILES[name, split]
    if data_dir is None:
        path, there = DOWNLOADS / name / names[0], formats.find(DOWNLOADS / name, names)
        if there not in (None, path):
            return there
        # DART's repository has held its files with both line ends; the digests are of "\n".
        fetch_file(url, path, sha256, any_line_end=name == "dart")
        return path
    for folder in (Path(data_dir) / name, Path(data_dir)):
        path = formats.find(folder, names)
        if path is not None:
            return path
    raise ValueError(f"got no {name} {split} file in {data_dir} or {Path(data_dir) / name}, "
                     f"expected {' or '.join(names)}, plain or .gz; fetch {url} to there, or leave "
                     "--data-dir out")


def train_and_dev(name, data_dir=None, seed=0, keys=own.KEYS):
    """`load` of both splits."""
    if name not in NAMES and own.is_own(name):
        return own.load(name, ("train", "dev"), seed, keys)
    return [load(name, split, data_dir, seed) for split in ("train", "dev")]


def load(name, split, data_dir=None, seed=0, keys=own.KEYS):
    """The Examples of one split, "train", "dev" or "test", of a task.

    name: one of NAMES, or the path of your own file or folder (own.py). The invented world's test
    is its "test-seen" and "test-unseen" together; it has more splits (toy_world/tables.py).
    data_dir: a folder with the official files, or with e2e/, webnlg/, dart/ in it; None: they are
    downloaded, except for the data sets of summaries.py.
    keys: what your own file calls source and target.
    seed: decides what is held out of your own file, and the invented world's tables. It is not the
    seed of training: runs with different seeds learn from the same data and have the same dev.
    """
    if name in WORLDS:
        if split not in ("test", *tables.SPLITS):
            raise ValueError(f"got the split {split!r}, expected one of "
                             + guess(split, ("test", *tables.SPLITS)))
        parts = ("test-seen", "test-unseen") if split == "test" else (split,)
        if name == "world-headlines":
            return [e for part in parts for e in headlines.task(part, seed=seed)]
        style = "near" if name == "world" else "hard"
        return [example for part in parts for example in tables.task(style, part, seed=seed)]
    if split not in SPLITS:
        raise ValueError(f"got the split {split!r}, expected one of {guess(split, SPLITS)}")
    if name in summaries.NAMES:
        path, rows = data_dir, summaries.rows_of(name, split, data_dir)
        found = examples(rows if name == "dialogsum" else without_blanks(rows, path))
    elif name in NAMES:
        path = official_file(name, split, data_dir)
        found = (gather(examples(formats.read_e2e(path))) if name == "e2e" else
                 examples(without_blanks(formats.read_dart(path), path)) if name == "dart" else
                 examples(formats.read_webnlg(path, good_only=split == "train")))
    elif own.is_own(name):
        found, = own.load(name, (split,), seed, keys)
    else:
        raise ValueError(f"got the data {name!r}, expected {own.FORMS}, or one of "
                         + guess(name, NAMES))
    if not found:
        raise ValueError(f"{path}: got no example, expected at least one; take the official file")
    return found
