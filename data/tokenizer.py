"""The tokenizer of a model: its own vocabulary from a file, or GPT-2's, and how it frames a text.

Both are byte-level BPE with GPT-2's rule for cutting text into words (pre-tokenisation): any text
can be encoded, and decoding gives it back unchanged; a tokenizer.json may change it. The bundled
models have a small vocabulary in a file `tokenizer.tiktoken`, in tiktoken's format: a line for each
token with its bytes in base64, a space, and its id. BART has GPT-2's tokens under other ids: a file
beside the model has them. Any other vocabulary is a tokenizer.json.

All tokenizers have `encode`, `decode`, `source_ids`, `target_ids`, `text_of`, `vocab_size`,
`eos_token_id` and `ids`, the ids of their tokens. A text in which someone wrote <|endoftext|> does
not end there.
"""
import base64
from pathlib import Path

import tiktoken
import tiktoken.load

from data.example import check_blanks
from utils.files import fetch_bytes, read_json_object, read_whole

# How GPT-2 cuts text before bytes are merged: 's, 't and so on; runs of letters, of digits, of
# other signs, each with the space before it, if there is one; then all other white space.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"
# The tokens that fairseq puts in front of those of a dict.txt, and the one that it puts after them.
START, PAD, END, UNKNOWN, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
# Files that may lie beside a model: a vocabulary that is not GPT-2's, the ids of a BART's tokens.
OWN_FILES = ("tokenizer.tiktoken", "dict.txt", "vocab.json", "tokenizer.json")


def read_ranks(path):
    """Token (bytes) -> id, from a file in tiktoken's format; lower ids are merged first."""
    ranks = {}
    for number, line in enumerate(read_whole(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:             # of split, of base64 and of int alike
            raise ValueError(f"{path}, line {number}: got {line[:40]!r}, expected a token in "
                             "base64 and its number; take the model's own file") from error
    complete = all(bytes([byte]) in ranks for byte in range(256))
    if not complete or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: got {len(ranks)} tokens, expected the 256 bytes among them and "
                         "the numbers 0, 1, 2, ... once each; take the model's own file")
    return ranks


def byte_of_letter():
    """GPT-2's letter -> byte: printable Latin-1 is itself, 256 and on are the other bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def read_dict(path):
    """BART's token id -> the BPE's id, or the name of a special token, from fairseq's dict.txt.

    Line n (from 0) has the id n + 4: `BPE-ID COUNT`; "madeupword0000" and others fill gaps.
    """
    words = [line.split(" ")[0] for line in read_whole(path).decode("utf-8").splitlines()]
    numbers = [int(word) if word.isdigit() else word for word in words]
    return dict(enumerate([START, PAD, END, UNKNOWN, *numbers, MASK]))


def read_vocab(path):
    """Token in GPT-2's letters -> number, of Hugging Face's vocab.json or tokenizer.json."""
    about = read_json_object(path)
    return dict(about["model"]["vocab"] if path.name == "tokenizer.json" else about)


def read_vocab_json(path, encoding):
    """BART's token id -> the BPE's id, or a name, from one of Hugging Face's files."""
    byte_of, order = byte_of_letter(), {}
    for token, number in read_vocab(path).items():
        order[number] = token
        if token == END_OF_TEXT:
            order[number] = encoding.eot_token
        elif token not in (START, PAD, END, UNKNOWN, MASK) and not token.startswith("madeupword"):
            order[number] = encoding.encode_single_token(bytes(map(byte_of.__getitem__, token)))
    return order


class Tokenizer:
    """GPT-2's, or one like it: a source and a target are one sequence,

        " source " <|endoftext|> " target " <|endoftext|>

    as in the official code; the same token ends the source and the target.
    """
    is_encoder_decoder = False

    def __init__(self, encoding):
        self.encoding, self.vocab_size = encoding, encoding.n_vocab
        self.eos_token_id, self.ids = encoding.eot_token, range(encoding.n_vocab)
        self.max_id = self.vocab_size - 1           # the largest number that a text may hold

    def encode(self, text):
        check_blanks(text)
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def source_ids(self, source):
        """The tokens up to and including the first <|endoftext|>: the prompt to decode from."""
        return [*self.encode(f" {source} "), self.eos_token_id]

    def target_ids(self, target):
        """The tokens that the model has to generate, the end included."""
        return [*self.encode(f" {target} "), self.eos_token_id]

    def text_of(self, ids):
        """The text of generated tokens up to the first end, without the blanks around it."""
        if self.eos_token_id in ids:
            ids = ids[:ids.index(self.eos_token_id)]
        return self.decode(ids).strip()


class BARTTokenizer(Tokenizer):
    """The tokens of a byte-level BPE under BART's numbers, and <s>, </s>, <mask> beside them."""
    is_encoder_decoder = True

    def __init__(self, encoding, order, source):
        """order: BART's number -> the BPE's, or a name; source: the file, for the error."""
        super().__init__(encoding)
        there = [number for number in order.values() if isinstance(number, int)]
        named = {name: number for number, name in order.items() if isinstance(name, str)}
        special = [named.get(name) for name in (START, PAD, END, UNKNOWN, MASK)]
        if sorted(order) != list(range(len(order))) or None in special or (
                sorted(there) != list(range(encoding.n_vocab))):
            raise ValueError(f"{source}: got {len(there)} numbers, expected each of the "
                             f"{encoding.n_vocab} tokens once, and <s>, <pad>, </s>, <unk>, "
                             "<mask>; take the model's own file")
        self.vocab_size = len(order)
        (self.bos_token_id, self.pad_token_id, self.eos_token_id, _,
         self.mask_token_id) = special
        self.theirs = {number: bpe for number, bpe in order.items() if isinstance(bpe, int)}
        self.ours = {bpe: number for number, bpe in self.theirs.items()}
        # A BART may have no row for <mask>, the last number, which no text has.
        self.max_id = max(self.theirs)
        self.ids = {*self.theirs, *special}             # not "madeupword0000", which fills a gap

    def encode(self, text):
        return [self.ours[number] for number in super().encode(text)]

    def source_ids(self, text):
        """A whole text as BART reads and writes it: <s>text</s>."""
        return [self.bos_token_id, *self.encode(text), self.eos_token_id]

    target_ids = source_ids

    def decode(self, ids):
        """The text of `ids`; what is no text, as <s>, is left out."""
        return self.encoding.decode([self.theirs[i] for i in ids if i in self.theirs])


class JSONTokenizer(Tokenizer):
    """Any tokenizer in a tokenizer.json, by the package tokenizers; framed as GPT-2's."""
    end = END_OF_TEXT           # where the file has this token, it ends a text

    def __init__(self, directory, about):
        """about: what the model's config.json says; its generation_config may have the ends."""
        path = directory / "tokenizer.json"
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"got {path}; expected the package tokenizers, which reads it; `pip "
                             "install tokenizers`") from error
        try:
            self.encoding = tokenizers.Tokenizer.from_str(read_whole(path).decode("utf-8"))
        except Exception as error:              # of no narrower kind
            raise ValueError(f"got {path}, which is damaged ({str(error)[:80]}); expected what the "
                             "package tokenizers writes; take the model's own file") from error
        self.encoding.encode_special_tokens = True      # typed by someone, <|im_end|> is text
        self.vocab_size = self.encoding.get_vocab_size()
        self.ids = set(self.encoding.get_vocab().values())          # there may be gaps
        self.max_id = max(self.ids)
        ends = self.encoding.token_to_id(self.end) if self.end else None
        if ends is None:
            ends = about.get("generation_config", {}).get("eos_token_id")
        ends = [end for end in (ends if isinstance(ends, list) else [ends])
                if isinstance(end, int) and self.encoding.id_to_token(end)]
        if not ends:
            raise ValueError(f"got {directory}, whose config.json has no eos_token_id; expected "
                             "the token that ends a text, one of tokenizer.json; convert the model "
                             "again")
        self.eos_token_id = ends[0]             # this one is learned, all of them end a text

    def encode(self, text):
        return self.encoding.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.encoding.decode(ids, skip_special_tokens=True)


