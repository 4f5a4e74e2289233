"""Percentiles of samples, and the test of whether two sets of samples differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Returns the number of samples, their percentiles and their extremes, in their own unit."""
    low, middle, high, highest = np.percentile(samples, [0, 50, 90, 99])
    return {
        "samples": len(samples), "min": float(low), "p50": float(middle), "p90": float(high),
        "p99": float(highest), "max": float(max(samples)),
    }  # fmt: skip


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the two-sided p of the hypothesis that both come from one distribution.

    Mann and Whitney 1947, "On a Test of Whether one of Two Random Variables is Stochastically
    Larger than the Other"; normal approximation with continuity correction, variance corrected
    for ties (Lehmann 1975, "Nonparametrics", section 1.4).

    Args:
        first: Samples.
        second: Samples of the same unit.
    """
    values = np.concatenate([np.asarray(first, float), np.asarray(second, float)])
    n, m = len(first), len(second)
    total = n + m
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[place]  # equal values share the mean of their ranks
    u = float(ranks[:n].sum()) - n * (n + 1) / 2
    ties = float((counts.astype(float) ** 3 - counts).sum())
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:  # all values are equal
        return 1.0
    distance = max(0.0, abs(u - n * m / 2) - 0.5)
    return math.erfc(distance / math.sqrt(2 * variance))


def least_p(n: int, m: int) -> float:
    """The smallest p that `mann_whitney` can return for so many samples."""
    return mann_whitney(range(n), range(n, n + m)) if n and m else 1.0
