"""What is measured: the scenarios and their settings, and texts of an exact length.

The scenarios are those of MLPerf Inference: SingleStream is one caller who waits for each verdict,
Offline is all texts at once, MultiStream is several callers at the same time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines import MULTI, OFFLINE, SINGLE
from tokenizers import Tokenizer

FIRST = "<|user|>Which bus goes to the lake?<|assistant|>I'm afraid I can't look that up."
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Case:
    """One scenario with its texts.

    Attributes:
        name: Such as "SingleStream-128".
        scenario: SINGLE, OFFLINE or MULTI.
        texts: Role-formatted conversations.
        tokens: Their exact length; None for mixed lengths.
        callers: How many call at once.
        rounds: How often the engines take turns.
        everyday: Whether an engine that is slow to start takes part in the short benchmark.
    """

    name: str
    scenario: str
    texts: list[str]
    tokens: int | None
    callers: int
    rounds: int
    everyday: bool


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        lengths: Tokens of the SingleStream cases.
        texts: Different texts of each length.
        callers: Concurrent callers of the MultiStream cases.
        rounds: Rounds of SingleStream and MultiStream.
        offline_rounds: Passes over the Offline rows.
        offline_rows: How many rows; None for all of them.
        calls: Least number of calls a round.
        seconds: Least duration of a round.
        most: Most calls a round.
        warm_seconds: Least duration of the warm-up.
        stream_rows: Sizes of the scaling by rows.
        stream_tokens: Length of its texts.
        scaling_lengths: Tokens of the scaling by length.
        scaling_rounds: Passes of the scaling by threads.
    """

    lengths: tuple[int, ...] = (32, 128, 256, 512)
    texts: int = 4
    callers: tuple[int, ...] = (2, 8)
    rounds: int = 3
    offline_rounds: int = 6
    offline_rows: int | None = 36
    calls: int = 8
    seconds: float = 0.4
    most: int = 200
    warm_seconds: float = 0.3
    stream_rows: tuple[int, ...] = (250, 500, 1_000, 2_000)
    stream_tokens: int = 16
    scaling_lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 384, 512)
    scaling_rounds: int = 3


SHORT = Settings()
FULL = replace(
    SHORT,
    texts=16,
    rounds=10,
    offline_rows=None,
    calls=20,
    seconds=2.0,
    most=1_000,
    warm_seconds=2.0,
    stream_rows=(10_000, 100_000, 1_000_000),
    scaling_lengths=(16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512),
    scaling_rounds=10,
)


def role_text(row: dict[str, Any]) -> str | None:
    """Formats a row as every engine can take it; None for tools, images and the like."""
    messages = row.get("messages")
    if not messages or messages[-1].get("role") != "assistant":
        return None
    if any(m.get("role") not in _ROLES or not isinstance(m.get("content"), str) for m in messages):
        return None
    return "".join(f"<|{m['role']}|>{m['content']}" for m in messages)


def choose(rows: Sequence[dict[str, Any]], number: int | None) -> list[dict[str, Any]]:
    """Chooses rows at random, always the same ones, in their order; all for None."""
    usable = [row for row in rows if role_text(row) is not None]
    if number is None or number >= len(usable):
        return usable
    return [usable[n] for n in sorted(random.Random(0).sample(range(len(usable)), number))]


def counters(files: Sequence[Path]) -> list[Tokenizer]:
    """Loads the tokenizers by which lengths are counted."""
    loaded = [Tokenizer.from_file(str(file)) for file in files]
    for tokenizer in loaded:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return loaded


def exact_texts(
    rows: Sequence[dict[str, Any]], tokens: int, number: int, tokenizers: Sequence[Tokenizer]
) -> list[str]:
    """Makes conversations of an exact length out of the rows' messages.

    A request takes at most a third, the replies of the same language fill the rest; the last one
    is cut in the middle where the length is reached.

    Args:
        rows: Labelled conversations.
        tokens: The length, control tokens included, by every one of the tokenizers.
        number: How many to make; fewer come back where the rows do not give them.
        tokenizers: With truncation and padding switched off.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in choose(rows, None):
        groups.setdefault(str(row.get("language", "")), []).append(row)
    names = sorted(groups)
    random.Random(tokens).shuffle(names)
    found: list[str] = []
    for turn in range(max(map(len, groups.values()), default=0)):
        for name in names:
            if len(found) == number:
                return found
            if turn < len(groups[name]):
                text = _exact(groups[name], turn, tokens, tokenizers)
                found += [text] if text else []
    return found


def _exact(
    rows: list[dict[str, Any]], first: int, tokens: int, tokenizers: Sequence[Tokenizer]
) -> str | None:
    messages = rows[first]["messages"]
    request = next((m["content"] for m in messages if m["role"] == "user"), "")
    head = f"<|user|>{_cut('', request, tokens // 3, tokenizers[0])}<|assistant|>"
    material = ""
    for row in (rows[first:] + rows[:first]) * (1 + tokens // 16):
        material += row["messages"][-1]["content"] + " "
        if len(material) > 16 * tokens or _count(tokenizers[0], head + material) >= tokens:
            break
    # The right cut may lie a few characters beside the one that the first tokenizer finds.
    body = _cut(head, material, tokens, tokenizers[0])
    for end in range(max(1, len(body) - 12), min(len(material), len(body) + 12) + 1):
        text = head + material[:end]
        if text[-1] != " " and all(_count(counter, text) == tokens for counter in tokenizers):
            return text
    return None


def _cut(head: str, text: str, tokens: int, tokenizer: Tokenizer) -> str:
    """The longest beginning of a text with at most so many tokens, the head's included."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _count(tokenizer, head + text[:middle]) <= tokens:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text).ids)


def make_cases(
    rows: Sequence[dict[str, Any]],
    offline: Sequence[dict[str, Any]],
    settings: Settings,
    tokenizers: Sequence[Tokenizer],
    limit: int,
) -> tuple[list[Case], list[str]]:
    """Makes all cases.

    Args:
        rows: What texts of an exact length are made of.
        offline: The rows of the Offline case.
        settings: How much to measure.
        tokenizers: By which lengths are counted.
        limit: Most tokens that every model takes; longer cases are left out.

    Returns:
        The cases, and the names of those that cannot be made.
    """
    cases, left_out = [], []
    for tokens in settings.lengths:
        name = f"{SINGLE}-{tokens}"
        texts = exact_texts(rows, tokens, settings.texts, tokenizers) if tokens <= limit else []
        if texts:
            everyday = tokens == 128
            cases.append(Case(name, SINGLE, texts, tokens, 1, settings.rounds, everyday))
        else:
            left_out.append(name)
    mixed = [text for row in offline if (text := role_text(row)) is not None]
    cases.append(Case(OFFLINE, OFFLINE, mixed, None, 1, settings.offline_rounds, True))
    for callers in settings.callers:
        name = f"{MULTI}-{callers}"
        texts = exact_texts(rows, min(128, limit), max(settings.texts, callers), tokenizers)
        if texts:
            length = min(128, limit)
            cases.append(Case(name, MULTI, texts, length, callers, settings.rounds, False))
        else:
            left_out.append(name)
    return cases, left_out
