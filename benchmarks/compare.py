"""Tells a change of speed from noise, case by case, in two results of bench.py.

    python benchmarks/compare.py BEFORE.json AFTER.json

Compares the raw samples of every engine and case that both files have with the Mann-Whitney test.
A difference counts when it is significant and the medians are more than 5 % apart. Samples of one
process share its luck (memory layout, neighbours on the machine): when a close call matters,
measure both again. The last line of stdout is the result as JSON. Exit status: 0 without, 1 with a
regression, 2 when the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stats import least_p, mann_whitney

_SAME = ("benchmark", "mode", "data", "rows", "threads")  # or samples mean different things


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--alpha", type=float, default=0.01, help="level of significance")
    parser.add_argument("--limit", type=float, default=0.05, help="change of medians that counts")
    options = parser.parse_args(arguments)
    before, after = (json.loads(path.read_bytes()) for path in (options.before, options.after))
    for key in _SAME:
        if before.get(key) != after.get(key):
            print(
                f"not comparable: {key} is {before.get(key)!r} before and {after.get(key)!r} after",
                file=sys.stderr,
            )
            return 2
    for key in ("cpu", "instructions", "versions"):
        if before["environment"].get(key) != after["environment"].get(key):
            print(f"note: {key} differs between the two", file=sys.stderr)
    rows = compare(samples(before), samples(after), options.alpha, options.limit)
    for row in rows:
        print(
            f"{row['engine']:<16} {row['case']:<18} {row['before'] * 1e3:>10.3f} ms "
            f"{row['after'] * 1e3:>10.3f} ms  {row['ratio']:6.3f}  p={row['p']:<8.2g} "
            f"{row['verdict']}"
        )
    regressions = [f"{r['engine']} {r['case']}" for r in rows if r["verdict"] == "regression"]
    print(json.dumps({"compared": len(rows), "regressions": regressions, "cases": rows}))
    return 1 if regressions else 0


def samples(result: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """Returns the raw samples, in seconds, by engine and case; starts count as a case."""
    found = {(case["engine"], case["case"]): case["raw"] for case in result["cases"]}
    for name, engine in result["engines"].items():
        if engine.get("start"):
            found[name, "cold start"] = engine["start"]["raw"]
    return found


def compare(
    before: dict[tuple[str, str], list[float]],
    after: dict[tuple[str, str], list[float]],
    alpha: float,
    limit: float,
) -> list[dict[str, Any]]:
    """Compares what both have.

    Args:
        before: Samples in seconds by engine and case.
        after: The same, later.
        alpha: The p below which a difference is significant.
        limit: Relative change of the medians from which it counts.
    """
    rows = []
    for key in before:
        if key not in after:
            continue
        first, second = before[key], after[key]
        medians = statistics.median(first), statistics.median(second)
        ratio = medians[1] / medians[0]
        p = mann_whitney(first, second)
        if least_p(len(first), len(second)) >= alpha:
            verdict = "too few samples to tell"
        elif p >= alpha:
            verdict = "same"
        elif ratio > 1 + limit:
            verdict = "regression"
        elif ratio < 1 / (1 + limit):
            verdict = "improvement"
        else:
            verdict = "small change"
        rows.append(
            {
                "engine": key[0], "case": key[1], "before": medians[0], "after": medians[1],
                "ratio": ratio, "p": p, "verdict": verdict,
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
