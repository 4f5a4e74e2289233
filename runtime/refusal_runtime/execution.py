"""Runs a graph on token ids: one conversation at a time on CPU, padded buckets on CUDA.

On CPU nothing is ever padded and every conversation is its own batch. That is the faster way
there, and it makes the logits independent of whatever else is in the call: dynamic int8
quantization takes its scale from the whole batch, so batch mates would change the answer.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from refusal_runtime.bundle import Provider
from refusal_runtime.encoding import IdArray
from refusal_runtime.errors import BundleError, ProviderError
from refusal_runtime.hardware import onnxruntime

Logits = npt.NDArray[np.float32]

_CUDA = "CUDAExecutionProvider"
# Lengths on CUDA are padded up to a multiple of this, so that few shapes are ever met.
_BUCKET = 32
# Tokens in one CUDA batch, padding included.
_TOKEN_BUDGET = 32_768


class Execution(Protocol):
    """What the classifier needs of a way to run a graph."""

    window: int  # how many conversations are worth having in flight

    def run(self, ids: IdArray) -> Logits:
        """Runs one conversation: int64 (tokens,) -> float32 (labels,)."""
        ...

    def submit(self, batch: Sequence[IdArray]) -> list[Future[Logits]]:
        """Starts several conversations; the futures are in the order of `batch`."""
        ...


def candidates(provider: Literal["auto", "cpu", "cuda"]) -> list[Provider]:
    """Returns the providers to try in turn: the one asked for, or for "auto" all on offer.

    Raises:
        ProviderError: onnxruntime is unusable, or CUDA was asked for and it has no support for it.
    """
    found = onnxruntime().get_available_providers()
    if provider == "cuda" and _CUDA not in found:
        raise ProviderError(
            "provider='cuda' was asked for, but this onnxruntime has no CUDA support (providers: "
            f"{', '.join(found)}); run pip uninstall -y onnxruntime, then "
            "pip install 'refusal-runtime[gpu]'"
        )
    if provider == "auto":
        return ["cuda", "cpu"] if _CUDA in found else ["cpu"]
    return [provider]


def open_graph(
    path: Path, provider: Provider, threads: int, *, pad_id: int, max_length: int
) -> Execution:
    """Opens a graph for a provider.

    Args:
        path: The ONNX file.
        provider: "cpu" or "cuda".
        threads: CPU threads to compute with.
        pad_id: Token id that fills batches on CUDA.
        max_length: Most tokens that the model takes; padding stays within it.

    Raises:
        ProviderError: onnxruntime is unusable, or falls back to another provider.
        BundleError: The file is no graph that onnxruntime can run.
    """
    if provider == "cuda":
        return BatchedExecution(path, [_CUDA], threads, pad_id, max_length)
    return CpuExecution(path, threads)


def session_options(threads: int) -> Any:
    """Returns the onnxruntime options of every session: how it computes with `threads` threads."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    # Memory patterns are kept for each shape met; with free lengths they only pile up.
    options.enable_mem_pattern = False
    # Threads stay awake from operator to operator, which spares hundreds of wake-ups, and sleep
    # between two runs: an idle classifier costs nothing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "500")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def open_session(path: Path, providers: Sequence[str], threads: int) -> Any:
    """Opens an onnxruntime session and makes sure that it runs where it was told to."""
    ort = onnxruntime()
    if _CUDA in providers and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA libraries that pip packages bring
    options = session_options(threads)
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions have no common public base
        raise BundleError(
            f"onnxruntime {ort.__version__} cannot open {path} ({_first_line(error)}); "
            "fetch or export the model again"
        ) from error
    if session.get_providers()[0] != providers[0]:
        raise ProviderError(
            f"provider {providers[0]} was asked for and onnxruntime fell back to "
            f"{session.get_providers()[0]}; check the driver and the CUDA libraries with "
            "'refusal doctor', or use provider='cpu'"
        )
    return session


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class CpuExecution:
    """Exact-length execution on CPU; thread-safe and usable after a fork.

    Sessions are opened at first use. A conversation on its own gets one session with all threads;
    the conversations of a batch, and those of callers at once, run in a session with one thread for
    each, a batch longest first. Thread counts do not change the logits.

    Args:
        path: The ONNX file.
        threads: How many threads to compute with.
    """

    window = 64

    def __init__(self, path: Path, threads: int) -> None:
        self._path = path
        self._threads = threads
        self._reset()
        if hasattr(os, "register_at_fork"):
            own = weakref.WeakMethod(self._forked)
            os.register_at_fork(after_in_child=lambda: (method := own()) and method())

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[int, Any] = {}
        self._pool: ThreadPoolExecutor | None = None
        # Not the lock above, which is held while a session opens.
        self._counting = threading.Lock()
        self._callers = 0

    def _forked(self) -> None:
        # A session's threads do not survive a fork, and destroying it would wait for them for
        # ever: the child leaves the parent's sessions alone and opens its own when it needs one.
        for session in self._sessions.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
        self._reset()

    def _session(self, threads: int) -> Any:
        with self._lock:
            if threads not in self._sessions:
                self._sessions[threads] = open_session(
                    self._path, ["CPUExecutionProvider"], threads
                )
            return self._sessions[threads]

    def run(self, ids: IdArray) -> Logits:
        with self._counting:
            self._callers += 1
            alone = self._callers == 1
        try:
            return self._compute(self._session(self._threads if alone else 1), ids)
        finally:
            with self._counting:
                self._callers -= 1

    def submit(self, batch: Sequence[IdArray]) -> list[Future[Logits]]:
        # A lone conversation gets all threads, unless that would open a second session for it.
        alone = len(batch) == 1 and 1 not in self._sessions
        session = self._session(self._threads if alone else 1)
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, "refusal-runtime")
            pool = self._pool
        order = sorted(range(len(batch)), key=lambda index: -len(batch[index]))
        futures = {index: pool.submit(self._compute, session, batch[index]) for index in order}
        return [futures[index] for index in range(len(batch))]

    @staticmethod
    def _compute(session: Any, ids: IdArray) -> Logits:
        logits: Logits = _logits(session.run(None, _feed(session, ids[np.newaxis], None))[0])[0]
        return logits


