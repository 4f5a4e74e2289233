"""The benchmark scripts run, and the README's table is what the committed results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT

BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: str) -> dict[str, object]:
    """Runs a script and returns the JSON object in the last line of its output."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_accuracy_compares_with_pytorch(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    result = run(
        "accuracy.py", str(EXAMPLES), "--model", str(tiny_bundle), "--variant", "fp32",
        "--checkpoint", str(tiny_checkpoint), "--limit", "20",
    )  # fmt: skip
    assert result["rows"] == 20
    assert result["label_agreement"] == 1.0
    assert result["classifier"] == result["checkpoint"]


def test_speed_times_every_engine(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in EXAMPLES.read_text("utf-8").splitlines()]
    data = tmp_path / "short.jsonl"
    short = [row for row in rows if isinstance(row.get("messages", [{}])[0].get("content"), str)]
    usable = [row for row in short if all(isinstance(m["content"], str) and m["role"] != "tool"
                                          for m in row["messages"])]  # fmt: skip
    data.write_text("\n".join(json.dumps(row) for row in usable[:6]), "utf-8")
    result = run(
        "speed.py", str(tiny_checkpoint), str(data), "--model", str(tiny_bundle),
        "--rows", "6", "--rounds", "2",
    )  # fmt: skip
    engines = result["engines"]
    assert isinstance(engines, dict)
    assert set(engines) == {"refusal-runtime", "pipeline-1", "pipeline-16"}
    assert all(len(engine["seconds"]) == 2 for engine in engines.values())


def test_vocabulary_counts_tokens(tiny_bundle: Path) -> None:
    tokenizer = str(tiny_bundle / "tokenizer.json")
    path = tiny_bundle.parent / "rows.jsonl"
    row = {"language": "en", "messages": [{"role": "user", "content": "hello world"}]}
    path.write_text(json.dumps(row), "utf-8")
    result = run("vocabulary.py", tokenizer, str(path), "--pruned", tokenizer)
    assert result["largest_change"] == 0.0


def test_readme_table_is_what_the_committed_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    text = (ROOT / "README.md").read_text("utf-8")
    assert report.with_table(text) == text, "run benchmarks/report.py"
