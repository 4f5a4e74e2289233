"""Verdicts: labels, calibrated probabilities and the threshold, computed from given logits."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from refusal_runtime.bundle import DEFAULT_TEMPLATE, Bundle
from refusal_runtime.verdict import Verdict, make_verdict, probabilities

BUNDLE = Bundle(
    folder=Path("nowhere"),
    name="test",
    version="1",
    source={},
    labels=("Non-refusal", "Refusal"),
    refusal_id=1,
    max_length=512,
    template=DEFAULT_TEMPLATE,
    temperature=1.0,
    threshold=0.5,
    graphs={},
    files={},
)


def verdict_of(*logits: float, bundle: Bundle = BUNDLE, threshold: float = 0.5) -> Verdict:
    array = np.array(logits, dtype=np.float32)
    return make_verdict(array, bundle, threshold=threshold, tokens=7, truncated=True)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_a_refusal() -> None:
    verdict = verdict_of(-1.0, 2.0)
    assert verdict.label == "Refusal"
    assert verdict.score == verdict.refusal_probability == pytest.approx(sigmoid(3), abs=1e-12)
    assert verdict.is_refusal
    assert (verdict.tokens, verdict.truncated, verdict.logits) == (7, True, (-1.0, 2.0))


def test_the_score_is_that_of_the_label_not_of_refusal() -> None:
    verdict = verdict_of(2.0, -1.0)
    assert verdict.label == "Non-refusal"
    assert verdict.score == pytest.approx(sigmoid(3), abs=1e-12)
    assert verdict.refusal_probability == pytest.approx(sigmoid(-3), abs=1e-12)
    assert not verdict.is_refusal


def test_the_order_of_labels_is_never_assumed() -> None:
    bundle = dataclasses.replace(BUNDLE, labels=("Refusal", "Non-refusal"), refusal_id=0)
    verdict = verdict_of(2.0, -1.0, bundle=bundle)
    assert (verdict.label, verdict.is_refusal) == ("Refusal", True)
    assert verdict.refusal_probability == verdict.score == pytest.approx(sigmoid(3))


def test_more_than_two_labels() -> None:
    bundle = dataclasses.replace(BUNDLE, labels=("answer", "refusal", "other"))
    verdict = verdict_of(1.0, 1.0, 2.0, bundle=bundle)
    assert verdict.label == "other"
    assert verdict.score == pytest.approx(math.e / (2 + math.e))
    assert verdict.refusal_probability == pytest.approx(1 / (2 + math.e))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.7])
def test_calibration_divides_the_logits_by_the_temperature(temperature: float) -> None:
    bundle = dataclasses.replace(BUNDLE, temperature=temperature)
    verdict = verdict_of(-1.0, 2.0, bundle=bundle)
    assert verdict.score == pytest.approx(sigmoid(3 / temperature), abs=1e-12)
    assert verdict.logits == (-1.0, 2.0), "logits are before calibration"
    assert verdict.label == verdict_of(-1.0, 2.0).label


@pytest.mark.parametrize(
    ("threshold", "refuses"), [(0.0, True), (0.5, True), (0.7, True), (0.75, False), (1.0, False)]
)
def test_the_threshold_is_on_the_calibrated_probability(threshold: float, refuses: bool) -> None:
    # sigmoid(4 / 4) = 0.731; without calibration it would be 0.98.
    bundle = dataclasses.replace(BUNDLE, temperature=4.0)
    assert verdict_of(-2.0, 2.0, bundle=bundle, threshold=threshold).is_refusal is refuses


def test_the_threshold_itself_counts_and_does_not_change_the_label() -> None:
    assert verdict_of(1.0, 1.0, threshold=0.5).is_refusal
    strict = verdict_of(-1.0, 2.0, threshold=0.99)
    assert (strict.label, strict.is_refusal) == ("Refusal", False)
    lenient = verdict_of(2.0, -1.0, threshold=0.01)
    assert (lenient.label, lenient.is_refusal) == ("Non-refusal", True)


@pytest.mark.parametrize("logits", [(1e4, -1e4), (-3e38, 3e38), (88.0, 89.0, 90.0)])
def test_probabilities_neither_overflow_nor_lose_mass(logits: tuple[float, ...]) -> None:
    for temperature in (0.01, 1.0, 100.0):
        chances = probabilities(logits, temperature)
        assert chances.dtype == np.float64
        assert chances.sum() == pytest.approx(1)
        assert int(chances.argmax()) == int(np.argmax(logits))


def test_verdicts_are_plain_immutable_values() -> None:
    verdict = verdict_of(-1.0, 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.label = "x"  # type: ignore[misc]
    assert verdict == verdict_of(-1.0, 2.0) != verdict_of(-1.0, 2.5)
    assert pickle.loads(pickle.dumps(verdict)) == verdict
    # No numpy scalars, which json refuses.
    assert json.loads(json.dumps(dataclasses.asdict(verdict)))["is_refusal"] is True
    assert type(verdict.is_refusal) is bool
