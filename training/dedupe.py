"""Finds near-duplicates between conversations, by request and by reply.

    python training/dedupe.py --pool pool.jsonl.gz --against dev.jsonl.gz benchmarks/data/*.jsonl

Looks for rows of what is trained on (our own training text and, with --pool, the pool) that are
nearly the same as a row of what is measured on, by the reply, or by request and reply together,
and prints them; `--drop FILE` writes their ids, which `train.py --drop FILE` leaves out.  Requests
alone may recur: the same request with another reply is what a refusal classifier must tell apart.

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
_LEAST = 40  # characters; shorter replies are alike by nature


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--against", type=Path, nargs="+", required=True)
    parser.add_argument("--drop", type=Path, help="where the ids of the found rows go")
    options = parser.parse_args(arguments)
    measured = [row for path in options.against for row in sources.read(path)]
    index = MinHashLSH(threshold=NEAR - 0.1, num_perm=_PERMUTATIONS)
    texts = {}
    for number, row in enumerate(measured):
        text = reply(row)
        if len(text) >= _LEAST:
            texts[number] = shingles(text)
            index.insert(number, sketch(texts[number]))
    trained = sources.read_written()
    if options.pool:
        trained += sources.read(options.pool)
    found = []
    for row in tqdm(trained, desc="comparing", disable=None):
        text = reply(row)
        if len(text) < _LEAST:
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


def reply(row: sources.Row) -> str:
    """Returns the judged reply, case and white space folded."""
    return " ".join(row["messages"][-1]["content"].casefold().split())


def sketch(parts: set[str]) -> MinHash:
    """Returns the MinHash of a set of strings."""
    made = MinHash(num_perm=_PERMUTATIONS)
    made.update_batch([part.encode() for part in parts])
    return made


if __name__ == "__main__":
    main()
