"""Packs what a run trained, and compressed word embeddings if any, into the file to commit.

    python training/pack.py RUN training/weights/edge.safetensors [--words COMPRESSED]

RUN is a folder of train.py or average.py, COMPRESSED the folder of compress.py that it started
from.  checkpoint.py makes a checkpoint of the file again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import network
import torch
from safetensors.torch import load_file, save_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Packs the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", type=Path, help="folder that compress.py wrote")
    parser.add_argument("--positions", type=int, help="tokens that the model is to take, at most")
    options = parser.parse_args(arguments)
    weights = load_file(options.run / "encoder.safetensors")
    if options.positions:
        weights[network.POSITIONS] = weights[network.POSITIONS][: options.positions].clone()
    if options.words:
        words = load_file(options.words / network.WORD_FILE)
        table = network.decode(words[network.CODES], words[network.CODEWORDS])
        mine = load_file(options.run / "model.safetensors")[network.WORDS]
        if not torch.equal(table[: -network.ROLE_COUNT], mine[: -network.ROLE_COUNT]):
            raise SystemExit(f"{options.run} did not start from the embeddings of {options.words}")
        weights |= words
    save_file(weights, options.out)
    options.out.chmod(0o644)  # it is written for its owner only
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
