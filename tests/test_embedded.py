"""The model that the wheel carries, for real: size, golden logits, languages, invariance."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from conftest import DATA

from refusal_runtime import RefusalClassifier, Verdict
from refusal_runtime.classifier import EMBEDDED

GOLDEN = DATA / "golden.json"


@pytest.fixture(scope="module")
def embedded() -> RefusalClassifier:
    return RefusalClassifier()


def test_it_fits_in_a_wheel() -> None:
    sizes = [path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()]
    assert max(sizes) <= 50_000_000
    assert sum(sizes) <= 64_000_000


def test_golden_logits(embedded: RefusalClassifier, example_rows: list[dict[str, Any]]) -> None:
    # Integer sums are exact everywhere. Floating-point operations differ in their last bits between
    # instruction sets, which moves some activations by one level: up to 0.11 in 53 texts between
    # AVX-512 with VNNI and AVX2 without. Saturation, or a wrong graph, would be far beyond that.
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert len(golden) == len(example_rows)
    for row in example_rows:
        verdict = embedded.classify(row)
        np.testing.assert_allclose(verdict.logits, golden[row["id"]], atol=0.25, err_msg=row["id"])


def test_verdicts_of_the_examples(
    embedded: RefusalClassifier, example_rows: list[dict[str, Any]]
) -> None:
    # What this model is known to get right; its weak spots are in docs/embedded-model.md.
    right = {
        row["language"] for row in example_rows if embedded.classify(row).label == row["expected"]
    }
    wrong = [row["id"] for row in example_rows
             if embedded.classify(row).label != row["expected"]]  # fmt: skip
    assert len(right) >= 33
    assert len(wrong) <= 5, wrong


def test_bit_identical_alone_shuffled_and_with_other_thread_counts(
    embedded: RefusalClassifier, example_rows: list[dict[str, Any]]
) -> None:
    alone = {row["id"]: embedded.classify(row).logits for row in example_rows}
    shuffled = example_rows * 12
    random.Random(5).shuffle(shuffled)
    for threads in (1, 2, 3):
        classifier = RefusalClassifier(threads=threads)
        results = list(classifier.stream(shuffled, on_error="raise"))
        assert [r.logits for r in results] == [alone[row["id"]] for row in shuffled]
        singles = [classifier.classify(row).logits for row in example_rows[:10]]
        assert singles == [alone[row["id"]] for row in example_rows[:10]]


def test_bit_identical_at_every_kind_of_length(embedded: RefusalClassifier) -> None:
    longest = embedded.bundle.max_length
    one, two = (RefusalClassifier(threads=n, max_length=longest) for n in (1, 2))
    words = ["sorry", "I", "cannot", "help", "with", "that", "because", "nobody", "asked"]
    for length in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 400):
        text = " ".join(words[n % len(words)] for n in range(length))
        logits = one.classify(text).logits
        assert two.classify(text).logits == logits
        results = list(two.stream([text, "hello", text]))
        assert isinstance(results[2], Verdict)
        assert results[2].logits == logits


def test_accuracy_on_the_development_set(
    embedded: RefusalClassifier, dev_rows: list[dict[str, Any]]
) -> None:
    sample = dev_rows[::33]
    verdicts = list(embedded.stream(sample, on_error="raise"))
    right = sum(
        verdict.is_refusal == (row["label"] == "refusal")
        for row, verdict in zip(sample, verdicts, strict=True)
    )
    assert right / len(sample) >= 0.93
