"""Changes a conversation's looks and surroundings, never its label.

Refusals in public data come almost only with harmful requests, in English spelling, in one turn
and without a system prompt.  What a model could take for a sign of refusing is therefore mixed:
another conversation before, a system prompt before, no request at all, somebody else's harmless
request before a refusal, letters without accents.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from typography import no_accents

Row = dict[str, Any]
Messages = list[dict[str, str]]

# The tokenizer hides all other typography from the model (normalization.py).
_NO_ACCENTS = 0.08


class Augmenter:
    """Draws variants of rows; all randomness comes from the generator given with each call.

    Args:
        rows: The rows that other rows may borrow requests, turns and system prompts from.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._answered: dict[str, list[Row]] = defaultdict(list)
        self._by_language: dict[str, list[Row]] = defaultdict(list)
        self._systems: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            self._by_language[row["language"]].append(row)
            if row["label"] == "non-refusal" and row["source"] != "indosafety":
                self._answered[row["language"]].append(row)
            if row["messages"][0]["role"] == "system":
                self._systems[row["language"]].append(row["messages"][0]["content"])

    def variant(self, row: Row, rng: random.Random) -> Messages:
        """Returns messages with the row's label: mostly its own, sometimes in other dress."""
        messages = [dict(message) for message in row["messages"]]
        language = row["language"]
        # Kinds that mean something by their context keep it.
        bound = row.get("kind") in ("policy", "multi_turn", "indirect")
        if not bound:
            chance = rng.random()
            if chance < 0.10:
                messages = messages[-1:]
            elif chance < 0.20 and row["label"] == "refusal" and self._answered[language]:
                other = rng.choice(self._answered[language])
                messages = [*other["messages"][:-1][-1:], messages[-1]]
            elif chance < 0.38 and messages[0]["role"] != "system":
                messages = self._earlier(language, rng) + messages
            if messages[0]["role"] != "system" and self._systems[language] and rng.random() < 0.15:
                prompt = rng.choice(self._systems[language])
                messages.insert(0, {"role": "system", "content": prompt})
        if rng.random() < _NO_ACCENTS:
            for message in messages:
                message["content"] = no_accents(message["content"], rng)
        return messages

    def _earlier(self, language: str, rng: random.Random) -> Messages:
        """Returns another conversation of the language, short enough to stand before."""
        for _ in range(4):
            found = rng.choice(self._by_language[language])["messages"]
            if sum(len(message["content"]) for message in found) < 600:
                return [dict(message) for message in found]
        return []
