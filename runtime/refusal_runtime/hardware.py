"""What this machine offers: processors it may use, their instruction sets, onnxruntime."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
from pathlib import Path
from types import ModuleType

from refusal_runtime.errors import ProviderError

THREADS_VARIABLE = "ORT_INTRA_OP_NUM_THREADS"

# The instruction sets that decide which integer kernels onnxruntime picks.
_TELLING_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "amx_int8", "asimddp", "i8mm",
)  # fmt: skip


def silence_telemetry() -> None:
    """Keeps onnxruntime from reporting to its makers, which 1.29 and later do by default.

    Whoever wants that can set ORT_DISABLE_TELEMETRY=0. The thread it starts at import would also
    break processes that fork.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def onnxruntime() -> ModuleType:
    """Imports onnxruntime, without its telemetry unless it was imported before.

    Raises:
        ProviderError: It is not installed, or both of its builds are.
    """
    both = conflict()
    if both:
        raise ProviderError(both)
    silence_telemetry()
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        if installed_runtimes():
            raise ProviderError(
                f"onnxruntime is installed but cannot be imported ({error}); reinstall it"
            ) from error
        raise ProviderError(
            "onnxruntime is not installed; run pip install 'refusal-runtime[cpu]', "
            "or 'refusal-runtime[gpu]' for a machine with an NVIDIA GPU"
        ) from error


def installed_runtimes() -> dict[str, str]:
    """Returns the versions of the onnxruntime distributions that are installed, by name."""
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def conflict() -> str | None:
    """Explains the conflict when both onnxruntime builds are installed; None when all is well.

    They install the same files, so whichever came last has overwritten parts of the other.
    """
    if len(installed_runtimes()) < 2:
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; run "
        "pip uninstall -y onnxruntime onnxruntime-gpu, then install one: "
        "pip install 'refusal-runtime[cpu]' or pip install 'refusal-runtime[gpu]'"
    )


def resolve_threads(explicit: int | None) -> tuple[int, str]:
    """Decides how many threads to compute with.

    An explicit number wins over the environment variable ORT_INTRA_OP_NUM_THREADS, which wins
    over what the process may use: its CPU affinity, limited by its cgroup's CPU quota, which
    onnxruntime itself ignores.

    Returns:
        The number, and where it came from.

    Raises:
        ValueError: The explicit number or the variable is not a positive integer.
    """
    if explicit is not None:
        if isinstance(explicit, bool) or not isinstance(explicit, int) or explicit < 1:
            raise ValueError(f"threads should be a positive integer or None, found {explicit!r}")
        return explicit, "threads argument"
    variable = os.environ.get(THREADS_VARIABLE, "")
    if variable:
        if not variable.isdecimal() or int(variable) < 1:
            raise ValueError(
                f"{THREADS_VARIABLE} should be a positive integer, found {variable!r}; "
                "unset or correct it"
            )
        return int(variable), THREADS_VARIABLE
    affinity = affinity_count()
    quota = cgroup_quota()
    if quota is not None and quota < affinity:
        return max(1, math.ceil(quota)), f"cgroup quota of {quota:g} CPUs"
    return affinity, "CPU affinity"


def affinity_count() -> int:
    """Returns how many processors the process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Returns the CPU quota of the process's cgroup in CPUs, or None without one.

    Reads `cpu.max` of the process's cgroup and of every ancestor (cgroup v2), or
    `cpu.cfs_quota_us` and `cpu.cfs_period_us` (v1); the tightest limit counts. Format: Linux
    kernel documentation, admin-guide/cgroup-v2 and scheduler/sched-bwc.

    Args:
        root: Root of the file system, for tests.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers == "":
            mount, read = root / "sys/fs/cgroup", _read_v2
        elif "cpu" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup/cpu", _read_v1
        else:
            continue
        folder = mount / path.lstrip("/")
        # In a container the path may be the host's, absent here: then the mount itself counts.
        for place in (folder, *folder.parents):
            if place.is_relative_to(mount):
                limits.append(read(place))
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def _read_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _read_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def cpu_name() -> str:
    """Returns the processor's model name as the system reports it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, ...]:
    """Returns those of the processor's instruction sets that matter here (Linux; else empty)."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return tuple(flag for flag in _TELLING_FLAGS if flag in present)


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
