"""Starts worker.py for one engine and talks to it; its failure becomes an error with a reason."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from cases import FIRST
from engines import Source

_WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 900.0  # seconds that one answer may take


class WorkerError(RuntimeError):
    """An engine cannot be built or has failed; the message is the reason."""


class Worker:
    """A process that runs one engine.

    Args:
        engine: Name of the engine.
        source: What it is built from.
        prepare: Only convert the checkpoint, into the source's `artifacts`, and end.

    Attributes:
        start_seconds: From the start of the process to its first verdict.

    Raises:
        WorkerError: The engine failed.
    """

    def __init__(self, engine: str, source: Source, *, prepare: bool = False) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        command = [sys.executable, str(_WORKER)]
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, encoding="utf-8", env=_environment(source.threads),
        )  # fmt: skip
        self.ask(engine=engine, source=dataclasses.asdict(source), first=FIRST, prepare=prepare)
        self.start_seconds = time.perf_counter() - start

    def ask(self, *, timeout: float | None = TIMEOUT, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
            WorkerError: The process ended, or did not answer in `timeout` seconds.
        """
        assert self._process.stdin
        assert self._process.stdout
        timer = threading.Timer(timeout, self._process.kill) if timeout else None
        if timer:
            timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            expired = timer is not None and not timer.is_alive()
            if timer:
                timer.cancel()
        if not line:
            reason = f"no answer in {timeout:g} s" if expired else self._reason()
            self.close()
            raise WorkerError(reason)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> dict[str, Any]:
        """Ends the process; returns its configuration, labels, memory and model size."""
        answer = self.ask(do="end")
        self.close()
        return answer

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _reason(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        if status < 0:
            return f"ended by signal {-status}"
        return said[-1][:300] if said else f"ended with status {status}"


def _environment(threads: int) -> dict[str, str]:
    """The same number of threads for every library; nobody calls home."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(names, str(threads)),
        "TOKENIZERS_PARALLELISM": "true",
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NNCF_CI": "ON",  # how nncf is told not to report
        "PYTHONIOENCODING": "utf-8",
    }
