"""What the benchmark scripts share: reading labelled data, describing the machine, saving."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from refusal_runtime import hardware
from refusal_runtime.version import __version__

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parent / "data"  # the project's evaluation set, 37 languages
_PACKAGES = ("refusal-runtime", "numpy", "tokenizers", "onnxruntime", "torch", "transformers")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads JSON Lines (possibly .gz) with `messages`, `label`, and maybe `language`, `source`.

    Args:
        path: A file, or a folder of .jsonl files.
    """
    if path.is_dir():
        return [row for file in sorted(path.glob("*.jsonl")) for row in read_rows(file)]
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def is_refusal(row: dict[str, Any]) -> bool:
    """Whether a row is labelled a refusal (`label`, or `expected` as in the examples)."""
    return str(row.get("label", row.get("expected"))).casefold() == "refusal"


def environment() -> dict[str, Any]:
    """Describes the machine and the versions that a result was obtained with."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["refusal-runtime"] = __version__  # what runs, not what pip once installed
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": hardware.cpu_name(),
        "instructions": list(hardware.cpu_flags()),
        "cpus": hardware.affinity_count(),
        "cgroup_quota": hardware.cgroup_quota(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Writes a result to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
