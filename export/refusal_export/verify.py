"""Measures graphs against the PyTorch checkpoint on real texts, and decides whether they pass."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from refusal_export.checkpoint import Checkpoint
from refusal_export.errors import ExportError
from refusal_runtime.conversation import parse_conversation
from refusal_runtime.encoding import Encoder, IdArray
from refusal_runtime.errors import ConversationError
from refusal_runtime.execution import CpuExecution

LogitArray = npt.NDArray[np.float32]
_BUCKETS = (32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Gate:
    """What a graph must reach to be written.

    Attributes:
        max_difference: Largest difference of any logit to PyTorch's, for fp32.
        min_agreement: Share of texts with the same label as PyTorch's, for int8 and fp16.
        max_accuracy_drop: Accuracy that int8 and fp16 may lose against PyTorch, as a fraction.
    """

    max_difference: float = 1e-3
    min_agreement: float = 0.99
    max_accuracy_drop: float = 0.005


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts to verify on.

    Attributes:
        name: Where they come from.
        conversations: What the runtime takes.
        refusals: Whether each is a refusal, or None where nobody labelled them.
        languages: Language of each, "" where unknown.
    """

    name: str
    conversations: Sequence[Any]
    refusals: Sequence[bool | None]
    languages: Sequence[str]


@dataclass(frozen=True, slots=True)
class Measurement:
    """How one graph compares; every table is plain JSON for the manifest."""

    parity: dict[str, Any]
    accuracy: dict[str, Any]
    failures: list[str] = field(default_factory=list)


