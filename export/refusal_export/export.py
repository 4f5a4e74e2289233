"""The whole export: load, prune, trace, fuse, quantize, verify, write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from refusal_export import DEFAULT_CHECKPOINT
from refusal_export import graph as graphs
from refusal_export.bundle_writer import save_graph, staged, write_bundle
from refusal_export.checkpoint import Checkpoint, load_checkpoint
from refusal_export.embeddings import quantize_word_embedding
from refusal_export.errors import ExportError
from refusal_export.half import to_half
from refusal_export.quantize import quantize_int8
from refusal_export.verify import (
    Gate,
    LogitArray,
    Measurement,
    Texts,
    encode_texts,
    graph_logits,
    load_texts,
    make_encoder,
    measure,
    report_failures,
    stretch,
    torch_logits,
)
from refusal_export.vocabulary import load_pieces, prune
from refusal_runtime.encoding import IdArray
from refusal_runtime.hardware import resolve_threads

VARIANTS = ("fp32", "int8", "fp16")
_FILES = {"fp32": "model.onnx", "int8": "model_int8.onnx", "fp16": "model_fp16.onnx"}
_PROVIDERS = {"fp32": ["cpu", "cuda"], "int8": ["cpu"], "fp16": ["cuda"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to make of a checkpoint.

    Attributes:
        variants: Which of "fp32", "int8", "fp16".
        vocabulary: Pieces to keep (a file, or a list that comes with the package); None for all.
        embeddings: How the int8 variant stores word embeddings: "auto" (4 bits where exact, else
            8), "int4", "int8" or "fp32".
        evaluation: Labelled JSON Lines to verify on; None for the examples of the package.
        calibration: JSON Lines for quantization ranges; None for the examples of the package.
        name: Name of the model; None for the checkpoint's.
        version: Version of the model.
        license: SPDX identifier for the model card.
        notes: Markdown file to append to the model card: training data, known weaknesses.
        scores: Calibration of the scores, a JSON object with `temperature`, the divisor of the
            logits, perhaps `operating_points` (thresholds by name), and whatever else says how
            they were found; None for a temperature of 1.
        profiles: Token budgets by name; "default" is what a conversation gets unless told
            otherwise, where it is missing all that the model takes.
        threshold: Refusal probability from which a verdict counts as a refusal.
        refusal_label: Which label means refusal, where the labels do not say.
        gate: What the graphs must reach.
        force: Whether to write the bundle though a graph fails, recording the failure.
    """

    variants: Sequence[str] = VARIANTS
    vocabulary: str | None = None
    embeddings: str = "auto"
    evaluation: Path | None = None
    calibration: Path | None = None
    name: str | None = None
    version: str = "1.0.0"
    license: str = "MIT"
    notes: Path | None = None
    scores: Path | None = None
    profiles: Mapping[str, int] = field(default_factory=dict)
    threshold: float = 0.5
    refusal_label: str | None = None
    gate: Gate = field(default_factory=Gate)
    force: bool = False


def export(
    checkpoint: str | Path = DEFAULT_CHECKPOINT,
    out: str | Path = "bundle",
    options: ExportOptions | None = None,
) -> dict[str, Any]:
    """Exports a PyTorch checkpoint to a verified bundle.

    Args:
        checkpoint: A folder or a Hub id `owner/name[@revision]`.
        out: The bundle's folder; replaced if it is a bundle already.
        options: What to make.

    Returns:
        The bundle's manifest.

    Raises:
        ExportError: The checkpoint is unusable, or a graph fails verification without `force`.
    """
    options = options or ExportOptions()
    unknown = set(options.variants) - set(VARIANTS)
    if unknown or not options.variants:
        raise ExportError(f"variants should be among {', '.join(VARIANTS)}, found {unknown or ''}")
    if options.embeddings not in ("auto", "int4", "int8", "fp32"):
        raise ExportError(
            f"embeddings should be auto, int4, int8 or fp32, not {options.embeddings}"
        )
    if not 0 <= options.threshold <= 1:
        raise ExportError(f"threshold should be a probability, found {options.threshold}")
    scores = read_scores(options.scores)
    try:
        notes = options.notes.read_text(encoding="utf-8") if options.notes else ""
    except OSError as error:
        raise ExportError(f"{options.notes} cannot be read: {error}") from error
    original = load_checkpoint(checkpoint, refusal=options.refusal_label)
    for name, tokens in options.profiles.items():
        if tokens > original.max_length:
            raise ExportError(
                f"profile {name} has {tokens} tokens, the checkpoint takes {original.max_length}"
            )
        try:
            make_encoder(original, tokens)
        except ValueError as error:
            raise ExportError(f"profile {name}: {error}") from error
    loaded = original
    if options.vocabulary is not None:
        loaded = prune(original, load_pieces(options.vocabulary))
    texts = stretch(load_texts(options.evaluation or example_file()), loaded)
    batch = encode_texts(loaded, texts)
    reference = torch_logits(loaded.model, batch, title="PyTorch")
    vocabulary, spoilt = None, ""
    if loaded is not original:
        vocabulary, spoilt = _compare_vocabularies(
            original, loaded, texts, batch, reference, options.gate
        )
    traced = graphs.trace(loaded.model)
    # With an evaluation set, the texts to measure on are never those that set the ranges.
    calibration_texts = stretch(load_texts(options.calibration or example_file()), loaded)
    calibration = encode_texts(loaded, calibration_texts)
    threads, _ = resolve_threads(None)
    entries: dict[str, dict[str, Any]] = {}
    measurements: dict[str, Measurement] = {}
    with staged(Path(out)) as folder:
        for variant in options.variants:
            graph, recipe = _make(variant, traced, loaded, calibration, options.embeddings)
            path = folder / "onnx" / _FILES[variant]
            save_graph(graph, path)
            measurements[variant] = measure(
                reference,
                graph_logits(path, batch, threads, title=variant),
                batch,
                texts,
                precision=variant,
                refusal_id=loaded.refusal_id,
                gate=options.gate,
            )
            entries[variant] = {
                "file": f"onnx/{path.name}",
                "external_data": sorted(
                    f"onnx/{other.name}" for other in path.parent.glob(f"{path.name}?*")
                ),
                "precision": variant,
                "providers": _PROVIDERS[variant],
                "opset": next(e.version for e in graph.opset_import if e.domain in ("", "ai.onnx")),
                "recipe": recipe,
                "parity": measurements[variant].parity,
                "accuracy": measurements[variant].accuracy,
            }
        failed = "; ".join(filter(None, (spoilt, report_failures(measurements))))
        if failed and not options.force:
            raise ExportError(f"verification failed, nothing was written: {failed}")
        return write_bundle(
            folder,
            loaded,
            name=options.name or loaded.name.rpartition("/")[2],
            version=options.version,
            license_name=options.license,
            notes=notes,
            scores=scores,
            profiles=options.profiles,
            threshold=options.threshold,
            graphs=entries,
            vocabulary=vocabulary,
            failed=failed,
        )


