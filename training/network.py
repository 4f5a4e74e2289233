"""The network being trained: a checkpoint with its word embeddings frozen, role tokens not.

Of 118 million parameters 96 are word embeddings; frozen they cost no optimizer, do not forget the
languages that the training data lacks, and stay exact in the 4-bit blocks they came in.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertForSequenceClassification

from refusal_export.checkpoint import Checkpoint, load_checkpoint
from refusal_export.vocabulary import load_pieces, prune

WORDS = "bert.embeddings.word_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
ROLES = "role_tokens"
CODES, CODEWORDS = "word_codes", "word_codewords"
WORD_FILE = "words.safetensors"  # beside a checkpoint whose word embeddings are compressed
ROLE_COUNT = 4  # system, user, assistant, ellipsis: the last rows of the vocabulary


class WordEmbedding(torch.nn.Module):
    """Frozen rows for the vocabulary, trainable ones for the role tokens at its end."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", weight.detach().clone(), persistent=False)
        self.roles = torch.nn.Parameter(weight[-ROLE_COUNT:].detach().clone())
        self.first = len(weight) - ROLE_COUNT

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Looks ids of any shape up; returns float32 vectors."""
        vectors = torch.nn.functional.embedding(ids, self.frozen)
        roles = torch.nn.functional.embedding((ids - self.first).clamp(min=0), self.roles)
        return torch.where((ids >= self.first).unsqueeze(-1), roles, vectors)


def load(source: str, *, vocabulary: str | None = "languages37") -> Checkpoint:
    """Loads a checkpoint, its vocabulary pruned to what the product will have.

    Args:
        source: A folder or Hub id.
        vocabulary: Pieces to keep; None for all.
    """
    checkpoint = load_checkpoint(source)
    if vocabulary is not None:
        checkpoint = prune(checkpoint, load_pieces(vocabulary))
    return checkpoint


def trainable(
    checkpoint: Checkpoint, *, layers: Sequence[int] | None = None, dropout: float = 0.1
) -> BertForSequenceClassification:
    """Returns a copy of the model to train, perhaps with only some of its layers.

    Args:
        checkpoint: Where it starts.
        layers: Which layers to keep, by number; None for all.
        dropout: Of hidden states; attention probabilities have none, which is far quicker.
    """
    old = checkpoint.model
    config = copy.deepcopy(old.config)
    chosen = range(config.num_hidden_layers) if layers is None else layers
    config.num_hidden_layers = len(chosen)
    config.hidden_dropout_prob = dropout
    config.attention_probs_dropout_prob = 0.0
    config._attn_implementation = "sdpa"
    model = BertForSequenceClassification(config)
    state = old.state_dict()
    wanted = {}
    for name in model.state_dict():
        parts = name.split(".")
        if parts[:3] == ["bert", "encoder", "layer"]:
            parts[3] = str(chosen[int(parts[3])])
        wanted[name] = state[".".join(parts)]
    model.load_state_dict(wanted)
    model.bert.embeddings.word_embeddings = WordEmbedding(state[WORDS])
    return model


def encoder_weights(model: BertForSequenceClassification) -> dict[str, torch.Tensor]:
    """Returns everything but the frozen embeddings, in half precision, ready for a file."""
    state = {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
        if "word_embeddings" not in name
    }
    state[ROLES] = model.bert.embeddings.word_embeddings.roles.detach().half().contiguous()
    return state


def save(model: BertForSequenceClassification, checkpoint: Checkpoint, out: Path) -> None:
    """Writes a Hugging Face folder, and beside it `encoder.safetensors` without the embeddings.

    Weights are rounded to half precision, so that the folder and what is rebuilt from the small
    file are the same to the bit.
    """
    out.mkdir(parents=True, exist_ok=True)
    small = encoder_weights(model)
    save_file(small, out / "encoder.safetensors")
    write_folder(small, model.bert.embeddings.word_embeddings.frozen, checkpoint, out)


def write_folder(
    small: dict[str, torch.Tensor], words: torch.Tensor, checkpoint: Checkpoint, out: Path
) -> None:
    """Writes a Hugging Face folder from encoder weights, word embeddings and a tokenizer.

    Args:
        small: What `encoder_weights` returned.
        words: Word embeddings, float32 of shape (vocabulary, hidden size); the last rows, the
            role tokens, are replaced.
        checkpoint: Whose tokenizer and configuration to take.
        out: The folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.float() for name, value in small.items()}
    roles = state.pop(ROLES)
    state[WORDS] = torch.cat([words[: len(words) - ROLE_COUNT], roles]).contiguous()
    layers = 1 + max(int(name.split(".")[3]) for name in state if ".layer." in name)
    config = {
        **checkpoint.config,
        "vocab_size": len(words),
        "num_hidden_layers": layers,
        "max_position_embeddings": len(state[POSITIONS]),
        "architectures": ["BertForSequenceClassification"],
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    text = json.dumps(checkpoint.tokenizer, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    for name, content in checkpoint.files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (out / name).write_text(text + "\n", encoding="utf-8")


def decode(codes: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Returns the table that codes of compress.py stand for, float32 (pieces, width)."""
    parts = [codewords[group].float()[codes[:, group].long()] for group in range(len(codewords))]
    return torch.cat(parts, dim=1)
