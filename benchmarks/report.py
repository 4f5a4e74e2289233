"""Writes the table of measured results into the README, from benchmarks/results/*.json alone.

python benchmarks/report.py          # rewrite README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- results: start -->", "<!-- results: end -->"


def main() -> None:
    """Rewrites the README's table."""
    text = README.read_text(encoding="utf-8")
    README.write_text(with_table(text), encoding="utf-8")


def with_table(readme: str) -> str:
    """Returns the README's text with its table brought up to date."""
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{table()}\n{END}{tail}"


def table() -> str:
    """Renders the table from the committed results."""
    dev, examples = load("accuracy-dev"), load("accuracy-minos10")
    speed, vocabulary = load("speed"), load("vocabulary")
    ours, single, batched = (
        speed["engines"][name] for name in ("refusal-runtime", "pipeline-1", "pipeline-16")
    )
    cold = ours["load_seconds"] / single["load_seconds"]
    memory = ours["peak_memory_mib"] / single["peak_memory_mib"]
    languages = len(dev["classifier"]["by_language"])
    rows = [
        (
            f"accuracy, development set ({dev['rows']:,} conversations, {languages} languages)",
            f"{dev['classifier']['accuracy']:.1%}",
        ),
        ("the same, PyTorch checkpoint in fp32", f"{dev['checkpoint']['accuracy']:.1%}"),
        ("labels equal to the PyTorch checkpoint's", f"{dev['label_agreement']:.2%}"),
        (
            f"accuracy, ten short examples in each of {len(vocabulary['languages'])} languages",
            f"{examples['classifier']['accuracy']:.1%}",
        ),
        (
            "throughput, against a transformers pipeline, PyTorch fp32, one by one",
            f"{single['times_slower']:.1f} times",
        ),
        (
            "throughput, against that pipeline in batches of 16",
            f"{batched['times_slower']:.1f} times",
        ),
        (
            "start of the process to its first verdict, against that pipeline",
            f"{cold:.2f} of its time",
        ),
        (
            f"peak memory ({ours['peak_memory_mib']:,.0f} MiB), against that pipeline",
            f"{memory:.2f} of its memory",
        ),
        (
            "vocabulary, most additional tokens in any language",
            f"{vocabulary['largest_change']:+.1%}",
        ),
    ]
    note = (
        f"Measured on {speed['environment']['cpu'].strip()}, {speed['threads']} threads, "
        f"onnxruntime {speed['environment']['versions']['onnxruntime']}; ratios come from one run "
        "of interleaved rounds. Accuracy is the embedded int8 model's."
    )
    lines = ["| measured | result |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join([*lines, "", note])


def load(name: str) -> dict[str, Any]:
    """Reads one committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
