"""Loads a PyTorch checkpoint, whatever transformers version saved it.

The tokenizer is taken as the file `tokenizer.json` and never through `AutoTokenizer`: a
tokenizer saved by transformers 5 makes transformers 4 fail, and what the runtime will use is
that file anyway.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from refusal_export import DEFAULT_CHECKPOINT
from refusal_export.errors import ExportError
from refusal_runtime.bundle import DEFAULT_TEMPLATE, Template, length_limit, refusal_label
from refusal_runtime.hub import HUB_ID

_WANTED = ("*.json", "*.safetensors", "*.bin", "*.model")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        name: Folder name or Hub id.
        revision: Commit on the Hub, or None for a folder.
        model: The sequence classifier in evaluation mode, float32.
        config: Its config.json, as a dictionary.
        tokenizer: The content of tokenizer.json, as a dictionary.
        files: Further small files to carry along, by name (tokenizer_config.json and the like).
        labels: Label by class id.
        refusal_id: Which class id means refusal.
        max_length: Most tokens that the model takes.
        template: The conversation template.
    """

    name: str
    revision: str | None
    model: Any
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    files: dict[str, dict[str, Any]]
    labels: tuple[str, ...]
    refusal_id: int
    max_length: int
    template: Template

    def make_tokenizer(self) -> Tokenizer:
        """Builds a fresh tokenizer, so that nobody's settings reach anybody else."""
        return Tokenizer.from_str(json.dumps(self.tokenizer))

    def with_vocabulary(self, model: Any, tokenizer: dict[str, Any]) -> Checkpoint:
        """Returns the checkpoint with another vocabulary."""
        size = model.config.vocab_size
        config = {**self.config, "vocab_size": size}
        if "pad_token_id" in config:
            config["pad_token_id"] = model.config.pad_token_id
        return replace(self, model=model, config=config, tokenizer=tokenizer)


def load_checkpoint(
    checkpoint: str | Path = DEFAULT_CHECKPOINT, *, refusal: str | None = None
) -> Checkpoint:
    """Loads a sequence classifier from a folder or the Hub.

    Args:
        checkpoint: A folder, or a Hub id `owner/name[@revision]`.
        refusal: Which label means refusal, where the labels do not say.

    Raises:
        ExportError: It cannot be found, is incomplete, or its tokenizer does not fit.
    """
    folder, name, revision = _locate(checkpoint)
    config = _read(folder / "config.json")
    tokenizer = _read(folder / "tokenizer.json")
    _check_tokenizer(folder, tokenizer, config)
    labels = tuple(
        str((config.get("id2label") or {}).get(str(number), f"LABEL_{number}"))
        for number in range(len(config.get("id2label") or {}) or 2)
    )
    refusal_id = refusal_label(labels)
    if refusal is not None:
        refusal_id = labels.index(refusal) if refusal in labels else None
    if refusal_id is None:
        raise ExportError(
            f"cannot tell which of the labels {', '.join(labels)} means refusal; "
            "name it with --refusal-label"
        )
    return Checkpoint(
        name=name,
        revision=revision,
        model=_load_model(folder, config),
        config=config,
        tokenizer=tokenizer,
        files={
            path.name: _read(path)
            for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
            if path.is_file()
        },
        labels=labels,
        refusal_id=refusal_id,
        max_length=length_limit(config),
        template=_detect_template(tokenizer, config),
    )


def _locate(checkpoint: str | Path) -> tuple[Path, str, str | None]:
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder, folder.resolve().name, None
    if isinstance(checkpoint, Path) or not HUB_ID.match(checkpoint):
        raise ExportError(f"{checkpoint} is neither a folder nor a Hub id owner/name[@revision]")
    from huggingface_hub import snapshot_download

    name, _, revision = checkpoint.partition("@")
    try:
        # Subfolders hold other formats (onnx, openvino) of the same weights.
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=list(_WANTED), ignore_patterns=["*/*"]
        )
    except Exception as error:
        raise ExportError(
            f"{checkpoint} cannot be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {error}); check the name and the network, or give a folder"
        ) from error
    return Path(found), name, Path(found).name


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        hint = (
            "; save the checkpoint's fast tokenizer beside it" if "tokenizer" in path.name else ""
        )
        raise ExportError(f"{path.parent} has no {path.name}{hint}") from None
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} should hold a JSON object")
    return value


def _check_tokenizer(folder: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Makes sure that the tokenizer loads and that the model has an embedding for every id."""
    try:
        loaded = Tokenizer.from_str(json.dumps(tokenizer))
    except Exception as error:  # the Rust side raises bare Exception
        raise ExportError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error
    highest = max(loaded.get_vocab(with_added_tokens=True).values())
    size = config.get("vocab_size", 0)
    if highest >= size:
        raise ExportError(
            f"tokenizer.json has ids up to {highest}, but the model's vocab_size is {size}: "
            "they are of different checkpoints"
        )
    for token in tokenizer.get("added_tokens", []):
        if loaded.token_to_id(token["content"]) != token["id"]:
            raise ExportError(f"added token {token['content']!r} does not have its id")


def _load_model(folder: Path, config: dict[str, Any]) -> Any:
    """Loads the weights; refuses to go on with some of them freshly initialized."""
    settings = AutoConfig.from_pretrained(folder)
    _translate_rope(settings, config)
    if hasattr(settings, "reference_compile"):
        settings.reference_compile = False  # ModernBERT would compile itself at the first call
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, config=settings, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise ExportError(f"{folder} holds no loadable weights: {error}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise ExportError(f"{folder} lacks weights ({missing}): not a sequence classifier?")
    return model.eval()


def _translate_rope(settings: Any, config: dict[str, Any]) -> None:
    """Carries transformers 5's rotary settings over to the names of transformers 4.

    Transformers 5 saves ModernBERT's two bases as `rope_parameters`, by kind of attention;
    transformers 4 would ignore that and silently use its defaults.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or not hasattr(settings, "global_rope_theta"):
        return
    for kind, name in (
        ("full_attention", "global_rope_theta"),
        ("sliding_attention", "local_rope_theta"),
    ):
        theta = (parameters.get(kind) or {}).get("rope_theta")
        if theta is not None:
            setattr(settings, name, theta)
    layers = config.get("layer_types")
    if layers and "global_attn_every_n_layers" not in config:
        full = [number for number, kind in enumerate(layers) if kind == "full_attention"]
        settings.global_attn_every_n_layers = full[1] if len(full) > 1 else len(layers)


def _detect_template(tokenizer: dict[str, Any], config: dict[str, Any]) -> Template:
    """Finds out how the checkpoint writes conversations, from its added tokens.

    ModernBERT classifiers of this family (NousResearch/Minos-v1) put a newline after each role
    token and between messages; the E5 ones do not.
    """
    added = {token["content"] for token in tokenizer.get("added_tokens", [])}
    newline = config.get("model_type") == "modernbert"
    ellipsis = DEFAULT_TEMPLATE.ellipsis if DEFAULT_TEMPLATE.ellipsis in added else None
    return Template(DEFAULT_TEMPLATE.roles, ellipsis, newline)
