"""Finds near-duplicates between what is trained on and what is measured on.

    python training/dedupe.py --pool pool.jsonl.gz --against dev.jsonl.gz benchmarks/data/*.jsonl

Compares our own training text and, with --pool, the pool with labelled sets, by the judged reply
or, with `--by request`, by what it answers, and prints the pairs.  `--drop FILE` writes the ids,
which `train.py --drop FILE` leaves out of the pool.

MinHash (datasketch) over runs of five characters, 128 permutations; candidates are confirmed by
their exact Jaccard similarity.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import sources
from check_data import shingles
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

NEAR = 0.8
_PERMUTATIONS = 128
_LEAST = {"reply": 40, "request": 12}  # characters; shorter ones are alike by nature


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--against", type=Path, nargs="+", required=True)
    parser.add_argument("--by", choices=("reply", "request"), default="reply")
    parser.add_argument("--drop", type=Path, help="where the ids of the found rows go")
    options = parser.parse_args(arguments)
    measured = [row for path in options.against for row in sources.read(path)]
    index = MinHashLSH(threshold=NEAR - 0.1, num_perm=_PERMUTATIONS)
    texts = {}
    for number, row in enumerate(measured):
        text = part(row, options.by)
        if len(text) >= _LEAST[options.by]:
            texts[number] = shingles(text)
            index.insert(number, sketch(texts[number]))
    trained = sources.read_written()
    if options.pool:
        trained += sources.read(options.pool)
    found = []
    for row in tqdm(trained, desc="comparing", disable=None):
        text = part(row, options.by)
        if len(text) < _LEAST[options.by]:
            continue
        mine = shingles(text)
        for number in index.query(sketch(mine)):
            same = len(mine & texts[number]) / len(mine | texts[number])
            if same >= NEAR:
                found.append((same, row["id"], measured[number].get("id")))
    for same, ours, theirs in found:
        print(f"{same:.2f} {ours} {theirs}")
    ids = sorted({ours for _, ours, _ in found})
    print(f"{len(ids)} of {len(trained):,} rows nearly the same as one of {len(measured):,}")
    if options.drop:
        options.drop.write_text(json.dumps(ids, indent=0) + "\n", encoding="utf-8")


def part(row: sources.Row, which: str) -> str:
    """Returns the judged reply or the request, case and white space folded."""
    text = row["messages"][-1]["content"] if which == "reply" else sources.request(row)
    return " ".join(text.casefold().split())


def sketch(parts: set[str]) -> MinHash:
    """Returns the MinHash of a set of strings."""
    made = MinHash(num_perm=_PERMUTATIONS)
    made.update_batch([part.encode() for part in parts])
    return made


if __name__ == "__main__":
    main()
