"""Which conversations a training run sees: reads them, samples them, keeps some for calibration.

Two kinds of source: the project's own conversations in training/data, one file a language, and a
pool of public ones as gzip JSON Lines (training/DATA.md says which), which are not distributed
here.  A row is `id, language, label, source, messages` and, for our own, `kind`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

WRITTEN = Path(__file__).parent / "data"
# How many conversations of each source of the pool one run takes, by source and label.  Refusals
# of PolyRefuse are many and alike, IndoSafety's labels are a regular expression's, MT-Bench has 80
# questions: all are held back so that none teaches its own phrases or topics.
POOL_SAMPLE: Mapping[tuple[str, str], int] = {
    ("polyrefuse", "refusal"): 1800,
    ("polyrefuse", "non-refusal"): 1200,
    ("k-overrefusal", "refusal"): 1600,
    ("k-overrefusal", "non-refusal"): 1600,
    ("indosafety", "refusal"): 400,
    ("indosafety", "non-refusal"): 400,
    ("speechmap", "refusal"): 263,
    ("speechmap", "non-refusal"): 700,
    ("mt-bench", "non-refusal"): 1300,
    ("ru-llm-arena", "non-refusal"): 300,
    ("coconot", "refusal"): 167,
    ("coconot", "non-refusal"): 500,
    ("refusalbench", "non-refusal"): 250,
    ("ziran", "refusal"): 64,
    ("ziran", "non-refusal"): 52,
}
_HELD_BACK = 12  # one request in so many calibrates instead of training


def read(path: Path) -> list[Row]:
    """Reads JSON Lines, possibly gzip."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def read_written(folder: Path = WRITTEN) -> list[Row]:
    """Reads the project's own conversations."""
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read(path)]
    return [{"source": "written", **row} for row in rows]


def request(row: Row) -> str:
    """Returns the user message that the judged reply answers."""
    return next((m["content"] for m in reversed(row["messages"][:-1]) if m["role"] == "user"), "")


def is_held_back(row: Row) -> bool:
    """Whether a row calibrates; rows with the same request always stay together."""
    key = f"{row['language']}\n{request(row)}".encode()
    return hashlib.sha256(key).digest()[0] % _HELD_BACK == 0


def sample_pool(rows: Iterable[Row], *, seed: int, share: float = 1.0) -> list[Row]:
    """Draws `POOL_SAMPLE` from the pool, languages as evenly as their numbers allow.

    Args:
        rows: The pool.
        seed: Another seed draws other rows.
        share: Factor on all the numbers.
    """
    groups: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if all(message["content"].strip() for message in row["messages"]):
            groups[row["source"], row["label"]][row["language"]].append(row)
    chosen: list[Row] = []
    for key, wanted in POOL_SAMPLE.items():
        rng = random.Random(f"{seed} {key}")
        languages = sorted(groups[key].values(), key=len)
        left = round(wanted * share)
        for position, members in enumerate(languages):
            take = min(len(members), left // (len(languages) - position))
            chosen += rng.sample(members, take)
            left -= take
    return chosen


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Splits rows into those to train on and those held back."""
    train: list[Row] = []
    held: list[Row] = []
    for row in rows:
        (held if is_held_back(row) else train).append(row)
    return train, held
