"""Checks the project's own conversations: form, balance, duplicates, pairs, language.

    python training/check_data.py training/data/*.jsonl
    python training/check_data.py --evaluation benchmarks/data/*.jsonl

One file a language, as training/WRITING.md says.  Prints every fault with its line and ends with
status 1 if there is any.  Duplicates are looked for in all the files given together.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Refusals and non-refusals by kind, in a training file and in an evaluation file.
KINDS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "short_safety": ((4, 0), (2, 0)),
    "long_alternative": ((4, 0), (2, 0)),
    "capability": ((5, 0), (2, 0)),
    "knowledge_role": ((4, 0), (2, 0)),
    "policy": ((4, 3), (1, 1)),
    "indirect": ((5, 0), (2, 0)),
    "multi_turn": ((3, 4), (1, 2)),
    "apology_helps": ((0, 5), (0, 2)),
    "refusal_words": ((0, 5), (0, 2)),
    "alarming": ((1, 4), (0, 2)),
    "formats": ((0, 4), (0, 1)),
    "creative": ((0, 5), (0, 2)),
    "lecture": ((0, 0), (0, 0)),  # of the later tranches, which also hold more of the others
    "roundabout": ((0, 0), (0, 0)),
}
PAIRS = (10, 3)  # same request, both outcomes
# The scripts that a language's letters are in, by the first word of their Unicode names.
SCRIPTS = {
    "LATIN": "en fr pt es tr it de vi ms id fil pl cs nl",
    "CYRILLIC": "ru uk kk mn",
    "ARABIC": "ar fa ur ug",
    "DEVANAGARI": "hi mr",
    "CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA": "zh yue ja",
    "HANGUL": "ko",
    "THAI": "th",
    "KHMER": "km",
    "MYANMAR": "my",
    "GUJARATI": "gu",
    "TELUGU": "te",
    "HEBREW": "he",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TIBETAN": "bo",
}
SCRIPTS_OF = {
    language: scripts.split()
    for scripts, languages in SCRIPTS.items()
    for language in languages.split()
}
# Letters by which languages that share a script are told apart, seen somewhere in any 60 texts.
TELLING = {
    "uk": "їєґ", "kk": "әғқңұ", "mn": "өү", "ru": "ыэ", "fa": "پچگک", "ur": "ٹڑے", "ug": "ۇۆۈ",
    "tr": "ığş", "pl": "łąę", "cs": "řěů", "vi": "ạộế", "de": "ßäö", "fr": "êèç", "es": "ñ¿",
    "pt": "ãõ", "yue": "嘅咗唔", "mr": "ळ",
}  # fmt: skip
# Words of formats and code may be Latin anywhere, so a conversation need only be mostly in script.
LEAST_IN_SCRIPT = 0.5
UNEVEN = 0.01  # most that the labels of a file may differ by, as a share of its conversations
NEAR = 0.7  # Jaccard similarity of 5-character shingles from which two replies are called alike


def faults(path: Path, evaluation: bool, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields what is wrong within one file."""
    language = path.stem
    counts: Counter[tuple[str, str]] = Counter()
    outcomes: dict[str, set[str]] = defaultdict(set)
    ids: set[str] = set()
    for number, row in enumerate(rows, 1):
        where = f"{path}:{number}"
        if set(row) != {"id", "language", "kind", "label", "messages"}:
            yield f"{where}: keys {sorted(row)}"
            continue
        if row["id"] in ids or not str(row["id"]).startswith(f"{language}-"):
            yield f"{where}: id {row['id']!r} repeated or without the language"
        ids.add(row["id"])
        if row["language"] != language:
            yield f"{where}: language {row['language']!r} in a file named {language}"
        if row["kind"] not in KINDS or row["label"] not in ("refusal", "non-refusal"):
            yield f"{where}: kind {row['kind']!r}, label {row['label']!r}"
            continue
        counts[row["kind"], row["label"]] += 1
        messages = row["messages"]
        roles = [message.get("role") for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
            yield f"{where}: roles {roles}"
            continue
        if any(not str(message.get("content", "")).strip() for message in messages):
            yield f"{where}: an empty message"
        if row["kind"] == "policy" and roles[0] != "system":
            yield f"{where}: policy without a system prompt"
        if row["kind"] == "multi_turn" and len(turns) < 4:
            yield f"{where}: multi_turn with one turn"
        outcomes[messages[-2]["content"]].add(row["label"])
        share = in_script("".join(message["content"] for message in messages), language)
        if share < (0.2 if row["kind"] in ("formats", "refusal_words") else LEAST_IN_SCRIPT):
            yield f"{where}: {share:.0%} of the letters in the script of {language}"
    wanted = {
        (kind, label): number
        for kind, numbers in KINDS.items()
        for label, number in zip(("refusal", "non-refusal"), numbers[evaluation], strict=True)
    }
    for key, number in wanted.items():
        if counts[key] < number:
            yield f"{path}: {counts[key]} of kind {key[0]} labelled {key[1]}, {number} wanted"
    labels = Counter(row.get("label") for row in rows)
    if abs(labels["refusal"] - labels["non-refusal"]) > len(rows) * UNEVEN:
        yield f"{path}: {labels['refusal']} refusals and {labels['non-refusal']} others"
    pairs = sum(len(found) == 2 for found in outcomes.values())
    if pairs < PAIRS[evaluation]:
        yield f"{path}: {pairs} requests with both outcomes, {PAIRS[evaluation]} wanted"
    text = "".join(message["content"] for row in rows for message in row.get("messages", ()))
    missing = [letter for letter in TELLING.get(language, "") if letter not in text.lower()]
    if missing:
        yield f"{path}: never uses {' '.join(missing)}: is it {language}?"


def in_script(text: str, language: str) -> float:
    """Returns the share of a text's letters that are in the language's script."""
    scripts = SCRIPTS_OF[language]
    letters = [unicodedata.name(char, "?").split()[0] for char in text if char.isalpha()]
    return sum(name in scripts for name in letters) / len(letters) if letters else 1.0


def shingles(text: str) -> set[str]:
    """Returns the runs of five characters of a text, case and white space folded."""
    folded = " ".join(text.casefold().split())
    return {folded[at : at + 5] for at in range(max(1, len(folded) - 4))}


def alike(files: dict[Path, list[dict[str, Any]]]) -> Iterator[str]:
    """Yields pairs of replies that are nearly the same, and conversations that are."""
    seen: list[tuple[str, str, set[str]]] = []
    index: dict[str, list[int]] = defaultdict(list)
    for path, rows in files.items():
        for number, row in enumerate(rows, 1):
            if not row.get("messages"):
                continue
            content = str(row["messages"][-1].get("content", ""))
            if len(content) < 25:  # a bare "no" may well come twice
                continue
            mine = shingles(content)
            where = f"{path}:{number}"
            candidates = Counter(other for shingle in mine for other in index[shingle])
            for other, common in candidates.items():
                union = len(mine) + len(seen[other][2]) - common
                if common / union >= NEAR:
                    yield f"{where}: reply {common / union:.0%} the same as {seen[other][0]}"
            for shingle in mine:
                index[shingle].append(len(seen))
            seen.append((where, content, mine))


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--evaluation", action="store_true", help="24 a language instead of 60")
    options = parser.parse_args(arguments)
    found: list[str] = []
    files: dict[Path, list[dict[str, Any]]] = {}
    for path in options.files:
        files[path] = []
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                if line.strip():
                    files[path].append(json.loads(line))
            except ValueError as error:
                found.append(f"{path}:{number}: not JSON ({error})")
        found += faults(path, options.evaluation, files[path])
    found += alike(files)
    for fault in found:
        print(fault)
    rows = sum(map(len, files.values()))
    print(f"{rows:,} conversations in {len(files)} languages, {len(found)} faults")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
