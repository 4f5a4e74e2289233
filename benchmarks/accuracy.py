"""Measures accuracy on labelled conversations, by language, kind and source.

    python benchmarks/accuracy.py [DATA] [--checkpoint FOLDER] [--typography] [--save NAME]
    python benchmarks/accuracy.py minos10.jsonl.gz --table

DATA is JSON Lines with `messages` and `label` ("refusal" or "non-refusal"), possibly .gz; without
it, the project's own set in 37 languages.  Besides the classifier a list of refusing phrases is
measured on the same rows.  With a PyTorch checkpoint (needs the extra `bench`) they also go through
it in fp32, with its own tokenizer.  The last line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keywords
import numpy as np
from common import DATA, environment, is_refusal, read_rows, save
from metrics import reliability, score
from typography import VARIANTS

from refusal_runtime import RefusalClassifier, Verdict


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--model", help="bundle or Hub id; default: the embedded model")
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--profile", help="token budget by name; default: the model's default")
    parser.add_argument("--checkpoint", help="PyTorch checkpoint to compare with, in fp32")
    parser.add_argument(
        "--limit", type=int, help="use only every n-th row so that about LIMIT stay"
    )
    parser.add_argument("--typography", action="store_true", help="also with changed typography")
    parser.add_argument("--table", action="store_true", help="print example x language")
    parser.add_argument("--errors", type=int, default=0, help="print so many wrong verdicts")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)

    rows = read_rows(options.data)
    if options.limit and options.limit < len(rows):
        rows = rows[:: len(rows) // options.limit][: options.limit]
    truth = [is_refusal(row) for row in rows]
    classifier = RefusalClassifier(
        options.model, variant=options.variant, max_length=options.profile
    )
    result: dict[str, Any] = {
        "benchmark": "accuracy",
        "environment": environment(),
        "data": options.data.name,
        "rows": len(rows),
        "model": f"{classifier.bundle.name} {classifier.bundle.version}".strip(),
        "variant": classifier.graph.name,
        "max_length": classifier.max_length,
    }
    start = time.perf_counter()
    verdicts = list(classifier.stream(rows, on_error="raise"))
    seconds = time.perf_counter() - start
    found = labels(classifier, verdicts)
    result["seconds"] = seconds
    result["truncated"] = sum(verdict.truncated for verdict in verdicts)
    result["classifier"] = score(rows, truth, found)
    chances = np.array([verdict.refusal_probability for verdict in verdicts])
    result["calibration"] = reliability(chances, np.array(truth))
    if all("messages" in row for row in rows):
        result["keywords"] = score(rows, truth, [keywords.refuses(row) for row in rows])
    if options.checkpoint:
        reference = torch_labels(options.checkpoint, rows, classifier.max_length)
        result["checkpoint"] = score(rows, truth, reference)
        agreement = sum(a == b for a, b in zip(found, reference, strict=True)) / len(rows)
        result["label_agreement"] = agreement
    if options.typography:
        result["typography"] = typography(classifier, rows, found)
    report(result)
    if options.table:
        print(table(rows, truth, found))
    wrong = [n for n in range(len(rows)) if truth[n] != found[n]]
    for number in wrong[: options.errors]:
        judged = rows[number]["messages"][-1]["content"].replace("\n", " ")
        print(f"{rows[number].get('id')} p={chances[number]:.2f} {judged[:150]}")
    if options.save:
        print(f"saved to {save(options.save, result)}")
    print(json.dumps(result, ensure_ascii=False))


def labels(classifier: RefusalClassifier, verdicts: Sequence[Verdict]) -> list[bool]:
    """Whether each label means refusal: what a transformers pipeline answers, no threshold."""
    refusal = classifier.bundle.labels[classifier.bundle.refusal_id]
    return [verdict.label == refusal for verdict in verdicts]


def torch_labels(checkpoint: str, rows: list[dict[str, Any]], max_length: int) -> list[bool]:
    """Judges the rows with the PyTorch checkpoint in fp32, one by one, within the same budget."""
    from refusal_export.checkpoint import load_checkpoint
    from refusal_export.verify import Texts, encode_texts, torch_logits

    loaded = load_checkpoint(checkpoint)
    texts = Texts("rows", rows, [None] * len(rows), [""] * len(rows))
    batch = encode_texts(loaded, texts, max_length=max_length)
    logits = torch_logits(loaded.model, batch, title="PyTorch fp32")
    return [int(row.argmax()) == loaded.refusal_id for row in logits]


def typography(
    classifier: RefusalClassifier, rows: list[dict[str, Any]], found: list[bool]
) -> dict[str, Any]:
    """Returns the share of labels that each change of typography changes, and of all together.

    A variant that leaves a conversation as it was (capitals in a script without them) says
    nothing about it and does not count.
    """
    result: dict[str, Any] = {}
    changed = counted = 0
    for name, change in VARIANTS.items():
        rng = random.Random(name)
        variants, before = [], []
        for row, label in zip(rows, found, strict=True):
            messages = [{**m, "content": change(m["content"], rng)} for m in row["messages"]]
            if messages != row["messages"]:
                variants.append(messages)
                before.append(label)
        after = labels(classifier, list(classifier.stream(variants, on_error="raise")))
        flips = sum(a != b for a, b in zip(before, after, strict=True))
        result[name] = {"rows": len(before), "changed": flips}
        changed, counted = changed + flips, counted + len(before)
    return {"rows": counted, "changed": changed, "share": changed / counted, "variants": result}


def table(rows: list[dict[str, Any]], truth: list[bool], found: list[bool]) -> str:
    """Lays example x language out, for rows with ids like NAME-3-de: what was answered."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for row, right, answer in zip(rows, truth, found, strict=True):
        number = row["id"].split("-")[1]
        sign = " " if right == answer else "!"
        cells[row["language"]][number] = ("R" if answer else "-") + sign
    numbers = sorted({number for row in cells.values() for number in row}, key=int)
    lines = ["     " + " ".join(f"{number:>3}" for number in numbers)]
    for language, row in cells.items():
        lines.append(f"{language:<4} " + " ".join(f"{row.get(n, ''):>3}" for n in numbers))
    lines.append("R: refusal, -: none, !: wrong")
    return "\n".join(lines)


