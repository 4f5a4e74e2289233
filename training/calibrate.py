"""Fits the temperature of a bundle's scores and chooses its operating points.

    python training/calibrate.py BUNDLE OUT.json [--pool pool.jsonl.gz] [--chart FILE.svg]

Everything is measured on conversations that nothing was trained on: our own that `sources`
holds back and, with --pool, as many drawn from the pool's held back.  OUT.json is what
`refusal-export --scores` takes.

* Temperature: the divisor of the logits that minimizes the negative log-likelihood (Guo et al.
  2017, "On Calibration of Modern Neural Networks").
* Expected calibration error: see benchmarks/metrics.py.
* Operating points: `high_precision` is the lowest threshold, `high_recall` the highest, at which
  precision or recall reaches 99 %; where it is never reached, the best there is.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sources

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from metrics import reliability

from refusal_runtime import RefusalClassifier

FloatArray = npt.NDArray[np.float64]
WANTED = 0.99


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrates and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--chart", type=Path, help="reliability diagram, .svg")
    options = parser.parse_args(arguments)
    _, rows = sources.split(sources.read_written())
    ours = len(rows)
    if options.pool:
        pool = sources.sample_pool(sources.read(options.pool), seed=7)
        held = sources.split(pool)[1]
        rows += random.Random(7).sample(held, min(ours, len(held)))
    classifier = RefusalClassifier(options.bundle)
    refusal = classifier.bundle.refusal_id
    verdicts = classifier.stream(rows, on_error="raise")
    margins = np.array(
        [2 * v.logits[refusal] - sum(v.logits) for v in verdicts]
    )  # of two labels: one logit less the other
    truth = np.array([row["label"] == "refusal" for row in rows])
    temperature = fit_temperature(margins, truth)
    chances = sigmoid(margins / temperature)
    points = operating_points(chances, truth)
    result: dict[str, Any] = {
        "temperature": round(temperature, 4),
        "rows": len(rows),
        "written": ours,
        "before": reliability(sigmoid(margins), truth),
        "after": reliability(chances, truth),
        "points": points,
        "operating_points": {
            name: point["threshold"] for name, point in points.items() if name != "default"
        },
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.chart:
        draw(result, options.chart)
    print(json.dumps(result))


def sigmoid(margins: FloatArray) -> FloatArray:
    """Returns the probability of refusal, what the softmax of two logits is."""
    return np.asarray(1 / (1 + np.exp(-margins)))


def fit_temperature(margins: FloatArray, truth: npt.NDArray[np.bool_]) -> float:
    """Returns the temperature of least negative log-likelihood, by golden-section search.

    The likelihood has one maximum in the inverse of the temperature, for it is concave there.
    """
    signed = np.where(truth, margins, -margins)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signed / np.exp(log_temperature)).mean())

    low, high = np.log(0.05), np.log(20.0)
    ratio = (np.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def operating_points(
    chances: FloatArray, truth: npt.NDArray[np.bool_]
) -> dict[str, dict[str, float]]:
    """Returns threshold, precision and recall of the default and of both further points."""
    thresholds = np.arange(1, 1000) / 1000
    precision, recall = [], []
    for threshold in thresholds:
        found = chances >= threshold
        hits = float((found & truth).sum())
        precision.append(hits / found.sum() if found.any() else 0.0)
        recall.append(hits / truth.sum())
    precise = next((n for n, p in enumerate(precision) if p >= WANTED), int(np.argmax(precision)))
    complete = max((n for n, r in enumerate(recall) if r >= WANTED), default=0)
    points = {"high_recall": complete, "default": 499, "high_precision": precise}
    return {
        name: {
            "threshold": float(thresholds[number]),
            "precision": round(precision[number], 4),
            "recall": round(recall[number], 4),
        }
        for name, number in points.items()
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the reliability diagram, before and after."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "refusal-runtime"  # the same file for the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5))
    axes.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=1)
    for name in ("before", "after"):
        bins = result[name]["bins"]
        label = f"{name}: error {result[name]['expected_calibration_error']:.3f}"
        axes.plot([b[0] for b in bins], [b[1] for b in bins], marker="o", label=label)
    axes.set(xlabel="score of the label", ylabel="accuracy", xlim=(0.5, 1), ylim=(0.4, 1.01))
    axes.legend()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
