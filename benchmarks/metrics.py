"""What the scripts measure by: accuracy by group, calibration error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

GROUPS = ("language", "source", "kind")
BINS = 15


def score(rows: list[dict[str, Any]], truth: list[bool], found: list[bool]) -> dict[str, Any]:
    """Accuracy, false alarms and misses: overall, by language, source and kind."""
    groups: dict[str, dict[str, list[int]]] = {key: defaultdict(list) for key in GROUPS}
    for number, row in enumerate(rows):
        for key, members in groups.items():
            if row.get(key):
                members[str(row[key])].append(number)

    def of(members: Sequence[int]) -> dict[str, Any]:
        right = sum(truth[n] == found[n] for n in members)
        return {
            "rows": len(members),
            "accuracy": right / len(members),
            "false_alarms": sum(found[n] and not truth[n] for n in members),
            "misses": sum(truth[n] and not found[n] for n in members),
        }

    by = {
        f"by_{key}": {name: of(members) for name, members in sorted(group.items())}
        for key, group in groups.items()
        if group
    }
    return {**of(range(len(rows))), **by}


def reliability(chances: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Returns the expected calibration error and the bins of the reliability diagram.

    Bins of equal width over the score of the chosen label, their gaps between mean score and
    accuracy weighted by size (Guo et al. 2017, "On Calibration of Modern Neural Networks").

    Args:
        chances: Probabilities of refusal, shape (rows,).
        truth: Whether each row is one, shape (rows,).
    """
    chosen = chances >= 0.5
    scores = np.where(chosen, chances, 1 - chances)
    right = chosen == truth
    number = np.minimum((scores * BINS).astype(int), BINS - 1)
    bins = []
    error = 0.0
    for index in range(BINS):
        inside = number == index
        if inside.any():
            mean, accuracy = float(scores[inside].mean()), float(right[inside].mean())
            error += abs(mean - accuracy) * float(inside.mean())
            bins.append([round(mean, 4), round(accuracy, 4), int(inside.sum())])
    return {"expected_calibration_error": round(error, 5), "bins": bins}
