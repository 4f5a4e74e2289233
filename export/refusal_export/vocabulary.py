"""Prunes a Unigram vocabulary: fewer pieces, the same ids remapped in tokenizer and embedding.

A text keeps its logits exactly when its segmentation stays the same, which it does unless one of
its pieces is gone: Unigram picks the best-scored segmentation, and the remaining scores stay.
"""

from __future__ import annotations

import copy
import gzip
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from refusal_export.checkpoint import Checkpoint
from refusal_export.errors import ExportError

_SPACE = "▁"  # SentencePiece's mark of a word's beginning


def load_pieces(name: str | Path) -> frozenset[str]:
    """Reads the pieces to keep, one a line, from a file or from those that come with the package.

    Args:
        name: A text file, possibly .gz, or the name of a list in `refusal_export/vocabularies`.
    """
    shipped = resources.files("refusal_export") / "vocabularies" / f"{name}.txt.gz"
    path = Path(name)
    if shipped.is_file():
        data = gzip.decompress(shipped.read_bytes())
    elif path.is_file():
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    else:
        raise ExportError(f"there is no list of pieces {str(name)!r}")
    return frozenset(data.decode("utf-8").split("\n")) - {""}


def prune(checkpoint: Checkpoint, pieces: Collection[str]) -> Checkpoint:
    """Returns the checkpoint with only the given pieces.

    Control tokens and all single characters, with and without the mark of a word's beginning,
    are kept in any case, so no character becomes unknown that was not. A checkpoint that has no
    other pieces is returned as it is.

    Args:
        checkpoint: A checkpoint with a Unigram tokenizer.
        pieces: The other pieces to keep.

    Raises:
        ExportError: The tokenizer is of another kind.
    """
    tokenizer = copy.deepcopy(checkpoint.tokenizer)
    model = tokenizer["model"]
    if model.get("type") != "Unigram":
        raise ExportError(f"only Unigram vocabularies can be pruned, not {model.get('type')}")
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = model["vocab"]
    kept = [
        number
        for number, (piece, _) in enumerate(vocabulary)
        if piece in pieces
        or piece in added
        or len(piece) == 1
        or (len(piece) == 2 and piece.startswith(_SPACE))
        or number == model["unk_id"]
    ]
    if len(kept) == len(vocabulary):
        return checkpoint
    # Added tokens beyond the vocabulary follow it, in their order.
    beyond = sorted(number for number in added.values() if number >= len(vocabulary))
    order = kept + beyond
    renumbered = {old: new for new, old in enumerate(order)}
    model["vocab"] = [vocabulary[number] for number in kept]
    model["unk_id"] = renumbered[model["unk_id"]]
    for token in tokenizer["added_tokens"]:
        token["id"] = renumbered[token["id"]]
    _renumber_frame(tokenizer.get("post_processor"), renumbered)
    return checkpoint.with_vocabulary(_smaller(checkpoint.model, order, renumbered), tokenizer)


def _renumber_frame(node: Any, renumbered: dict[int, int]) -> None:
    """Renumbers the ids inside a post-processor: TemplateProcessing, or BERT's and RoBERTa's."""
    if isinstance(node, dict):
        if isinstance(node.get("ids"), list):
            node["ids"] = [renumbered[number] for number in node["ids"]]
        for key, value in node.items():
            if key in ("sep", "cls") and isinstance(value, list):
                node[key] = [value[0], renumbered[value[1]]]
            else:
                _renumber_frame(value, renumbered)
    elif isinstance(node, list):
        for value in node:
            _renumber_frame(value, renumbered)


def _smaller(model: Any, order: list[int], renumbered: dict[int, int]) -> Any:
    """Returns a copy of the model whose embedding has the rows `order`, in that order."""
    smaller = copy.deepcopy(model)
    old = smaller.get_input_embeddings()
    pad = smaller.config.pad_token_id
    padding = renumbered.get(pad) if pad is not None else None
    new = torch.nn.Embedding(len(order), old.embedding_dim, padding_idx=padding)
    with torch.no_grad():
        new.weight.copy_(old.weight[torch.tensor(order)])
    smaller.set_input_embeddings(new)
    smaller.config.vocab_size = len(order)
    smaller.config.pad_token_id = padding
    return smaller.eval()
