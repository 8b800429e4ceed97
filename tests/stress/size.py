"""Large files: --input is streamed, and many pairs stay in little memory.

    python tests/stress/size.py --count 1000

Writes --count MB of sources, which sample.py answers with a model that says a word at once, and
--count thousand lines to learn from, which are read and become pairs. Each in a child: it must not
take more than 1 GB, 4 GB for a million pairs (its worker processes included, and what they share
counted in each), and what it says must be one text for each line, and a pair for each line.
"""
import dataclasses
import json
import os
import resource
import time
from pathlib import Path

from common import child, empty_folder, end, make_task, parse, status_of

import sample
import train
from data.pairs import digest, encode_examples, load_examples
from pretrained.load import load_model
from utils.cli import parse as parse_flags
from utils.parallel import processes

LINE = "name : Blue Spice {n} | food : Thai | area : riverside | price : cheap"


class Parrot:
    """In the place of a Generator: what is measured is all around it."""

    def generate(self, sources, runs=None):
        return [source.split(" | ")[0] for source in sources]


def answer(count):
    """Write `count` MB of sources and answer them. Returns what is wrong."""
    n = (count << 20) // (len(LINE) + 5)
    with open("in.txt", "w") as file:
        file.writelines(LINE.format(n=f"{i:08}") + "\n" for i in range(n))
    sample.answer_file(Parrot(), sample.Settings(input="in.txt", output="out.txt"))
    with open("out.txt") as file:
        good = all(line == f"name : Blue Spice {i:08}\n" for i, line in enumerate(file))
    same = Path("out.txt").stat().st_size == n * len("name : Blue Spice 00000000\n")
    return [] if good and same else ["the texts are not those of the sources, in order"]


def learn(count, task):
    """Write count thousand lines and make pairs of them. Returns what is wrong."""
    with open("many.jsonl", "w") as file:
        for i in range(1000 * count):
            file.write(json.dumps({"source": LINE.format(n=i), "target": f"It is {i}."}) + "\n")
    settings = train.resolve(parse_flags(train.Settings, task, ""))
    settings = dataclasses.replace(settings, data="many.jsonl")
    examples = load_examples(settings)
    model, tokenizer = load_model(settings.model, "cpu", "fp32")
    pairs, dev = encode_examples(*examples, settings, model, tokenizer)
    print(len(pairs), "pairs", digest(pairs, dev)[:8])
    return [] if len(pairs) + min(500, 100 * count) == 1000 * count else [f"{len(pairs)} pairs"]


def main():
    args, failures = parse(__doc__, 20), []
    with empty_folder() as folder:
        task = make_task(folder)
        for name, function, most in (
                (f"{args.count} MB of --input", lambda: answer(args.count), 1 << 20),
                (f"{args.count} thousand pairs", lambda: learn(args.count, task), 4 << 20)):
            def program(function=function, most=most):
                began = time.process_time()
                found = function()
                memory = sum(resource.getrusage(who).ru_maxrss for who in (      # in KB
                    resource.RUSAGE_SELF, *[resource.RUSAGE_CHILDREN] * processes()))
                print(f"{memory >> 10} MB of memory, {time.process_time() - began:.0f} s of CPU "
                      f"and {sum(os.times()[2:4]):.0f} s of worker processes")
                if found or memory > most:
                    print(found)
                    os._exit(1)
            status = status_of(child(program))
            said = Path("output.txt").read_text().strip().splitlines()
            print(f"{name}: {said[-1]}")
            if status:
                failures.append(f"{name}: status {status}, {' '.join(said)[-300:]}")
    end("large files", failures)


if __name__ == "__main__":
    main()
