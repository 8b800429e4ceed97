"""Summarising: XSum and its two tests of extrapolation, DialogSum, SciTLDR, read as rows.

XSum is read from the usual pairs of files, train.source and train.target and so on, an article and
its summary a line; or from the official release, a file an article and one JSON file with the
splits. Only the release has the addresses of the articles. Their topics make the paper's section
6.4: learn from news and summarise sports, or learn from some topics of the news and summarise the
others. The files are the user's own downloads, so --data-dir names their folder.
Not here: how long a text may be (seq2seq.py).
"""
import re
from pathlib import Path

from data import formats

XSUM = "http://bollin.inf.ed.ac.uk/public/direct/XSUM-EMNLP18-Summary-Data-Original.tar.gz"
XSUM_SPLITS = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
# Task: where its files come from.
NAMES = {"xsum": XSUM, "xsum-news-to-sports": XSUM, "xsum-within-news": XSUM,
         "dialogsum": "https://github.com/cylnlp/dialogsum",
         "scitldr": "https://github.com/allenai/scitldr"}
LEARNED_NEWS = ("news/world", "news/uk", "news/business")   # within-news; the others are the test
# The buttons of BBC's pages, which the release has as lines of the article.
BUTTONS = {"Share this with", "Email", "Facebook", "Messenger", "Twitter", "Pinterest", "WhatsApp",
           "LinkedIn", "Linkedin", "Copy this link",
           "These are external links and will open in a new window"}


def one_line(text):
    """The text on one line. What is no text stays what it is: example.py refuses it."""
    return " ".join(text.split()) if isinstance(text, str) else text


def topic_of(address):
    """`.../www.bbc.co.uk/news/world-europe-123` -> "news/world"; "" for other pages."""
    found = re.search(r"bbc\.co(?:\.uk|m)/(news|sport)/(?:0/)?([a-z]*)", address)
    return f"{found[1]}/{found[2]}" if found else ""


def stem_of(split):
    """What the usual files of a split are called."""
    return {"dev": "val"}.get(split, split)


def read_lines(source, target):
    """Rows of two files whose lines belong together."""
    texts = [formats.read_text(path).removesuffix("\n").split("\n") for path in (source, target)]
    if len(texts[0]) != len(texts[1]):
        raise ValueError(f"got {len(texts[0])} lines in {source} and {len(texts[1])} in {target}, "
                         "expected as many; take both from one download")
    for number, (article, summary) in enumerate(zip(*texts), 1):
        yield f"{source}, line {number}", one_line(article), [one_line(summary)], ""


def read_article(path):
    """The row of one .summary file: sections, each under a line `[SN]NAME[SN]`."""
    parts = re.split(r"^\[SN\]([A-Z-]+)\[SN\]$", formats.read_text(path), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    if not {"URL", "FIRST-SENTENCE", "RESTBODY"} <= sections.keys():
        raise ValueError(f"{path}: got the sections {', '.join(sections) or 'of none'}, expected "
                         "URL, FIRST-SENTENCE and RESTBODY; take the official release")
    lines = [line.strip() for line in sections["RESTBODY"].splitlines()]
    body = " ".join(line for line in lines if line not in BUTTONS)
    return path, one_line(body), [one_line(sections["FIRST-SENTENCE"])], topic_of(sections["URL"])


def read_release(folder, split):
    """Rows of the articles that the release's JSON file names for `split`."""
    path = folder / XSUM_SPLITS
    listed = formats.parse_json(formats.read_text(path), path)
    name = {"dev": "validation"}.get(split, split)
    if not isinstance(listed, dict) or not isinstance(listed.get(name), list):
        raise ValueError(f"{path}: got no list {name!r}, expected the numbers of its articles; "
                         "take the official file")
    for number in listed[name]:
        article = folder / "bbc-summary-data" / f"{number}.summary"
        if not article.is_file():
            raise ValueError(f"got no {article}, expected every article that {path.name} names; "
                             f"fetch {XSUM}")
        yield read_article(article)


def read_xsum(name, split, folders):
    """Rows of XSum, or of one of its two splits by topic; None where no folder has the files."""
    for folder in folders:
        if (folder / XSUM_SPLITS).is_file():
            rows = read_release(folder, split)
            if name == "xsum":
                return rows
            wanted = {("xsum-news-to-sports", False): lambda topic: topic.startswith("news/"),
                      ("xsum-news-to-sports", True): lambda topic: topic.startswith("sport/"),
                      ("xsum-within-news", False): lambda topic: topic in LEARNED_NEWS,
                      # "news/" alone is an address without a topic: on neither side.
                      ("xsum-within-news", True): lambda topic: (
                          topic.startswith("news/") and topic not in (*LEARNED_NEWS, "news/"))}
            return (row for row in rows if wanted[name, split == "test"](row[3]))
        pair = [formats.find(folder, (f"{stem_of(split)}.{side}",))
                for side in ("source", "target")]
        if all(pair):
            if name != "xsum":
                raise ValueError(f"got {pair[0]} for {name}, which has no addresses; expected "
                                 f"{XSUM_SPLITS} and bbc-summary-data/ of the official release, "
                                 f"for the topics; fetch {XSUM}")
            return read_lines(*pair)
    return None


def read_dialogsum(path):
    """A dialogue on one line, its summaries (three in test), its topic."""
    for where, row in formats.json_objects(path, ("dialogue",)):
        texts = [row[key] for key in ("summary", "summary1", "summary2", "summary3") if key in row]
        topic = row.get("topic", row.get("topic1"))
        yield where, one_line(row["dialogue"]), [one_line(text) for text in texts], topic


def read_scitldr(path):
    """An abstract, its sentences in one, and its one-sentence summaries."""
    for where, row in formats.json_objects(path, ("source", "target")):
        with formats.layout(where, '"source" and "target", lists of sentences'):
            source = one_line(" ".join(formats.as_list(row["source"])))
        yield where, source, [one_line(text) for text in formats.as_list(row["target"])], ""


def rows_of(name, split, data_dir):
    """The rows of one split of a task in NAMES; `data_dir` has its files, or a folder with them."""
    if data_dir is None:
        raise ValueError(f"got --data {name} without --data-dir, expected the folder with its "
                         f"files; fetch them from {NAMES[name]}")
    folders = [Path(data_dir) / name, Path(data_dir) / "xsum", Path(data_dir) / "summarization",
               Path(data_dir)]
    if name.startswith("xsum"):
        rows = read_xsum(name, split, folders)
        expected = (f"{XSUM_SPLITS} with bbc-summary-data/, or {stem_of(split)}.source and "
                    f"{stem_of(split)}.target")
    else:
        read, files = {
            "dialogsum": (read_dialogsum, (f"dialogsum.{split}.jsonl", f"dialogsum_{split}.jsonl")),
            "scitldr": (read_scitldr, (f"SciTLDR-A/{split}.jsonl", f"scitldr_a_{split}.jsonl")),
        }[name]
        found = [path for path in (formats.find(folder, files) for folder in folders) if path]
        rows = read(found[0]) if found else None
        expected = " or ".join(files)
    if rows is None:
        raise ValueError(f"got no {name} {split} file in {data_dir} or {folders[0]}, expected "
                         f"{expected}; fetch them from {NAMES[name]}")
    return rows
