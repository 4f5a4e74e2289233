"""Choose which pieces of a multilingual Unigram vocabulary to keep for a set of languages.

A multilingual encoder spends most of its bytes on the embedding table, and much of the table on
languages a given model never has to read.  This script picks the pieces that the wanted languages
do use, so that the table can be cut with little change in the number of tokens a text becomes.

Input is a folder with one sub-folder of UTF-8 ``.txt`` files for each language, and the
``tokenizer.json`` of the full vocabulary.  Output is a list of the kept pieces, one a line, in the
order of the full vocabulary, without the control pieces (which are always kept).

How the pieces are chosen:

* kept whatever the text says: single characters, the word mark followed by a single character,
  pieces without a letter (digits, punctuation, symbols, emoji), and all pieces of ``--whole``
  scripts, whose languages have too little text to choose by;
* dropped whatever the text says: longer pieces with a letter of a script none of the languages
  uses (a script not in ``--scripts``);
* the rest compete.  A piece is worth the number of pieces it falls apart into, less one, times
  its rate of use: the geometric mean of that in the text, summed over the languages, and that
  which the Unigram score implies.  The text alone is small and not of the kind the model will
  read; the score alone counts languages that are not wanted.  Scripts whose languages have little
  text, and languages whose token count rose most, weigh more.

Within a language a file weighs as the square root of its size, so that one long manual does not
outvote everything else; files named ``words*`` are plain word lists and weigh less.

Read the list back by cutting at the line feed only: ``str.splitlines`` would also cut at a piece
such as U+0085, which is itself an end of line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MARK = "\u2581"
COMPETING = (
    "LATIN CYRILLIC ARABIC HEBREW DEVANAGARI CJK IDEOGRAPHIC HIRAGANA KATAKANA "
    "KATAKANA-HIRAGANA HANGUL"
)
SCRIPT_WEIGHT = {
    "ARABIC": 2.0,
    "DEVANAGARI": 2.0,
    "HEBREW": 1.6,
    "CJK": 1.5,
    "HIRAGANA": 1.5,
    "KATAKANA": 1.5,
    "CYRILLIC": 1.3,
}
LANGUAGE_WEIGHT = {"tr": 2.5, "ru": 1.5, "mn": 1.3, "pt": 1.4, "id": 1.2, "it": 1.2, "vi": 1.2}
FLOOR = 3e-7  # the rate of use taken for a piece that the text never uses
WHOLE = "THAI TELUGU TAMIL MYANMAR BENGALI GUJARATI KHMER TIBETAN"


def script_of(piece: str) -> str:
    """Return the commonest script among a piece's letters and marks, "" if it has none."""
    found: Counter[str] = Counter()
    for char in piece:
        if char.isalpha() or unicodedata.category(char).startswith("M"):
            found[unicodedata.name(char, "UNKNOWN").split()[0]] += 1
    return found.most_common(1)[0][0] if found else ""


def is_single(piece: str) -> bool:
    """Say whether a piece is one character, with or without the word mark before it."""
    return len(piece.removeprefix(MARK)) <= 1


def read_words(folder: Path, list_weight: float, limit: int) -> tuple[list[str], np.ndarray]:
    """Count the words in a language's files; return the ``limit`` heaviest and their weights."""
    total: Counter[str] = Counter()
    for path in sorted(folder.glob("*.txt")):
        counts = Counter(path.read_text(encoding="utf-8").split())
        size = sum(len(word) * count for word, count in counts.items())
        factor = (list_weight if path.name.startswith("words") else 1.0) / math.sqrt(size or 1)
        for word, count in counts.items():
            total[word] += count * factor  # type: ignore[assignment]
    heaviest = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return [word for word, _ in heaviest], np.array([weight for _, weight in heaviest])


