"""Thread counts from argument, variable, affinity and cgroup quota; onnxruntime's conflicts."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refusal_runtime import ProviderError, RefusalClassifier, hardware
from refusal_runtime.hardware import THREADS_VARIABLE, cgroup_quota, resolve_threads

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity"
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 8 CPUs without quota; the real one's settings stay outside."""
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    monkeypatch.setattr(hardware, "affinity_count", lambda: 8)
    monkeypatch.setattr(hardware, "cgroup_quota", lambda: None)


def set_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None) -> None:
    monkeypatch.setattr(hardware, "cgroup_quota", lambda: quota)


# --- precedence -----------------------------------------------------------------------------


def test_argument_beats_variable_beats_quota_beats_affinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert resolve_threads(None) == (8, "CPU affinity")
    set_quota(monkeypatch, 2.0)
    assert resolve_threads(None) == (2, "cgroup quota of 2 CPUs")
    monkeypatch.setenv(THREADS_VARIABLE, "5")
    assert resolve_threads(None) == (5, THREADS_VARIABLE)
    assert resolve_threads(3) == (3, "threads argument")


@pytest.mark.parametrize(
    ("quota", "threads"), [(0.1, 1), (0.5, 1), (1.0, 1), (1.5, 2), (7.2, 8), (8.0, 8), (64.0, 8)]
)
def test_quota_is_rounded_up_and_never_exceeds_the_affinity(
    monkeypatch: pytest.MonkeyPatch, quota: float, threads: int
) -> None:
    set_quota(monkeypatch, quota)
    assert resolve_threads(None)[0] == threads


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "")
    assert resolve_threads(None) == (8, "CPU affinity")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "2,2"])
def test_a_bad_variable_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, value)
    with pytest.raises(ValueError, match=f"{THREADS_VARIABLE} should be a positive integer"):
        resolve_threads(None)
    assert resolve_threads(2)[0] == 2


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_bad_argument_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match=f"threads should be a positive integer .* {value!r}"):
        resolve_threads(value)


def test_the_classifier_takes_its_threads_from_here(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "2")
    assert RefusalClassifier(tiny_bundle).threads == 2
    assert RefusalClassifier(tiny_bundle, threads=1).threads == 1
    with pytest.raises(ValueError, match="threads should be a positive integer"):
        RefusalClassifier(tiny_bundle, threads=0)


@needs_affinity
def test_a_process_confined_to_one_cpu_computes_with_one_thread() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from refusal_runtime import hardware;"
        "print(hardware.affinity_count(), hardware.resolve_threads(None)[0])"
    )
    environment = {key: value for key, value in os.environ.items() if key != THREADS_VARIABLE}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["1", "1"]


# --- cgroups --------------------------------------------------------------------------------


