"""Accuracy against speed: token budgets, models, and both models one after the other.

    python benchmarks/frontier.py [DATA ...] [--bundle edge=FOLDER] [--save NAME]

Every bundle judges every row within every budget that it takes, in turns of a few rows each, so
that all meet the same state of the machine.  DATA are files or folders of labelled conversations;
without any, the project's own set.  A cascade (the smaller bundle first, the default one for what
lies nearest to the border) is reckoned from the same verdicts: its time is the first model's plus
the second's share of the tokens that it judges again.  The last line of stdout is the result as
JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cases import choose
from common import DATA, environment, is_refusal, read_rows, save

from refusal_runtime import RefusalClassifier, hardware

BUDGETS = (512, 384, 256, 192, 128, 96)
_TURN = 32  # rows that one configuration judges before the next has its turn
_AGAIN = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # shares that a cascade judges again


class Run:
    """One bundle within one budget: its verdicts and its time so far."""

    def __init__(self, name: str, bundle: str | None, budget: int) -> None:
        self.name, self.budget = name, budget
        self.classifier = RefusalClassifier(bundle, provider="cpu", max_length=budget)
        opened = self.classifier.bundle
        self.model = f"{opened.name} {opened.version}".strip()
        self.seconds = 0.0
        self.chances: list[float] = []
        self.tokens: list[int] = []

    def judge(self, rows: Sequence[dict[str, Any]]) -> None:
        start = time.perf_counter()
        verdicts = list(self.classifier.stream(rows, on_error="raise"))
        self.seconds += time.perf_counter() - start
        self.chances += [verdict.refusal_probability for verdict in verdicts]
        self.tokens += [verdict.tokens for verdict in verdicts]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="*", default=[DATA])
    parser.add_argument("--model", help="default bundle; else the embedded model")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument(
        "--limit", type=int, help="rows of each set, drawn at random, always the same"
    )
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)
    sets = {path.name.partition(".")[0]: read_rows(path) for path in options.data}
    if len(sets) < len(options.data):
        parser.error("two of the data sets have the same name")
    if options.limit:
        sets = {name: choose(rows, options.limit) for name, rows in sets.items()}
    bundles: dict[str, str | None] = {"default": options.model}
    for item in options.bundle:
        name, _, folder = item.partition("=")
        if not folder:
            parser.error(f"--bundle takes NAME=FOLDER, found {item!r}")
        bundles[name] = folder
    longest = {
        name: RefusalClassifier(bundle, provider="cpu").bundle.max_length
        for name, bundle in bundles.items()
    }
    budgets = sorted(map(int, options.budgets.split(",")), reverse=True)
    result: dict[str, Any] = {
        "benchmark": "frontier",
        "environment": environment(),
        "threads": hardware.resolve_threads(None)[0],
        "sets": {},
    }
    for title, rows in sets.items():
        runs = [
            Run(name, bundle, budget)
            for name, bundle in bundles.items()
            for budget in budgets
            if budget <= longest[name]
        ]
        result["models"] = {run.name: run.model for run in runs}
        for run in runs:
            list(run.classifier.stream(rows[:8]))  # opens the graph as the measurement needs it
        for start in range(0, len(rows), _TURN):
            turn = start // _TURN % len(runs)
            for run in runs[turn:] + runs[:turn]:
                run.judge(rows[start : start + _TURN])
        result["sets"][title] = summary(rows, runs)
        print(table(title, result["sets"][title]))
    if options.save:
        print(f"saved to {save(options.save, result)}")
    print(json.dumps(result))


def summary(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> dict[str, Any]:
    """Returns accuracy and speed of every run, and of cascades into the first bundle."""
    truth = np.array([is_refusal(row) for row in rows])
    longest = runs[0]
    found = [
        {
            "bundle": run.name,
            "max_length": run.budget,
            "accuracy": float(((np.array(run.chances) >= 0.5) == truth).mean()),
            "same_label": float(
                ((np.array(run.chances) >= 0.5) == (np.array(longest.chances) >= 0.5)).mean()
            ),
            "mean_tokens": float(np.mean(run.tokens)),
            "per_second": len(rows) / run.seconds,
            "speed": longest.seconds / run.seconds,
        }
        for run in runs
    ]
    cascades = [
        cascade(truth, first, second, share, longest.seconds)
        for first in runs
        for second in runs
        if first.name != runs[0].name and second.name == runs[0].name
        for share in _AGAIN
        if first.budget <= second.budget
    ]
    return {"rows": len(rows), "runs": found, "cascades": cascades}


def cascade(
    truth: np.ndarray, first: Run, second: Run, share: float, whole: float
) -> dict[str, Any]:
    """Returns what judging the least certain share again with a second run would give."""
    chances = np.array(first.chances)
    again = np.argsort(np.abs(chances - 0.5))[: round(share * len(chances))]
    tokens = np.array(second.tokens)
    seconds = first.seconds + second.seconds * float(tokens[again].sum() / tokens.sum())
    margin = float(np.abs(chances[again] - 0.5).max()) if len(again) else 0.0
    chances[again] = np.array(second.chances)[again]
    return {
        "first": first.name,
        "first_max_length": first.budget,
        "second_max_length": second.budget,
        "judged_again": share,
        "margin": margin,
        "accuracy": float(((chances >= 0.5) == truth).mean()),
        "speed": whole / seconds,
    }


def table(title: str, found: dict[str, Any]) -> str:
    """Lays a set's runs out as text, and the cascades that no run beats."""
    lines = [f"{title}: {found['rows']:,} rows"]
    for run in found["runs"]:
        lines.append(
            f"  {run['bundle']:<10} {run['max_length']:>4} tokens  accuracy {run['accuracy']:.4f}  "
            f"{run['per_second']:7.1f}/s  {run['speed']:.2f} times"
        )
    everything = found["runs"] + found["cascades"]
    for row in found["cascades"]:
        if not any(
            other["accuracy"] >= row["accuracy"] and other["speed"] > row["speed"]
            for other in everything
        ):
            lines.append(
                f"  {row['first']} {row['first_max_length']} then {row['second_max_length']} for "
                f"{row['judged_again']:.0%}: accuracy {row['accuracy']:.4f}, "
                f"{row['speed']:.2f} times"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
