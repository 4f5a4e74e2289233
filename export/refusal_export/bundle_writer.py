"""Writes a bundle: graphs, tokenizer, configuration, manifest, model card; all or nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from refusal_export.checkpoint import Checkpoint
from refusal_export.errors import ExportError
from refusal_export.model_card import model_card
from refusal_runtime.bundle import MANIFEST, SCHEMA_VERSION, file_digest, seal

# A graph of more bytes keeps its weights in a file beside it.
_INLINE_BYTES = 8_000_000


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Gives a folder to write into that takes the place of `out` only if all goes well.

    Raises:
        ExportError: `out` exists and is something else than a bundle.
    """
    if out.exists() and not (out / MANIFEST).is_file() and (out.is_file() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is no bundle; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield stage
        stage.chmod(0o755)
        old = stage.with_name(stage.name + "-old")
        if out.exists():
            out.rename(old)
        try:
            stage.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Saves a graph; unless it is small, with its weights in a file beside it, FILE_data.

    onnxruntime maps that file into memory instead of parsing and copying it: sessions open in a
    third of the time, word embeddings are read from disk as they are needed, and processes share
    them. The figures are in benchmarks/NOTES.md.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if graph.ByteSize() < _INLINE_BYTES:
        onnx.save_model(graph, str(path))
        return
    data = path.with_name(f"{path.name}_data")
    onnx.save_model(graph, str(path), save_as_external_data=True, location=data.name)
    data.chmod(path.stat().st_mode)  # onnx creates it for the owner alone


def write_bundle(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    name: str,
    version: str,
    license_name: str,
    notes: str,
    scores: Mapping[str, Any],
    profiles: Mapping[str, int],
    threshold: float,
    graphs: Mapping[str, dict[str, Any]],
    vocabulary: dict[str, Any] | None,
    failed: str,
) -> dict[str, Any]:
    """Writes everything around graphs that are already in their places.

    Args:
        folder: The bundle's folder, `onnx/` inside it already filled.
        checkpoint: The checkpoint as exported.
        name: Name of the model.
        version: Version of the model.
        license_name: SPDX identifier for the model card.
        notes: Markdown to append to the model card.
        scores: `temperature`, the divisor of the logits, perhaps `operating_points`, thresholds by
            name, and how they were found.
        profiles: Token budgets by name.
        threshold: Refusal probability that counts.
        graphs: The manifest's entry for each variant.
        vocabulary: What pruning did, or None if nothing was pruned.
        failed: What the verification found wrong and `--force` let pass.

    Returns:
        The manifest.
    """
    _dump(folder / "config.json", {**checkpoint.config, **_external(graphs)})
    _dump(folder / "tokenizer.json", checkpoint.tokenizer, indent=None)
    _dump(folder / "tokenizer_config.json", _tokenizer_config(checkpoint))
    _dump(folder / "special_tokens_map.json", _special_tokens(checkpoint))
    template = checkpoint.template
    manifest: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "name": name,
        "version": version,
        "license": license_name,
        "source": {"checkpoint": checkpoint.name, "revision": checkpoint.revision},
        "architecture": {
            "model_type": checkpoint.config.get("model_type"),
            "layers": checkpoint.config.get("num_hidden_layers"),
            "hidden_size": checkpoint.config.get("hidden_size"),
            "vocabulary": checkpoint.config.get("vocab_size"),
        },
        "labels": {str(number): label for number, label in enumerate(checkpoint.labels)},
        "refusal_label": checkpoint.labels[checkpoint.refusal_id],
        "max_length": checkpoint.max_length,
        "profiles": dict(profiles),
        "template": {
            "roles": dict(template.roles),
            "ellipsis": template.ellipsis,
            "newline_after_role": template.newline_after_role,
        },
        "calibration": {
            "method": "temperature",
            **{key: value for key, value in scores.items() if key != "operating_points"},
        },
        "threshold": threshold,
        "operating_points": dict(scores.get("operating_points", {})),
        "graphs": dict(graphs),
    }
    if vocabulary is not None:
        manifest["vocabulary"] = vocabulary
    if failed:
        manifest["verification_failed"] = failed
    (folder / "README.md").write_text(model_card(manifest, notes), encoding="utf-8")
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "sha256": file_digest(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest["digest"] = seal(manifest)
    _dump(folder / MANIFEST, manifest)
    return manifest


def _external(graphs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What transformers.js wants to be told of graphs whose weights lie in another file."""
    files = {
        PurePosixPath(graph["file"]).name: True
        for graph in graphs.values()
        if graph["external_data"]
    }
    return {"transformers.js_config": {"use_external_data_format": files}} if files else {}


def _dump(path: Path, value: Any, *, indent: int | None = 1) -> None:
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)
    path.write_text(text + "\n", encoding="utf-8")


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of transformers' tokenizer class, ids brought up to date."""
    settings = dict(checkpoint.files.get("tokenizer_config.json", {}))
    settings.setdefault("model_max_length", checkpoint.max_length)
    # transformers 5 writes names that transformers 4 cannot resolve; this class serves both, as
    # all it needs is tokenizer.json.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for stale in ("added_tokens_decoder", "backend", "is_local", "auto_map"):
        settings.pop(stale, None)
    extra = settings.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        settings["additional_special_tokens"] = extra
    for key, token in _special_tokens(checkpoint).items():
        settings.setdefault(key, token)
    return settings


def _special_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """Names the special tokens in transformers' terms, from the file or from the tokenizer."""
    saved = checkpoint.files.get("special_tokens_map.json")
    if saved is not None:
        return saved
    settings = checkpoint.files.get("tokenizer_config.json", {})
    tokens = {
        key: settings[key]
        for key in (
            "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
            "mask_token",
        )
        if settings.get(key) is not None
    }  # fmt: skip
    roles = [*checkpoint.template.roles.values(), checkpoint.template.ellipsis]
    added = {token["content"] for token in checkpoint.tokenizer.get("added_tokens", [])}
    extra = [token for token in roles if token in added]
    return {**tokens, "additional_special_tokens": extra} if extra else tokens