class BatchedExecution:
    """Padded batches of similar length with IO binding, for providers where batches pay.

    A CUDA context does not survive a fork: a child process has to open its own.

    Args:
        path: The ONNX file.
        providers: onnxruntime's names of the execution providers; the first must be obtained.
        threads: CPU threads for what stays on the CPU.
        pad_id: Token id that fills the shorter rows; the attention mask hides it.
        max_length: Most tokens that the model takes; padding stays within it.
    """

    window = 2048

    def __init__(
        self,
        path: Path,
        providers: Sequence[str],
        threads: int,
        pad_id: int,
        max_length: int = 512,
    ) -> None:
        self._session = open_session(path, providers, threads)
        self._pad_id = pad_id
        self._max_length = max_length
        self._worker = ThreadPoolExecutor(1, "refusal-runtime")
        self._process = os.getpid()

    def run(self, ids: IdArray) -> Logits:
        return self.submit([ids])[0].result()

    def submit(self, batch: Sequence[IdArray]) -> list[Future[Logits]]:
        if os.getpid() != self._process:
            raise ProviderError("CUDA does not survive a fork; open the classifier in the child")
        futures: list[Future[Logits]] = [Future() for _ in batch]
        for rows in _buckets([len(ids) for ids in batch]):
            self._worker.submit(self._compute, [(batch[row], futures[row]) for row in rows])
        return futures

    def _compute(self, rows: list[tuple[IdArray, Future[Logits]]]) -> None:
        wanted = [(ids, future) for ids, future in rows if future.set_running_or_notify_cancel()]
        if not wanted:
            return
        try:
            logits = self._run([ids for ids, _ in wanted])
        except Exception as error:  # delivered to whoever asks for the result
            for _, future in wanted:
                future.set_exception(error)
            return
        for (_, future), row in zip(wanted, logits, strict=True):
            future.set_result(row)

    def _run(self, batch: list[IdArray]) -> Logits:
        """int64 (tokens,) each -> float32 (len(batch), labels)."""
        width = min(_padded(max(map(len, batch))), self._max_length)
        ids = np.full((len(batch), width), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        binding = self._session.io_binding()
        for name, array in _feed(self._session, ids, mask).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(self._session.get_outputs()[0].name)
        self._session.run_with_iobinding(binding)
        return _logits(binding.copy_outputs_to_cpu()[0])


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Groups positions by padded length, longest first, within the token budget of a batch."""
    groups: list[list[int]] = []
    width = 0
    for position in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padded = _padded(lengths[position])
        if not groups or padded != width or (len(groups[-1]) + 1) * padded > _TOKEN_BUDGET:
            groups.append([])
            width = padded
        groups[-1].append(position)
    return groups


def _padded(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _feed(session: Any, ids: IdArray, mask: IdArray | None) -> dict[str, IdArray]:
    """Builds the inputs that the graph asks for.

    Args:
        session: The session.
        ids: int64, shape (batch, length).
        mask: 1 where a token counts, same shape and dtype; None for everywhere.
    """
    feed = {}
    for node in session.get_inputs():
        if node.name == "input_ids":
            feed[node.name] = ids
        elif node.name == "attention_mask":
            feed[node.name] = np.ones_like(ids) if mask is None else mask
        elif node.name == "token_type_ids":
            feed[node.name] = np.zeros_like(ids)
        else:
            raise BundleError(
                f"the graph asks for the input {node.name!r}, which no classifier of this family "
                "has; export the checkpoint with refusal-export"
            )
    return feed


def _logits(output: npt.NDArray[Any]) -> Logits:
    # A copy: the output itself lies in the session's arena, whose lock another thread may hold at
    # the moment of a fork, so that the child could not even free it.
    return np.array(output, dtype=np.float32)
