"""Counts tokens per character before and after pruning a vocabulary, by language.

    python benchmarks/vocabulary.py FULL/tokenizer.json DATA.jsonl [--save NAME]

DATA is JSON Lines with `messages` and `language`. The pruned tokenizer is the embedded model's
unless --pruned names another. The last line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import environment, read_rows, save
from tokenizers import Tokenizer

from refusal_runtime.classifier import EMBEDDED


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("full", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pruned", type=Path, default=EMBEDDED / "tokenizer.json")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)
    texts: dict[str, list[str]] = defaultdict(list)
    for row in read_rows(options.data):
        texts[row["language"]] += [message["content"] for message in row["messages"]]
    before, after = Tokenizer.from_file(str(options.full)), Tokenizer.from_file(str(options.pruned))
    languages: dict[str, Any] = {}
    for language, found in sorted(texts.items()):
        characters = sum(map(len, found))
        counts = [count(tokenizer, found) for tokenizer in (before, after)]
        languages[language] = {
            "characters": characters,
            "tokens_per_character_before": counts[0] / characters,
            "tokens_per_character_after": counts[1] / characters,
            "change": counts[1] / counts[0] - 1,
        }
        print(f"{language:<4} {counts[0] / characters:.4f} {languages[language]['change']:+.2%}")
    result = {
        "benchmark": "vocabulary",
        "environment": environment(),
        "data": options.data.name,
        "pieces_before": before.get_vocab_size(),
        "pieces_after": after.get_vocab_size(),
        "largest_change": max(entry["change"] for entry in languages.values()),
        "languages": languages,
    }
    if options.save:
        print(f"saved to {save(options.save, result)}")
    print(json.dumps(result, ensure_ascii=False))


def count(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """Counts the tokens of texts, control tokens left out."""
    return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)


if __name__ == "__main__":
    main()