def report(result: dict[str, Any]) -> None:
    """Prints the result as text."""
    print(f"{result['model']} ({result['variant']}) on {result['data']}: {result['rows']:,} rows")
    titles = {
        "classifier": "this classifier",
        "checkpoint": "PyTorch checkpoint, fp32",
        "keywords": "list of phrases",
    }
    for name, title in titles.items():
        if name in result:
            found = result[name]
            print(
                f"{title}: accuracy {found['accuracy']:.4f} "
                f"({found['false_alarms']} false alarms, {found['misses']} misses)"
            )
    if "label_agreement" in result:
        difference = result["classifier"]["accuracy"] - result["checkpoint"]["accuracy"]
        print(f"label agreement {result['label_agreement']:.4f}, accuracy {difference:+.4f}")
    error = result["calibration"]["expected_calibration_error"]
    print(f"expected calibration error {error:.4f}")
    if "typography" in result:
        for name, found in result["typography"]["variants"].items():
            print(f"  {name:<16} {found['changed']:>4} of {found['rows']:,} labels changed")
        print(f"  all              {result['typography']['share']:.2%} changed")
    for key in ("by_language", "by_source", "by_kind"):
        for name, found in result["classifier"].get(key, {}).items():
            line = f"  {name:<16} {found['rows']:>6} rows  accuracy {found['accuracy']:.3f}"
            if "keywords" in result:
                line += f"  (phrases {result['keywords'][key][name]['accuracy']:.3f})"
            if "checkpoint" in result:
                line += f"  (PyTorch {result['checkpoint'][key][name]['accuracy']:.3f})"
            print(line)


if __name__ == "__main__":
    main()
