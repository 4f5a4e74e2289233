"""Draws accuracy by language from a committed result of accuracy.py, as SVG.

    python benchmarks/language_chart.py [NAME]   # results/NAME.json -> results/NAME-languages.svg

The classifier's accuracy is a bar, that of the list of phrases a tick.  The same result gives the
same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS


def main() -> None:
    """Draws the chart of one result."""
    name = sys.argv[1] if len(sys.argv) > 1 else "accuracy-languages37"
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    print(draw(result, RESULTS / f"{name}-languages.svg"))


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draws one result into a file and returns its path."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "refusal-runtime", "font.size": 8})
    from matplotlib import pyplot

    languages = result["classifier"]["by_language"]
    order = sorted(languages, key=lambda name: (languages[name]["accuracy"], name))
    phrases = result["keywords"]["by_language"]
    figure, axes = pyplot.subplots(figsize=(7, 0.19 * len(order) + 0.8))
    axes.barh(order, [languages[name]["accuracy"] for name in order], color="#0b6e4f", height=0.7)
    axes.plot(
        [phrases[name]["accuracy"] for name in order], order, "|", color="#c2410c",
        markersize=7, markeredgewidth=2, label="list of refusing phrases",
    )  # fmt: skip
    for name in order:
        value = languages[name]["accuracy"]
        axes.text(value - 0.01, name, f"{value:.0%}", va="center", ha="right", color="white")
    axes.set(xlim=(0, 1), ylim=(-0.6, len(order) - 0.4), xlabel="accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{result['model']} ({result['variant']}), {result['rows']:,} conversations")
    axes.legend(loc="lower left", frameon=False, labelcolor="white")
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    pyplot.close(figure)
    # matplotlib ends some lines with spaces.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
