"""Writes a checkpoint's word embeddings in two bits a value, for models of the smallest size.

    python training/compress.py CHECKPOINT OUT

Product quantization (Jegou et al. 2011): every four columns share a codebook, and each piece has
one byte for each codebook.  The codewords are those of weighted k-means, where a piece weighs by
its Unigram probability to the power 0.3, so that frequent pieces are met best without giving the
rest away.  The result is an ordinary checkpoint to distill into; the exporter recognizes the form.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import network
import torch
from safetensors.torch import save_file
from tqdm import tqdm

GROUP = 4
CODEWORDS = 252  # of 256, so that the role tokens, which are trained further, find room
_POWER = 0.3
_SAMPLE = 30_000
_ROUNDS = 15


def main(arguments: Sequence[str] | None = None) -> None:
    """Compresses and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    start = network.load(options.checkpoint)
    words = start.model.get_input_embeddings().weight.detach()
    scores = torch.tensor([score for _, score in start.tokenizer["model"]["vocab"]])
    weights = torch.zeros(len(words))
    weights[: len(scores)] = scores.double().exp().pow(_POWER).float()
    codes, codewords = compress(words, weights)
    rebuilt = network.decode(codes, codewords)
    loss = ((rebuilt - words).square().sum(1) * weights).sum() / (
        words.square().sum(1) * weights
    ).sum()
    print(f"{loss:.1%} of the weighted energy is lost")
    model = network.trainable(start)
    model.bert.embeddings.word_embeddings.frozen = rebuilt
    network.save(model, start, options.out)
    save_file(
        {network.CODES: codes, network.CODEWORDS: codewords.half()},
        options.out / network.WORD_FILE,
    )


def compress(words: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes and codewords of a table.

    Args:
        words: float32, shape (pieces, width).
        weights: What each piece counts, float32 of shape (pieces,).

    Returns:
        uint8 of shape (pieces, width / 4), and float32 that half precision represents, of shape
        (width / 4, 252, 4).
    """
    generator = torch.Generator().manual_seed(42)
    groups = words.shape[1] // GROUP
    codes = torch.zeros((len(words), groups), dtype=torch.uint8)
    codewords = torch.zeros((groups, CODEWORDS, GROUP))
    for group in tqdm(range(groups), desc="codebooks", disable=None):
        part = words[:, group * GROUP : (group + 1) * GROUP].contiguous()
        chosen = torch.multinomial(weights, _SAMPLE, replacement=True, generator=generator)
        centres = part[torch.multinomial(weights, CODEWORDS, generator=generator)].clone()
        sample = part[chosen]
        for _ in range(_ROUNDS):
            nearest = torch.cdist(sample, centres).argmin(1)
            count = torch.zeros(CODEWORDS).index_add_(0, nearest, torch.ones(len(sample)))
            total = torch.zeros_like(centres).index_add_(0, nearest, sample)
            found = count > 0
            centres[found] = total[found] / count[found].unsqueeze(1)
        centres = centres.half().float()
        codewords[group] = centres
        codes[:, group] = torch.cdist(part, centres).argmin(1).to(torch.uint8)
    return codes, codewords


if __name__ == "__main__":
    main()
