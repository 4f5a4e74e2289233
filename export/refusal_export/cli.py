"""The command `refusal-export`: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from refusal_export import DEFAULT_CHECKPOINT
from refusal_export.errors import ExportError
from refusal_runtime.version import __version__

_EXAMPLES = """\
examples:
  refusal-export agentlans/multilingual-e5-small-refusal-classifier bundle
  refusal-export ./checkpoint bundle --variants int8 --vocabulary languages37 --eval dev.jsonl

exit status: 0 written, 1 not written (verification failed or checkpoint unusable), 2 wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    # PyTorch and transformers take seconds to import: only now that they are really needed.
    try:
        from refusal_export.export import ExportOptions, export
        from refusal_export.verify import Gate
    except ImportError as error:
        print(
            f"refusal-export: {error}; run pip install 'refusal-runtime[export]'", file=sys.stderr
        )
        return 1
    try:
        manifest = export(
            options.checkpoint,
            options.out,
            ExportOptions(
                variants=tuple(options.variants.split(",")),
                vocabulary=options.vocabulary,
                embeddings=options.embeddings,
                evaluation=options.eval,
                calibration=options.calibrate,
                name=options.name,
                version=options.model_version,
                license=options.license,
                notes=options.notes,
                scores=options.scores,
                profiles=options.profiles,
                threshold=options.threshold,
                refusal_label=options.refusal_label,
                gate=Gate(
                    max_difference=options.max_difference,
                    min_agreement=options.min_agreement,
                    max_accuracy_drop=options.max_accuracy_drop,
                ),
                force=options.force,
            ),
        )
    except ExportError as error:
        print(f"refusal-export: {error}", file=sys.stderr)
        return 1
    for name, graph in manifest["graphs"].items():
        size = sum(manifest["files"][f]["bytes"] for f in (graph["file"], *graph["external_data"]))
        parity, accuracy = graph["parity"], graph["accuracy"]
        print(
            f"{name}: {size / 1e6:.1f} MB, labels agree on {parity['label_agreement']:.2%} of "
            f"{parity['texts']} texts, max |logit difference| {parity['max_logit_difference']:.2g}"
            + (f", accuracy {accuracy['accuracy']:.4f}" if accuracy else "")
        )
    if "verification_failed" in manifest:
        print(f"written in spite of: {manifest['verification_failed']}")
    print(f"bundle in {options.out}; peak memory {_peak_memory() / 2**20:,.0f} MiB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refusal-export",
        description="Turns a PyTorch refusal classifier into optimized, quantized, verified ONNX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"refusal-runtime {__version__}")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEFAULT_CHECKPOINT,
        help="folder or Hub id owner/name[@revision]; default: %(default)s",
    )
    parser.add_argument("out", nargs="?", default="bundle", help="folder; default: %(default)s")
    add = parser.add_argument
    add("--variants", default="fp32,int8,fp16", help="comma-separated; default: %(default)s")
    add("--vocabulary", help="pieces to keep: a file, or languages37; default: all")
    add("--embeddings", default="auto", choices=("auto", "int4", "int8", "fp32"))
    add("--eval", type=Path, metavar="FILE", help="labelled JSON Lines to verify on")
    add("--calibrate", type=Path, metavar="FILE", help="JSON Lines for quantization ranges")
    add("--name", help="name of the model; default: the checkpoint's")
    add("--model-version", default="1.0.0", help="default: %(default)s")
    add("--license", default="MIT", help="SPDX identifier; default: %(default)s")
    add("--notes", type=Path, metavar="FILE", help="Markdown to append to the model card")
    add("--scores", type=Path, metavar="FILE", help="calibration of scores, JSON; default: none")
    add("--profiles", type=_profiles, default={}, metavar="NAME=TOKENS,...",
        help="token budgets by name; 'default' is used unless told otherwise")  # fmt: skip
    add("--threshold", type=float, default=0.5, help="default: %(default)s")
    add("--refusal-label", help="which label means refusal, where the labels do not say")
    add("--max-difference", type=float, default=1e-3, help="gate for fp32; default: %(default)s")
    add("--min-agreement", type=float, default=0.99, help="gate for labels; default: %(default)s")
    add("--max-accuracy-drop", type=float, default=0.005, help="gate; default: %(default)s")
    add("--force", action="store_true", help="write even if verification fails, and record it")
    return parser


def _profiles(text: str) -> dict[str, int]:
    """Reads `default=256,fast=192`."""
    pairs = (item.partition("=") for item in text.split(","))
    return {name.strip(): int(tokens) for name, _, tokens in pairs}


def _peak_memory() -> float:
    """Returns the peak resident memory of this process in bytes; 0 where it is unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024.0


if __name__ == "__main__":
    sys.exit(main())