class LlamaTokenizer(JSONTokenizer):
    """A source and a target are one sequence: source, a line break, target, the model's end token.
    In front stands what the model's makers put there, if anything.
    """
    end = None                  # by its config.json

    def source_ids(self, source):
        return self.encoding.encode(f"{source}\n").ids

    def target_ids(self, target):
        return [*self.encode(target), self.eos_token_id]


def byte_level_bpe(directory):
    """The byte-level BPE of the model in `directory`: its own, or GPT-2's."""
    path = Path(directory) / "tokenizer.tiktoken"
    if path.exists():
        ranks = read_ranks(path)
        return tiktoken.Encoding(str(path), pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    tiktoken.load.read_file = fetch_bytes       # its own would wait for ever; it compares the sum
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:      # no connection; or a file with a wrong digest
        raise OSError(f"could not get GPT-2's vocabulary ({type(error).__name__}), expected it in "
                      "tiktoken's cache, or a connection to download it once; connect, or set "
                      "TIKTOKEN_CACHE_DIR to a folder where an earlier use has left it") from error


def load_tokenizer(directory):
    """The tokenizer of the model in `directory`: its tokenizer.json or tokenizer.tiktoken, or else
    tiktoken's "gpt2"; and for a BART its numbers, from dict.txt, vocab.json or tokenizer.json.

    <|endoftext|> has the id after the last token's, as in GPT-2 (50,257 ids, the last is 50256).
    Raises OSError when GPT-2's vocabulary is neither in tiktoken's cache nor to be downloaded, and
    ValueError for a damaged file.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").exists():
        about = read_json_object(directory / "config.json")
        if about.get("architecture") != "bart":         # a BART's: the numbers of GPT-2's tokens
            kind = JSONTokenizer if about.get("architecture") == "gpt2" else LlamaTokenizer
            return kind(directory, about)
    encoding = byte_level_bpe(directory)
    for path in map(directory.joinpath, OWN_FILES[1:]):
        if path.exists():
            try:
                order = (read_dict(path) if path.name == "dict.txt" else
                         read_vocab_json(path, encoding))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{path}: got {type(error).__name__} {str(error)[:60]!r}, "
                                 "expected numbers of GPT-2's tokens; take the model's own file, "
                                 "or a model that has these") from error
            return BARTTokenizer(encoding, order, path)
    return Tokenizer(encoding)
