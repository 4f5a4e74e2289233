"""Turns rows into batches of token ids, with the runtime's own parser and encoder.

An epoch is planned as a whole from its seed: the same rows, seed and epoch give the same batches,
so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from augment import Augmenter

from refusal_export.checkpoint import Checkpoint
from refusal_runtime.conversation import parse_conversation
from refusal_runtime.encoding import Encoder

Row = dict[str, Any]

# Token budgets, drawn by weight: most conversations fit into 256, and the ellipsis token must be
# met at every budget that users may set.
BUDGETS = ((192, 0.25), (256, 0.6), (384, 0.1), (512, 0.05))


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded conversation: ids, whether it refuses (0 or 1), its weight in the loss."""

    ids: np.ndarray
    label: int
    weight: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples: int64 ids and mask of shape (rows, tokens), labels and weights (rows,)."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


class Planner:
    """Plans epochs.

    Args:
        rows: What to train on; `repeat` in a row says how often it comes in an epoch, `weight`
            how much it counts in the loss.
        checkpoint: The model's tokenizer, template and longest input.
        tokens: Padded tokens in a batch, at most.
        seed: Of everything random.
        longest: Tokens of a conversation, at most; longer budgets are cut to it.
        plain: No augmentation, one budget of 256 tokens, for comparisons.
        response_only: The judged message alone, for comparisons.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        checkpoint: Checkpoint,
        *,
        tokens: int,
        seed: int,
        longest: int = 512,
        plain: bool = False,
        response_only: bool = False,
    ) -> None:
        self._rows = rows
        self._template = checkpoint.template
        self._encoders = {
            budget: Encoder(
                checkpoint.make_tokenizer(),
                checkpoint.template,
                max_length=min(budget, longest, checkpoint.max_length),
            )
            for budget, _ in BUDGETS
        }
        self._augmenter = Augmenter(rows)
        self._tokens, self._seed, self._plain = tokens, seed, plain
        self._response_only = response_only
        self._pad = checkpoint.make_tokenizer().token_to_id("<pad>")

    def epoch(self, number: int) -> list[Batch]:
        """Returns the batches of an epoch, in the order of training."""
        examples = []
        for index, row in enumerate(self._rows):
            for copy in range(int(row.get("repeat", 1))):
                rng = random.Random(f"{self._seed} {number} {index} {copy}")
                examples.append(self._example(row, rng))
        rng = random.Random(f"{self._seed} {number}")
        # Noise on the lengths, so that neighbours differ from epoch to epoch.
        examples.sort(key=lambda example: len(example.ids) * rng.uniform(0.9, 1.1))
        batches: list[list[Example]] = [[]]
        longest = 0
        for example in examples:
            longest = max(longest, len(example.ids))
            if (len(batches[-1]) + 1) * longest > self._tokens and batches[-1]:
                batches.append([])
                longest = len(example.ids)
            batches[-1].append(example)
        rng.shuffle(batches)
        return [self._pack(batch) for batch in batches]

    def _example(self, row: Row, rng: random.Random) -> Example:
        budget = 256
        messages = row["messages"]
        if not self._plain:
            budget = rng.choices([b for b, _ in BUDGETS], [w for _, w in BUDGETS])[0]
            messages = self._augmenter.variant(row, rng)
        if self._response_only:
            messages = messages[-1:]
        ids = self._encoders[budget].encode(parse_conversation(messages, self._template)).ids
        return Example(ids, int(row["label"] == "refusal"), float(row.get("weight", 1.0)))

    def _pack(self, batch: Sequence[Example]) -> Batch:
        longest = max(len(example.ids) for example in batch)
        ids = torch.full((len(batch), longest), self._pad)
        mask = torch.zeros((len(batch), longest), dtype=torch.int64)
        for number, example in enumerate(batch):
            ids[number, : len(example.ids)] = torch.from_numpy(example.ids)
            mask[number, : len(example.ids)] = 1
        return Batch(
            ids,
            mask,
            torch.tensor([example.label for example in batch]),
            torch.tensor([example.weight for example in batch]),
        )
