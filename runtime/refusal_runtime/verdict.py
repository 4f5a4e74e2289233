"""Turns logits into verdicts: calibrated probabilities, label, threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refusal_runtime.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the model says of one conversation.

    Attributes:
        label: The most probable label, in the checkpoint's own words.
        score: Calibrated probability of `label`, from 0 to 1.
        refusal_probability: Calibrated probability that the last assistant message refuses.
        is_refusal: Whether that probability reaches the threshold.
        tokens: How many tokens the model read, control tokens included.
        truncated: Whether part of the conversation was left out to fit the token budget.
        logits: The raw outputs, one for each label by id, before calibration.
    """

    label: str
    score: float
    refusal_probability: float
    is_refusal: bool
    tokens: int
    truncated: bool
    logits: tuple[float, ...]


def probabilities(
    logits: Sequence[float] | npt.NDArray[np.float32], temperature: float
) -> npt.NDArray[np.float64]:
    """Returns softmax(logits / temperature) in double precision, shape (labels,)."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return np.asarray(powers / powers.sum())


def make_verdict(
    logits: npt.NDArray[np.float32],
    bundle: Bundle,
    *,
    threshold: float,
    tokens: int,
    truncated: bool,
) -> Verdict:
    """Makes a verdict of one conversation's logits, float32 of shape (labels,)."""
    chances = probabilities(logits, bundle.temperature)
    best = int(chances.argmax())
    refusal = float(chances[bundle.refusal_id])
    return Verdict(
        label=bundle.labels[best],
        score=float(chances[best]),
        refusal_probability=refusal,
        is_refusal=refusal >= threshold,
        tokens=tokens,
        truncated=truncated,
        logits=tuple(float(value) for value in logits),
    )