def read_scores(path: Path | None) -> dict[str, Any]:
    """Reads the calibration of the scores.

    Raises:
        ExportError: The file cannot be read, or holds no temperature or no probabilities.
    """
    if path is None:
        return {"temperature": 1.0}
    try:
        scores = json.loads(path.read_bytes())
        good = scores["temperature"] > 0 and all(
            0 <= value <= 1 for value in scores.get("operating_points", {}).values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{path} is no calibration: {type(error).__name__}: {error}; it should be a JSON "
            "object with a temperature"
        ) from error
    if not good:
        raise ExportError(
            f"{path}: temperature should be above 0 and operating points probabilities"
        )
    return dict(scores)


def example_file() -> Path:
    """Finds the example conversations: inside the wheel, or in the repository's own folder."""
    here = Path(__file__).resolve().parent
    shipped = here / "examples.jsonl"
    return shipped if shipped.is_file() else here.parents[1] / "examples" / "conversations.jsonl"


def _make(
    variant: str,
    traced: onnx.ModelProto,
    checkpoint: Checkpoint,
    calibration: Sequence[IdArray],
    embeddings: str,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Makes one variant of a traced graph; returns it and how it was made."""
    fused = graphs.fuse(traced, checkpoint.config, embedding=variant == "fp32")
    recipe: dict[str, Any] = {"fusions": graphs.fusion_counts(fused)}
    if variant == "fp16":
        return to_half(fused), {**recipe, "normalizations": "fp32"}
    if variant == "int8":
        if split := graphs.split_skips(fused):
            recipe["fusions"] = {
                **graphs.fusion_counts(fused),
                "Add, Sum and LayerNormalization": split,
            }
        fused = quantize_int8(fused, calibration=calibration)
        recipe["weights"] = "int8 in 7 bits, a scale per column, error-compensated (GPTQ)"
        recipe["activations"] = (
            "uint8; LayerNorm outputs equalized (SmoothQuant), the others with a scale per token"
        )
        if embeddings != "fp32":
            bits = {"auto": None, "int4": 4, "int8": 8}[embeddings]
            recipe["embeddings"] = quantize_word_embedding(fused, bits=bits)
    return fused, recipe


def _compare_vocabularies(
    original: Checkpoint,
    pruned: Checkpoint,
    texts: Texts,
    batch: Sequence[IdArray],
    logits: LogitArray,
    gate: Gate,
) -> tuple[dict[str, Any], str]:
    """Measures what pruning changed; only texts with another segmentation need a second run.

    Returns:
        The manifest's entry, and what falls short of the gate ("" if nothing does).
    """
    before = encode_texts(original, texts)
    old = original.make_tokenizer()
    new = pruned.make_tokenizer()
    changed = [
        row
        for row, (ids, other) in enumerate(zip(before, batch, strict=True))
        if [old.id_to_token(n) for n in ids] != [new.id_to_token(n) for n in other]
    ]
    unpruned = logits.copy()
    if changed:
        again = torch_logits(original.model, [before[row] for row in changed], title="unpruned")
        unpruned[changed] = again
    # One row of measurements, as for a quantized graph.
    found = measure(
        unpruned,
        logits,
        batch,
        texts,
        precision="pruned",
        refusal_id=original.refusal_id,
        gate=gate,
    )
    entry = {
        "original": original.config["vocab_size"],
        "kept": pruned.config["vocab_size"],
        "source": texts.name,
        "texts": len(batch),
        "unchanged": 1 - len(changed) / len(batch),
        "label_agreement": found.parity["label_agreement"],
        "more_tokens": sum(map(len, batch)) / sum(map(len, before)) - 1,
    }
    if found.accuracy:
        entry["accuracy"] = found.accuracy["accuracy"]
        entry["accuracy_before"] = found.accuracy["checkpoint_accuracy"]
    return entry, report_failures({"vocabulary": found})