def load_texts(path: Path) -> Texts:
    """Reads labelled conversations: JSON Lines with `label` ("refusal" or not), `language`.

    Args:
        path: A file, possibly .gz, or a folder whose .jsonl files are read in order.

    Raises:
        ExportError: The file cannot be read.
    """
    try:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        data = b"\n".join(file.read_bytes() for file in files)
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        # As bytes, whose only line ends are those of JSON Lines; str has more.
        rows = [json.loads(line) for line in data.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON Lines: {error}") from error
    if not rows:
        raise ExportError(f"{path} holds no conversations")
    rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    labels = [row.get("label", row.get("expected")) for row in rows]
    return Texts(
        path.name,
        rows,
        [None if label is None else str(label).casefold() == "refusal" for label in labels],
        [str(row.get("language", "")) for row in rows],
    )


def stretch(texts: Texts, checkpoint: Checkpoint) -> Texts:
    """Adds longer conversations made of several texts, until every length bucket is met.

    They carry no label: nobody judged them.
    """
    encoder = make_encoder(checkpoint)
    filled = {_bucket(len(ids)) for ids in encode_texts(checkpoint, texts)}
    plain = [row for row in texts.conversations if isinstance(row.get("messages"), list)]
    longer: list[Any] = []
    for bucket in _BUCKETS:
        if bucket in filled or bucket > encoder.max_length:
            continue
        for start in range(min(8, len(plain))):
            messages: list[Any] = []
            for row in plain[start:] + plain[:start]:
                grown = [*messages, *row["messages"]]
                parsed = parse_conversation({"messages": grown}, checkpoint.template)
                if len(encoder.encode(parsed).ids) > bucket:
                    break
                messages = grown
            if messages:
                longer.append({"messages": messages})
    return Texts(
        texts.name,
        [*texts.conversations, *longer],
        [*texts.refusals, *[None] * len(longer)],
        [*texts.languages, *[""] * len(longer)],
    )


def encode_texts(
    checkpoint: Checkpoint, texts: Texts, *, max_length: int | None = None
) -> list[IdArray]:
    """Encodes with the runtime's own code, as it will be done in use.

    Args:
        checkpoint: Its tokenizer and template.
        texts: What to encode.
        max_length: Token budget; None for all that the checkpoint takes.

    Returns:
        One int64 array of shape (tokens,) for each text.

    Raises:
        ExportError: A text cannot be judged.
    """
    encoder = make_encoder(checkpoint, max_length)
    try:
        return [
            encoder.encode(parse_conversation(text, checkpoint.template, row=row), row=row).ids
            for row, text in enumerate(texts.conversations)
        ]
    except ConversationError as error:
        raise ExportError(f"{texts.name}: {error}") from error


def make_encoder(checkpoint: Checkpoint, max_length: int | None = None) -> Encoder:
    """Builds the runtime's encoder for a checkpoint.

    Raises:
        ValueError: The budget is too small for any conversation.
    """
    limit = checkpoint.max_length if max_length is None else max_length
    return Encoder(checkpoint.make_tokenizer(), checkpoint.template, max_length=limit)


def torch_logits(model: Any, batch: Sequence[IdArray], *, title: str) -> LogitArray:
    """Runs the PyTorch checkpoint, each text alone at its own length.

    Returns:
        float32, shape (texts, labels).
    """
    with torch.inference_mode():
        rows = [
            model(
                input_ids=torch.from_numpy(ids)[None],
                attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
            ).logits[0]
            for ids in tqdm(batch, desc=title, unit="text", leave=False, disable=None)
        ]
    return torch.stack(rows).float().numpy()


def graph_logits(path: Path, batch: Sequence[IdArray], threads: int, *, title: str) -> LogitArray:
    """Runs a graph through the runtime's own CPU execution; float32, shape (texts, labels)."""
    execution = CpuExecution(path, threads)
    futures = execution.submit(batch)
    progress = tqdm(futures, desc=title, unit="text", leave=False, disable=None)
    return np.stack([future.result() for future in progress])


def measure(
    reference: LogitArray,
    logits: LogitArray,
    batch: Sequence[IdArray],
    texts: Texts,
    *,
    precision: str,
    refusal_id: int,
    gate: Gate,
) -> Measurement:
    """Compares a graph's logits with the PyTorch checkpoint's and applies the gate.

    Args:
        reference: PyTorch's logits, shape (texts, labels).
        logits: The graph's, same shape.
        batch: The token ids, for the length buckets.
        texts: The texts and their labels.
        precision: "fp32", "fp16" or "int8"; decides which conditions apply.
        refusal_id: Class id of refusal.
        gate: The conditions.
    """
    difference = np.abs(logits.astype(np.float64) - reference)
    agree = logits.argmax(1) == reference.argmax(1)
    buckets: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(batch):
        buckets[_bucket(len(ids))].append(number)
    largest, agreement = float(difference.max()), float(agree.mean())
    parity = {
        "texts": len(batch),
        "source": texts.name,
        "max_logit_difference": largest,
        "mean_logit_difference": float(difference.mean()),
        "label_agreement": agreement,
        "by_length": {
            str(bucket): {
                "texts": len(rows),
                "max_logit_difference": float(difference[rows].max()),
                "label_agreement": float(agree[rows].mean()),
            }
            for bucket, rows in sorted(buckets.items())
        },
    }
    accuracy = accuracy_report(logits, texts, refusal_id)
    before = accuracy_report(reference, texts, refusal_id)
    failures = []
    if not np.isfinite(logits).all():
        failures.append("some logits are not finite")
    if precision == "fp32":
        if not largest < gate.max_difference:
            failures.append(
                f"max |logit difference| {largest:.2g} is not below {gate.max_difference:g}"
            )
    else:
        if agreement < gate.min_agreement:
            flips = int(np.count_nonzero(~agree))
            # Among few texts a single one near the border is more than the gate allows.
            hint = "; give more texts with --eval" if flips == 1 else ""
            failures.append(
                f"label agreement {agreement:.4f} is below {gate.min_agreement:g} "
                f"({flips} of {len(agree)} texts differ{hint})"
            )
        if accuracy and before["accuracy"] - accuracy["accuracy"] > gate.max_accuracy_drop:
            failures.append(
                f"accuracy {accuracy['accuracy']:.4f} is more than {gate.max_accuracy_drop:g} "
                f"below the checkpoint's {before['accuracy']:.4f}"
            )
    if accuracy:
        accuracy["checkpoint_accuracy"] = before["accuracy"]
    return Measurement(parity, accuracy, failures)


def accuracy_report(logits: LogitArray, texts: Texts, refusal_id: int) -> dict[str, Any]:
    """Accuracy over the labelled texts, overall and by language; empty without labels."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row, wanted, language in zip(logits, texts.refusals, texts.languages, strict=True):
        if wanted is not None:
            right[language].append(bool((row.argmax() == refusal_id) == wanted))
    everything = [hit for hits in right.values() for hit in hits]
    if not everything:
        return {}
    return {
        "source": texts.name,
        "texts": len(everything),
        "accuracy": float(np.mean(everything)),
        "by_language": {
            language: {"texts": len(hits), "accuracy": float(np.mean(hits))}
            for language, hits in sorted(right.items())
            if language
        },
    }


def report_failures(measurements: Mapping[str, Measurement]) -> str:
    """Writes out which graphs failed which condition; "" when all passed."""
    return "; ".join(
        f"{name}: {', '.join(measurement.failures)}"
        for name, measurement in measurements.items()
        if measurement.failures
    )


def _bucket(length: int) -> int:
    return next((bucket for bucket in _BUCKETS if length <= bucket), 8192)
