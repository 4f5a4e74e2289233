"""Measures checkpoints on labelled sets, for the table of RESULTS.md.

    python training/measure.py NAME=CHECKPOINT ... --data SET ... [--save training/results.json]

In PyTorch, bfloat16 arithmetic unless told otherwise, at most 256 tokens: for comparing runs with
each other.  What is shipped is measured by benchmarks/accuracy.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import network
import sources
import train


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table; saves everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files or folders")
    parser.add_argument("--save", type=Path, help="JSON, added to what is there")
    parser.add_argument("--fp32", action="store_true", help="for processors without bfloat16")
    parser.add_argument("--response-only", action="store_true", help="the judged message alone")
    options = parser.parse_args(arguments)
    sets = {path.name.partition(".")[0]: rows_of(path) for path in options.data}
    results: dict[str, Any] = {}
    if options.save and options.save.exists():
        results = json.loads(options.save.read_text(encoding="utf-8"))
    for item in options.checkpoints:
        name, _, source = item.partition("=")
        checkpoint = network.load(source)
        model = network.trainable(checkpoint)
        found = results.setdefault(name, {"layers": model.config.num_hidden_layers})
        for title, rows in sets.items():
            found[title] = train.evaluate(
                model,
                checkpoint,
                rows,
                bf16=not options.fp32,
                response_only=options.response_only,
            )
            print(f"{name:<24} {title:<12} {found[title]['all'][0]:.4f}", flush=True)
        if options.save:
            text = json.dumps(results, indent=1, ensure_ascii=False)
            options.save.write_text(text + "\n", encoding="utf-8")


def rows_of(path: Path) -> list[sources.Row]:
    """Reads a file, or all files of a folder."""
    if path.is_dir():
        return sources.read_written(path)
    return [{"source": path.name, **row} for row in sources.read(path)]


if __name__ == "__main__":
    main()
