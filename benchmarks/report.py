"""Writes the table of measured results into the README, from benchmarks/results/*.json alone.

python benchmarks/report.py          # rewrite README.md
"""

from __future__ import annotations

import json
import re
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
    vocabulary = load("vocabulary")
    found = load("bench")
    speed = from_bench(found)
    languages = len(dev["classifier"]["by_language"])
    ours = load("accuracy-languages37")
    rows = [
        (
            f"accuracy, our own set ({ours['rows']:,} conversations in 37 languages, every kind)",
            f"{ours['classifier']['accuracy']:.1%}",
        ),
        (
            "the same, a list of refusing phrases in 37 languages",
            f"{ours['keywords']['accuracy']:.1%}",
        ),
        (
            "the same, lowest language (Tibetan apart), lowest kind",
            f"{lowest(ours, 'language', without='bo')}, {lowest(ours, 'kind')}",
        ),
        (
            "expected calibration error on it",
            f"{ours['calibration']['expected_calibration_error']:.3f}",
        ),
        (
            "labels that other typography changes",
            f"{ours['typography']['share']:.2%}",
        ),
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
        *speed,
        *without_vnni(),
        (
            "vocabulary, most additional tokens in any language",
            f"{vocabulary['largest_change']:+.1%}",
        ),
    ]
    environment = found["environment"]
    note = (
        f"Measured on {environment['cpu'].strip()} ({', '.join(environment['instructions'])}), "
        f"{found['threads']} threads, "
        f"onnxruntime {environment['versions']['onnxruntime']}; ratios come from one run "
        "of interleaved rounds. Accuracy is the embedded int8 model's."
    )
    lines = ["| measured | result |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join([*lines, "", note])


def lowest(result: dict[str, Any], group: str, *, without: str = "") -> str:
    """Names the group of least accuracy."""
    found = {
        name: entry["accuracy"]
        for name, entry in result["classifier"][f"by_{group}"].items()
        if name != without
    }
    name = min(found, key=lambda key: found[key])
    return f"{name.replace('_', ' ')} {found[name]:.1%}"


def from_bench(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows on speed, from a result of bench.py; those on peers where it has them."""
    engines, name = found["engines"], "refusal-runtime"
    cases = {(case["engine"], case["case"]): case for case in found["cases"]}
    ours, alone = cases[name, "Offline"], cases.get((name, "SingleStream-128"))
    rows = []
    if alone:
        rows.append(
            (
                "latency of one conversation of 128 tokens, median and 99th percentile",
                f"{alone['p50'] * 1e3:.1f} ms, {alone['p99'] * 1e3:.1f} ms",
            )
        )
    budgets = budget(engines[name])
    rows.append((f"throughput, conversations a second{budgets}", f"{ours['per_second']:,.0f}"))
    pipeline = cases.get(("transformers", "Offline"))
    # The peers read all that the model takes: our engine does too in the second figure.
    whole = cases.get((f"{name}-thorough", "Offline"))
    if pipeline:
        rows.append(
            (
                "the same, against a transformers pipeline, PyTorch fp32, in its best batches",
                against(ours, whole, pipeline),
            )
        )
    # The others that give a verdict, but for the list of phrases and our own bundles.
    others = [
        case
        for (engine, label), case in cases.items()
        if label == "Offline"
        and engine not in ("keywords", "transformers")
        and not engines[engine]["title"].startswith("this runtime")
        and engines[engine]["accuracy"] is not None
    ]
    if others:
        best = max(others, key=lambda case: case["per_second"])
        rows.append(
            (
                f"the same, against the fastest of the other engines, {best['engine']}",
                against(ours, whole, best),
            )
        )
    mine, theirs = engines[name], engines.get("transformers")
    start, memory = mine["start"]["p50"], mine["peak_memory_mib"]
    if pipeline and theirs:
        rows.append(
            (
                f"start of the process to its first verdict ({start:.2f} s), against that pipeline",
                f"{start / theirs['start']['p50']:.2f} of its time",
            )
        )
        rows.append(
            (
                f"peak memory ({memory:,.0f} MiB), against that pipeline",
                f"{memory / theirs['peak_memory_mib']:.2f} of its memory",
            )
        )
    else:
        rows.append(("start of the process to its first verdict", f"{start:.2f} s"))
        rows.append(("peak memory", f"{memory:,.0f} MiB"))
    return rows


def without_vnni() -> list[tuple[str, str]]:
    """The throughput's row for a processor without VNNI, an earlier run kept beside the last."""
    found = load("bench-avx2")
    cases = {(case["engine"], case["case"]): case for case in found["cases"]}
    ours, whole, pipeline = (
        cases[name, "Offline"]
        for name in ("refusal-runtime", "refusal-runtime-thorough", "transformers")
    )
    version = found["environment"]["versions"]["refusal-runtime"]
    return [
        (
            f"throughput against that pipeline on a processor with AVX2 and no VNNI ({version})",
            against(ours, whole, pipeline),
        )
    ]


def budget(engine: dict[str, Any]) -> str:
    """Names the token budget of an engine of ours."""
    found = re.search(r"at most (\d+) tokens", engine["configuration"] or "")
    return f", at most {found[1]} tokens of each" if found else ""


def against(ours: dict[str, Any], whole: dict[str, Any] | None, peer: dict[str, Any]) -> str:
    """Compares throughputs, within our default budget and with as many tokens as the peer."""
    found = f"{ours['per_second'] / peer['per_second']:.1f} times"
    if whole:
        found += f"; {whole['per_second'] / peer['per_second']:.1f} with as many tokens as it reads"
    return found


def load(name: str) -> dict[str, Any]:
    """Reads one committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
