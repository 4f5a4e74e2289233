"""Averages the trained weights of two checkpoints of one lineage.

    python training/average.py LATER EARLIER OUT --share 0.9

A fine-tuned model moved a little back towards the one it came from keeps nearly all that it learned
and more of what its start could do on other text (Wortsman et al. 2022, "Robust fine-tuning of
zero-shot models").
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import network
from safetensors.torch import load_file, save_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Averages and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("later", type=Path)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.9, help="of LATER, 0 to 1")
    options = parser.parse_args(arguments)
    later, earlier = (
        load_file(folder / "encoder.safetensors") for folder in (options.later, options.earlier)
    )
    mixed = {
        name: (options.share * value.float() + (1 - options.share) * earlier[name].float()).half()
        for name, value in later.items()
    }
    start = network.load(str(options.later))
    words = start.model.get_input_embeddings().weight.detach()
    network.write_folder(mixed, words, start, options.out)
    save_file(mixed, options.out / "encoder.safetensors")
    print(f"checkpoint in {options.out}")


if __name__ == "__main__":
    main()