def use_of_pieces(
    tokenizer: Tokenizer, words: list[str], weights: np.ndarray, size: int
) -> np.ndarray:
    """Return how often each piece is used in the weighted words."""
    use = np.zeros(size)
    for start in range(0, len(words), 20000):
        batch = words[start : start + 20000]
        rows = [row.ids for row in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
        flat = np.fromiter((piece for row in rows for piece in row), dtype=np.int64)
        times = np.repeat(weights[start : start + 20000], [len(row) for row in rows])
        use += np.bincount(flat, weights=times, minlength=size)[:size]
    return use


def parts_without(piece: str, score: dict[str, float]) -> int:
    """Return into how many pieces a piece falls apart once it is gone itself."""
    best: list[tuple[float, int]] = [(0.0, 0)] + [(-math.inf, 0)] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end):
            if end - start == len(piece):
                continue
            value = score.get(piece[start:end])
            if value is not None and best[start][0] + value > best[end][0]:
                best[end] = (best[start][0] + value, best[start][1] + 1)
    return best[-1][1] if best[-1][1] else 3 * len(piece)


def choose(
    full: dict[str, Any],
    corpus: dict[str, tuple[list[str], np.ndarray]],
    args: argparse.Namespace,
) -> np.ndarray:
    """Return the flags of the pieces to keep."""
    vocab: list[tuple[str, float]] = [(piece, score) for piece, score in full["model"]["vocab"]]
    control = {token["content"] for token in full["added_tokens"]}
    scripts = [script_of(piece) for piece, _ in vocab]
    whole, competing = set(args.whole.split()), set(args.scripts.split())
    fixed = np.array(
        [
            piece in control or is_single(piece) or script == "" or script in whole
            for (piece, _), script in zip(vocab, scripts, strict=True)
        ]
    )
    tokenizer = Tokenizer.from_str(json.dumps(full))
    use = np.zeros(len(vocab))
    for language, (words, weights) in sorted(corpus.items()):
        part = use_of_pieces(tokenizer, words, weights, len(vocab))
        use += part / part.sum() * LANGUAGE_WEIGHT.get(language, 1.0)
    rate = np.exp([score for _, score in vocab])
    loss = np.maximum(use, FLOOR) ** args.text_share * rate ** (1 - args.text_share)
    loss *= [SCRIPT_WEIGHT.get(script, 1.0) for script in scripts]
    score = dict(vocab)
    is_open = [script in competing for script in scripts] & ~fixed
    open_ids = np.flatnonzero(is_open)
    parts = np.array([max(parts_without(vocab[index][0], score) - 1, 1) for index in open_ids])
    order = open_ids[np.argsort(-loss[open_ids] * parts, kind="stable")]
    keep = fixed.copy()
    keep[order[: max(args.pieces - int(fixed.sum()), 0)]] = True
    return keep


def main() -> None:
    """Read the arguments, choose the pieces and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("corpus", type=Path, help="folder with a folder of .txt for each language")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json of the full vocabulary")
    parser.add_argument("output", type=Path, help="where the list of pieces goes")
    parser.add_argument("--pieces", type=int, default=117900, help="how many pieces to keep")
    parser.add_argument("--max-words", type=int, default=180000, help="words for each language")
    parser.add_argument("--list-weight", type=float, default=0.3, help="weight of words*.txt")
    parser.add_argument("--text-share", type=float, default=0.55, help="exponent of the text")
    parser.add_argument("--scripts", default=COMPETING, help="scripts the languages use")
    parser.add_argument("--whole", default=WHOLE, help="scripts to keep whole")
    args = parser.parse_args()

    full = json.loads(args.tokenizer.read_text(encoding="utf-8"))
    corpus = {}
    for folder in sorted(path for path in args.corpus.iterdir() if path.is_dir()):
        words, weights = read_words(folder, args.list_weight, args.max_words)
        if words:
            corpus[folder.name] = (words, weights)
    keep = choose(full, corpus, args)
    control = {token["content"] for token in full["added_tokens"]}
    pieces = [
        piece
        for (piece, _), flag in zip(full["model"]["vocab"], keep, strict=True)
        if flag and piece not in control
    ]
    if any("\n" in piece or "\r" in piece for piece in pieces):
        raise SystemExit("a piece holds a line break: the list would not read back")
    args.output.write_bytes("".join(piece + "\n" for piece in pieces).encode())
    print(f"{len(pieces)} pieces (control pieces not counted) from {len(corpus)} languages")


if __name__ == "__main__":
    main()
