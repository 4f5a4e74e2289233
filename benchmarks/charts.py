"""Draws the charts of a result of bench.py as SVG, the same bytes for the same result.

python benchmarks/charts.py benchmarks/results/bench.json   # writes bench-*.svg beside it
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_OURS, _BUNDLE, _PEER = "#0b6e4f", "#5fb49c", "#9aa5b1"
_INK, _GRID = "#1f2933", "#e4e7eb"
_STYLE = {
    "svg.hashsalt": "refusal-runtime",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _PEER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "text.color": _INK,
}
_MARKERS = "os^DvPX<>*h"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the charts of one result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    path = parser.parse_args(arguments).result
    for name in draw(json.loads(path.read_bytes()), path.parent, path.stem):
        print(name)


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[str]:
    """Draws every chart that the result has data for; returns the file names."""
    names = []
    for name, chart in (
        ("throughput", throughput), ("latency", latency), ("start", start), ("scaling", scaling),
    ):  # fmt: skip
        with plt.rc_context(_STYLE):
            figure = chart(result)
            if figure is None:
                continue
            file = f"{stem}-{name}.svg"
            figure.savefig(folder / file, format="svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
        # matplotlib ends some lines with spaces.
        text = (folder / file).read_text(encoding="utf-8")
        lines = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        (folder / file).write_text(lines, encoding="utf-8")
        names.append(file)
    return names


def ours(result: dict[str, Any], name: str) -> bool:
    """Whether an engine is one of our bundles."""
    return str(result["engines"][name]["title"]).startswith("this runtime")


def colour(result: dict[str, Any], name: str) -> str:
    """An engine's colour: ours stand out, the embedded bundle most."""
    if not ours(result, name):
        return _PEER
    return _OURS if name == "refusal-runtime" else _BUNDLE


def throughput(result: dict[str, Any]) -> Any:
    """Bars of Offline throughput, with the accuracy beside each."""
    cases = [case for case in result["cases"] if case["scenario"] == "Offline"]
    # The list of phrases is thousands of times faster than any model: it would flatten the rest.
    cases = [case for case in cases if case["engine"] != "keywords"]
    if not cases:
        return None
    cases.sort(key=lambda case: case["per_second"])
    names = [case["engine"] for case in cases]
    values = [case["per_second"] for case in cases]
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.34 * len(names)), layout="constrained")
    axes.barh(names, values, color=[colour(result, name) for name in names], height=0.66)
    for row, case in enumerate(cases):
        accuracy = result["engines"][case["engine"]]["accuracy"]
        quality = "no verdict" if accuracy is None else f"accuracy {accuracy:.1%}"
        axes.annotate(
            f"{case['per_second']:,.1f}   {quality}", (case["per_second"], row),
            xytext=(4, 0), textcoords="offset points", va="center",
        )  # fmt: skip
    axes.set_xlim(0, 1.35 * max(values))
    axes.set_title("Conversations a second, mixed lengths, texts to verdicts")
    axes.tick_params(left=False)
    return figure


def latency(result: dict[str, Any]) -> Any:
    """Lines of median latency by length, labelled at their right ends."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in result["cases"]:
        if case["scenario"] == "SingleStream" and case["engine"] != "keywords":
            lines.setdefault(case["engine"], []).append((case["tokens"], case["p50"] * 1e3))
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for number, (name, points) in enumerate(lines.items()):
        mine = ours(result, name)
        x, y = zip(*sorted(points), strict=True)
        axes.plot(
            x, y, color=colour(result, name), marker=_MARKERS[number % len(_MARKERS)],
            markersize=5, linewidth=2.2 if mine else 1.2, label=name, zorder=3 if mine else 2,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain(axes.xaxis)
    plain(axes.yaxis)
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(ticks)
    axes.grid(color=_GRID)
    axes.set_xlabel("tokens")
    axes.set_title("Milliseconds to a verdict, one caller, median")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def plain(axis: Any) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def start(result: dict[str, Any]) -> Any:
    """Bars of the time to the first verdict and of peak memory."""
    found = {name: e for name, e in result["engines"].items() if e["start"] and name != "keywords"}
    if not found:
        return None
    names = sorted(found, key=lambda name: -found[name]["start"]["p50"])
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(7.5, 0.9 + 0.3 * len(names)), layout="constrained"
    )
    for axes, title, values, form in (
        (left, "Seconds to the first verdict", [found[n]["start"]["p50"] for n in names], ".2f"),
        (right, "Peak memory, MiB", [found[n]["peak_memory_mib"] or 0 for n in names], ",.0f"),
    ):
        axes.barh(names, values, color=[colour(result, name) for name in names], height=0.66)
        for row, value in enumerate(values):
            axes.annotate(
                f"{value:{form}}", (value, row), xytext=(4, 0), textcoords="offset points",
                va="center",
            )  # fmt: skip
        axes.set_xlim(0, 1.25 * max(values) or 1)
        axes.set_title(title)
        axes.tick_params(left=False)
    return figure


def scaling(result: dict[str, Any]) -> Any:
    """Four small charts: time and memory by rows, speed by threads, latency by length."""
    found = result.get("scaling")
    if not found:
        return None
    figure, grid = plt.subplots(2, 2, figsize=(7.5, 5.2), layout="constrained")
    rows = found["rows"]
    sizes = [row["rows"] for row in rows]
    for axes, title, x, y, label in (
        (grid[0][0], "Seconds, streamed", sizes, [row["seconds"] for row in rows], "rows"),
        (grid[0][1], "Peak memory, MiB", sizes, [r["peak_memory_mib"] for r in rows], "rows"),
        (
            grid[1][0], "Conversations a second", [r["threads"] for r in found["threads"]],
            [r["per_second"] for r in found["threads"]], "threads",
        ),
        (
            grid[1][1], "Milliseconds, median", [r["tokens"] for r in found["length"]],
            [r["p50"] * 1e3 for r in found["length"]], "tokens",
        ),
    ):  # fmt: skip
        axes.plot(x, y, color=_OURS, marker="o", markersize=5, linewidth=2)
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.grid(color=_GRID)
        if axes is not grid[0][0]:  # which is logarithmic
            axes.set_ylim(0, 1.2 * max(y, default=1))
    for axes in grid[0]:
        axes.set_xscale("log")
        axes.set_xticks(sizes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    grid[0][0].set_yscale("log")
    grid[0][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain(grid[0][0].yaxis)
    grid[1][0].set_xticks([row["threads"] for row in found["threads"]])
    return figure


if __name__ == "__main__":
    main()