def fake_root(root: Path, membership: str, files: dict[str, str]) -> Path:
    """Makes a file system with a process's cgroup membership and control files."""
    for name, content in {"proc/self/cgroup": membership, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        pytest.param("0::/\n", {f"{V2}/cpu.max": "150000 100000\n"}, 1.5, id="v2-root"),
        pytest.param("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, None, id="v2-max"),
        pytest.param("0::/\n", {}, None, id="v2-no-file"),
        pytest.param("0::/a/b\n", {f"{V2}/a/b/cpu.max": "50000 100000\n"}, 0.5, id="v2-leaf"),
        pytest.param(
            "0::/a/b\n",
            {f"{V2}/a/b/cpu.max": "max 100000\n", f"{V2}/a/cpu.max": "300000 100000\n"},
            3.0,
            id="v2-parent-limits",
        ),
        pytest.param(
            "0::/a/b\n",
            {f"{V2}/a/b/cpu.max": "400000 100000\n", f"{V2}/a/cpu.max": "200000 100000\n"},
            2.0,
            id="v2-tightest-is-the-parent",
        ),
        pytest.param(
            "0::/a/b\n",
            {f"{V2}/a/b/cpu.max": "100000 100000\n", f"{V2}/a/cpu.max": "200000 100000\n"},
            1.0,
            id="v2-tightest-is-the-leaf",
        ),
        pytest.param(
            "0::/host/path/of/container\n",
            {f"{V2}/cpu.max": "250000 100000\n"},
            2.5,
            id="v2-container-path-missing",
        ),
        pytest.param(
            "0::/../../elsewhere\n", {f"{V2}/cpu.max": "100000 50000\n"}, 2.0, id="v2-namespace"
        ),
        pytest.param("0::/\n", {f"{V2}/cpu.max": "nonsense\n"}, None, id="v2-unreadable"),
        pytest.param("0::/\n", {f"{V2}/cpu.max": "100 0\n"}, None, id="v2-no-period"),
        pytest.param(
            "5:memory:/m\n4:cpu,cpuacct:/c\n",
            {f"{V1}/c/cpu.cfs_quota_us": "150000\n", f"{V1}/c/cpu.cfs_period_us": "100000\n"},
            1.5,
            id="v1",
        ),
        pytest.param(
            "4:cpuacct,cpu:/c\n",
            {f"{V1}/c/cpu.cfs_quota_us": "-1\n", f"{V1}/c/cpu.cfs_period_us": "100000\n"},
            None,
            id="v1-unlimited",
        ),
        pytest.param(
            "4:cpu,cpuacct:/docker/0123\n",
            {f"{V1}/cpu.cfs_quota_us": "200000\n", f"{V1}/cpu.cfs_period_us": "100000\n"},
            2.0,
            id="v1-container-path-missing",
        ),
        pytest.param(
            "3:cpuset:/c\n",
            {f"{V1}/cpu.cfs_quota_us": "200000\n", f"{V1}/cpu.cfs_period_us": "100000\n"},
            None,
            id="v1-cpuset-is-not-cpu",
        ),
        pytest.param(
            "4:cpu:/c\n0::/x\n",
            {f"{V1}/c/cpu.cfs_quota_us": "100000\n", f"{V1}/c/cpu.cfs_period_us": "100000\n"},
            1.0,
            id="hybrid",
        ),
    ],
)
def test_cgroup_quota(
    tmp_path: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    assert cgroup_quota(fake_root(tmp_path, membership, files)) == quota


def test_no_cgroups_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None


# --- onnxruntime ----------------------------------------------------------------------------


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    known = {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def pretend_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError(f"libmissing.so: cannot open ({name})")

    # hardware's own view of importlib, so that nobody else's imports break.
    fake = SimpleNamespace(import_module=fail, metadata=importlib.metadata)
    monkeypatch.setattr(hardware, "importlib", fake)


def test_one_build_is_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        pretend_installed(monkeypatch, **{name: "1.20"})
        assert hardware.conflict() is None
        assert hardware.installed_runtimes() == {name.replace("_", "-"): "1.20"}
    assert hardware.onnxruntime() is importlib.import_module("onnxruntime")


def test_both_builds_are_a_conflict_that_says_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    pretend_installed(monkeypatch, onnxruntime="1.20", onnxruntime_gpu="1.20")
    with pytest.raises(ProviderError) as caught:
        RefusalClassifier(tiny_bundle)
    assert str(caught.value) == hardware.conflict()
    for told in ("both installed", "pip uninstall -y onnxruntime onnxruntime-gpu",
                 "refusal-runtime[cpu]", "refusal-runtime[gpu]"):  # fmt: skip
        assert told in str(caught.value)


def test_with_neither_build_the_first_use_names_both_extras(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    pretend_installed(monkeypatch)
    pretend_import_fails(monkeypatch)
    with pytest.raises(ProviderError, match="onnxruntime is not installed") as caught:
        RefusalClassifier(tiny_bundle)
    assert "refusal-runtime[cpu]" in str(caught.value)
    assert "refusal-runtime[gpu]" in str(caught.value)


def test_a_broken_build_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, onnxruntime="1.20")
    pretend_import_fails(monkeypatch)
    with pytest.raises(ProviderError, match=r"installed but cannot be imported \(libmissing"):
        hardware.onnxruntime()


def test_asking_for_cuda_without_it_is_an_error(tiny_bundle: Path) -> None:
    if "CUDAExecutionProvider" in hardware.onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ProviderError, match=r"no CUDA support.*refusal-runtime\[gpu\]"):
        RefusalClassifier(tiny_bundle, provider="cuda").classify("hello")


def test_cpu_flags_are_known_ones() -> None:
    assert set(hardware.cpu_flags()) <= {
        "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "amx_int8", "asimddp", "i8mm",
    }  # fmt: skip
    assert hardware.cpu_name()
