"""Measures accuracy on labelled conversations, by language and source, against PyTorch if asked.

    python benchmarks/accuracy.py DATA.jsonl [--checkpoint FOLDER] [--save NAME]

DATA is JSON Lines with `messages` and `label` ("refusal" or "non-refusal"), possibly .gz. With a
PyTorch checkpoint (needs the extra `bench`) the same conversations also go through it in fp32,
with its own tokenizer. The last line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import environment, is_refusal, read_rows, save

from refusal_runtime import RefusalClassifier


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="bundle or Hub id; default: the embedded model")
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--checkpoint", help="PyTorch checkpoint to compare with, in fp32")
    parser.add_argument(
        "--limit", type=int, help="use only every n-th row so that about LIMIT stay"
    )
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)

    rows = read_rows(options.data)
    if options.limit and options.limit < len(rows):
        rows = rows[:: len(rows) // options.limit][: options.limit]
    truth = [is_refusal(row) for row in rows]
    classifier = RefusalClassifier(options.model, variant=options.variant)
    result: dict[str, Any] = {
        "benchmark": "accuracy",
        "environment": environment(),
        "data": options.data.name,
        "rows": len(rows),
        "model": f"{classifier.bundle.name} {classifier.bundle.version}".strip(),
        "variant": classifier.graph.name,
    }
    start = time.perf_counter()
    verdicts = list(classifier.stream(rows, on_error="raise"))
    seconds = time.perf_counter() - start
    # The label, not the threshold's verdict: this is what a transformers pipeline answers.
    refusal = classifier.bundle.labels[classifier.bundle.refusal_id]
    found = [verdict.label == refusal for verdict in verdicts]
    result["seconds"] = seconds
    result["truncated"] = sum(verdict.truncated for verdict in verdicts)
    result["classifier"] = score(rows, truth, found)
    if options.checkpoint:
        reference = torch_labels(options.checkpoint, rows)
        result["checkpoint"] = score(rows, truth, reference)
        agreement = sum(a == b for a, b in zip(found, reference, strict=True)) / len(rows)
        result["label_agreement"] = agreement
    report(result)
    if options.save:
        print(f"saved to {save(options.save, result)}")
    print(json.dumps(result, ensure_ascii=False))


def torch_labels(checkpoint: str, rows: list[dict[str, Any]]) -> list[bool]:
    """Judges the rows with the PyTorch checkpoint in fp32, one by one at exact length."""
    from refusal_export.checkpoint import load_checkpoint
    from refusal_export.verify import Texts, encode_texts, torch_logits

    loaded = load_checkpoint(checkpoint)
    texts = Texts("rows", rows, [None] * len(rows), [""] * len(rows))
    logits = torch_logits(loaded.model, encode_texts(loaded, texts), title="PyTorch fp32")
    return [int(row.argmax()) == loaded.refusal_id for row in logits]


def score(rows: list[dict[str, Any]], truth: list[bool], found: list[bool]) -> dict[str, Any]:
    """Accuracy, false alarms and misses: overall, by language, by source."""
    groups: dict[str, dict[str, list[int]]] = {"language": defaultdict(list)}
    groups["source"] = defaultdict(list)
    for number, row in enumerate(rows):
        for key, members in groups.items():
            if row.get(key):
                members[str(row[key])].append(number)

    def of(members: Sequence[int]) -> dict[str, Any]:
        right = sum(truth[n] == found[n] for n in members)
        return {
            "rows": len(members),
            "accuracy": right / len(members),
            "false_alarms": sum(found[n] and not truth[n] for n in members),
            "misses": sum(truth[n] and not found[n] for n in members),
        }

    by = {
        f"by_{key}": {name: of(members) for name, members in sorted(found_groups.items())}
        for key, found_groups in groups.items()
    }
    return {**of(range(len(rows))), **by}


def report(result: dict[str, Any]) -> None:
    """Prints the result as text."""
    print(f"{result['model']} ({result['variant']}) on {result['data']}: {result['rows']:,} rows")
    for name in ("classifier", "checkpoint"):
        if name not in result:
            continue
        found = result[name]
        title = "this classifier" if name == "classifier" else "PyTorch checkpoint, fp32"
        print(
            f"{title}: accuracy {found['accuracy']:.4f} "
            f"({found['false_alarms']} false alarms, {found['misses']} misses)"
        )
    if "label_agreement" in result:
        difference = result["classifier"]["accuracy"] - result["checkpoint"]["accuracy"]
        print(f"label agreement {result['label_agreement']:.4f}, accuracy {difference:+.4f}")
    for key in ("by_language", "by_source"):
        for name, found in result["classifier"][key].items():
            line = f"  {name:<16} {found['rows']:>6} rows  accuracy {found['accuracy']:.3f}"
            if "checkpoint" in result:
                line += f"  (PyTorch {result['checkpoint'][key][name]['accuracy']:.3f})"
            print(line)


if __name__ == "__main__":
    main()
