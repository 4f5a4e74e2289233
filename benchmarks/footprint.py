"""What an engine takes: peak memory of its process, bytes of what has to be installed."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

MIB = 2**20


def peak_memory() -> float:
    """Peak resident memory of this process in MiB, mapped files included.

    On Linux from VmHWM: what getrusage reports survives exec, so that a child would start with
    the memory of its parent.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 2**10)


def resident() -> float | None:
    """Resident memory of this process now, in MiB; None where the system does not tell."""
    return _status("VmRSS")


def _status(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 2**10
    return None


def installed(distributions: Sequence[str]) -> dict[str, int]:
    """Returns bytes on disk by distribution, for these and all that they require.

    Byte code that Python caches is left out. Extras and requirements of other platforms do not
    count.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    sizes: dict[str, int] = {}
    waiting = list(distributions)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in sizes:
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        sizes[name] = sum(
            size(Path(str(file.locate()))) for file in found.files or () if file.suffix != ".pyc"
        )
        for line in found.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return sizes


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def folder_size(folder: Path, *, suffixes: Iterable[str]) -> int:
    """Bytes of the files with these suffixes that lie directly in a folder."""
    wanted = set(suffixes)
    return sum(size(path) for path in folder.iterdir() if path.suffix in wanted)
