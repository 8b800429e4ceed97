"""What has to be done before torch is imported; every program imports it, and so do
data/, pretrained/ and scripts/.

PyTorch's threads (OpenMP) spin while they wait for each other, which makes a small model several
times slower on a busy computer. Passive threads sleep. OpenMP reads this once, when torch is
imported: if that has happened already, as in an open notebook, nothing changes.
A Python that is too old and a package that is missing are reported in one sentence here, before an
import fails with a traceback; Ctrl-C during the imports, in one word. So old Pythons must be able
to parse this file. Knows nothing of the project but its packages.
"""
import importlib.util
import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
PACKAGES = "torch", "numpy", "tiktoken", "tqdm"


def what_is_missing(version, find=importlib.util.find_spec):
    """A sentence about what a program here needs and does not find, or "" where all is there."""
    if version < (3, 10):
        return ("got Python {}.{}, expected 3.10 or newer; start it with another one, as "
                "`python3.12`".format(*version[:2]))
    missing = [name for name in PACKAGES if find(name) is None]
    return ("got no package {}, expected it; `pip install -r requirements.txt`, in the environment "
            "of this Python, {}".format(", ".join(missing), sys.executable) if missing else "")


def leave(number, frame):
    """End at once, with the signal's status. A KeyboardInterrupt in the middle of torch's own start
    would come out as another error, or as an abort of C++.
    """
    sys.stderr.write("interrupted\n")
    os._exit(128 + number)


def is_program():
    """Whether a program of this project starts: not a notebook, a test or somebody's own script."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"] == __name__ or "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    # Now frame is whoever imports this file; a notebook has no __file__. Under `python -m` argv[0]
    # is "-m" until the module is found, that is, while our package is imported.
    about = frame.f_globals
    return about["__name__"] == "__main__" and "__file__" in about or sys.argv[:1] == ["-m"]


sentence = what_is_missing(sys.version_info)
if sentence:
    sys.stderr.write("error: " + sentence + "\n")
    sys.exit(2)
if is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)         # until run_program of cli.py
