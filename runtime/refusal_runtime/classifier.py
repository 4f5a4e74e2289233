"""The public classifier: conversation -> encoding -> execution -> verdict."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

from refusal_runtime.bundle import Bundle, Graph, Provider
from refusal_runtime.conversation import ConversationInput, parse_conversation
from refusal_runtime.encoding import Encoder, Encoding, Truncation, load_tokenizer
from refusal_runtime.errors import ConversationError, RefusalRuntimeError
from refusal_runtime.execution import Logits, candidates, open_graph
from refusal_runtime.hardware import resolve_threads
from refusal_runtime.hub import locate
from refusal_runtime.verdict import Verdict, make_verdict, probabilities

EMBEDDED = Path(__file__).parent / "model"

_PipelineRow: TypeAlias = "dict[str, str | float]"
_PAD_TOKENS = ("<pad>", "[PAD]")
_FIRST_WINDOW = 4
_REMEMBERED = 4096  # conversations of a call whose repetitions are not computed again
_UNSET: Any = object()
_Started: TypeAlias = "tuple[Encoding, Future[Logits]] | Verdict | ConversationError"
_Recent: TypeAlias = "dict[bytes, Future[Logits]]"


class RefusalClassifier:
    """Tells whether the last assistant message of a conversation is a refusal.

    Thread-safe, picklable, and (on CPU) usable after a fork. On CPU the graph itself is opened at
    first use.

    Args:
        model: A bundle's folder or a Hub id `owner/name[@revision]`; the embedded bundle if None.
        variant: Which graph of the bundle: "int8", "fp32", "fp16", or "auto" by provider.
        provider: "cpu", "cuda", or "auto": CUDA when this onnxruntime offers it and the bundle
            has a graph for it, CPU otherwise.
        threads: CPU threads; None for ORT_INTRA_OP_NUM_THREADS or what the process may use.
        threshold: Refusal probability, 0 to 1, from which `Verdict.is_refusal` is true, or the
            name of one of the bundle's operating points ("high_precision", "high_recall"); None
            for the bundle's own.
        max_length: Token budget of a conversation, or the name of one of the bundle's profiles
            ("fast", "thorough"); None for its default.
        truncation: What happens beyond it: "middle" elides older context and the middle of long
            messages, "head" keeps the first tokens, "error" raises.
        cascade: A second, faster bundle, folder or Hub id, that judges first. Its verdict stands
            where its refusal probability lies below its operating point "high_recall" or from
            "high_precision" on; only the rest goes to this model.
        local_files_only: Never use the network.

    Raises:
        BundleError: The model is missing or unusable (`HubError` when the Hub is to blame).
        ProviderError: onnxruntime or the requested provider is unavailable.
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        variant: str = "auto",
        provider: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int | None = None,
        threshold: float | str | None = None,
        max_length: int | str | None = None,
        truncation: Truncation = "middle",
        cascade: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        if provider not in ("auto", "cpu", "cuda"):
            raise ValueError(f"provider should be 'auto', 'cpu' or 'cuda', found {provider!r}")
        self._options: dict[str, Any] = {
            "variant": variant, "provider": provider, "threads": threads, "threshold": threshold,
            "max_length": max_length, "truncation": truncation,
            "local_files_only": local_files_only,
        }  # fmt: skip
        self.threads, self.threads_reason = resolve_threads(threads)
        self.bundle: Bundle
        self.graph: Graph
        self.provider: Provider
        providers = candidates(provider)
        for self.provider in tuple(providers):
            try:
                self.bundle, self.graph, self.graph_reason = locate(
                    EMBEDDED if model is None else model,
                    variant=variant,
                    provider=self.provider,
                    local_files_only=local_files_only,
                )
                if len(providers) > 1 and self.provider not in self.graph.providers:
                    providers.remove(self.provider)  # "auto", and the named variant is for the CPU
                    continue
                tokenizer = load_tokenizer(self.bundle.folder / "tokenizer.json")
                self._execution = open_graph(
                    self.bundle.folder / self.graph.file,
                    self.provider,
                    self.threads,
                    pad_id=next(filter(None, map(tokenizer.token_to_id, _PAD_TOKENS)), 0),
                    max_length=self.bundle.max_length,
                )
                break
            except RefusalRuntimeError:
                # "auto" takes CUDA only where it works; the last candidate's error counts.
                if self.provider == providers[-1]:
                    raise
        self._model: str | Path | None = None
        if model is not None and Path(model).expanduser().is_dir():
            self._model = self.bundle.folder.absolute()
        elif model is not None:  # from the Hub, where the folder is named by its commit
            self._model = f"{str(model).partition('@')[0]}@{self.bundle.folder.name}"
        self.threshold = self.bundle.resolve_threshold(threshold)
        self.max_length = self.bundle.resolve_budget(max_length, elides=truncation == "middle")
        self._encoder = Encoder(
            tokenizer, self.bundle.template, max_length=self.max_length, truncation=truncation
        )
        self._first: RefusalClassifier | None = None
        if cascade is not None:
            self._first = RefusalClassifier(
                cascade,
                provider=provider,
                threads=threads,
                threshold=threshold,
                truncation=truncation,
                local_files_only=local_files_only,
            )
            self._open_points = (
                self._first.bundle.resolve_threshold("high_recall"),
                self._first.bundle.resolve_threshold("high_precision"),
            )
            self._options["cascade"] = self._first._model

    def classify(self, conversation: ConversationInput) -> Verdict:
        """Judges one conversation.

        Args:
            conversation: A list of messages, a mapping with `messages`, `conversations` or
                `text`, or a string, role-formatted or plain.

        Raises:
            ConversationError: The conversation cannot be judged; says where, why, what to do.
        """
        if self._first is not None:
            verdict = self._first.classify(conversation)
            if self._stands(verdict):
                return verdict
        encoding = self._encode(conversation, None)
        return self._verdict(encoding, self._execution.run(encoding.ids))

    @overload
    def stream(
        self, conversations: Iterable[ConversationInput], *, on_error: Literal["yield"] = ...
    ) -> Iterator[Verdict | ConversationError]: ...
    @overload
    def stream(
        self, conversations: Iterable[ConversationInput], *, on_error: Literal["raise"]
    ) -> Iterator[Verdict]: ...
    def stream(
        self,
        conversations: Iterable[ConversationInput],
        *,
        on_error: Literal["yield", "raise"] = "yield",
    ) -> Iterator[Verdict | ConversationError]:
        """Judges any number of conversations, lazily and in order, in bounded memory.

        A bounded window of the input is read ahead, so that conversations run in parallel,
        longest first. A verdict does not depend on what else is in the window.

        Args:
            conversations: Any iterable of what `classify` takes.
            on_error: "yield" puts a `ConversationError` in the place of each conversation that
                cannot be judged; "raise" raises it once everything before it has come out.

        Raises:
            ValueError: `on_error` is unknown, or a single conversation was given.
        """
        if on_error not in ("yield", "raise"):
            raise ValueError(f"on_error should be 'yield' or 'raise', found {on_error!r}")
        if isinstance(conversations, (str, Mapping)):
            raise ValueError("stream takes an iterable of conversations; use classify for one")
        return self._stream(conversations, raising=on_error == "raise")

    def __call__(self, inputs: Any, *, top_k: int | None = _UNSET) -> Any:
        """Answers in the shapes of a transformers text-classification pipeline.

        Args:
            inputs: One conversation or a list of conversations.
            top_k: Left out, the best label only; otherwise a list of that many labels, best
                first, all of them for None.

        Returns:
            For one string or list of messages `[{"label", "score"}]`, for a mapping the bare
            `{"label", "score"}`, for a list of conversations one of these each; with `top_k` a
            list of them instead.

        Raises:
            ConversationError: A conversation cannot be judged, named by its row.
        """
        if top_k is not _UNSET and top_k is not None and top_k < 1:
            raise ValueError(f"top_k should be positive or None, found {top_k!r}")
        several = isinstance(inputs, Sequence) and not isinstance(inputs, str)
        if several and inputs and all(_is_message(item) for item in inputs):
            several = False
        if several:
            verdicts = self.stream(inputs, on_error="raise")
            return [self._pipeline_rows(verdict, top_k) for verdict in verdicts]
        rows = self._pipeline_rows(self.classify(inputs), top_k)
        # A pipeline wraps the lone answer to a lone text in a list.
        return [rows] if isinstance(rows, dict) and not isinstance(inputs, Mapping) else rows

    def _pipeline_rows(
        self, verdict: Verdict, top_k: int | None
    ) -> _PipelineRow | list[_PipelineRow]:
        if top_k is _UNSET:
            return {"label": verdict.label, "score": verdict.score}
        chances = probabilities(verdict.logits, self.bundle.temperature)
        rows: list[_PipelineRow] = [
            {"label": label, "score": float(chance)}
            for label, chance in zip(self.bundle.labels, chances, strict=True)
        ]
        rows.sort(key=lambda row: -float(row["score"]))
        return rows[:top_k]

    def _stream(
        self, conversations: Iterable[ConversationInput], *, raising: bool
    ) -> Iterator[Verdict | ConversationError]:
        source = enumerate(conversations)
        windows: deque[deque[_Started]] = deque()
        failure: Exception | None = None
        exhausted = False
        process = os.getpid()
        recent: tuple[_Recent, _Recent] = ({}, {})
        # Small windows first: whoever waits at the other end of a pipe soon sees something.
        size = _FIRST_WINDOW
        try:
            while windows or not exhausted:
                # The next window is under way before the one in front is waited for.
                if not exhausted:
                    chunk: list[tuple[int, ConversationInput]] = []
                    try:
                        chunk.extend(itertools.islice(source, size))
                    except Exception as error:  # the caller's; what came before it still comes out
                        failure = error
                    exhausted = failure is not None or len(chunk) < size
                    size = min(2 * size, self._execution.window)
                    windows.append(self._start(chunk, *recent))
                if len(windows) > 1 or exhausted:
                    while windows[0]:
                        result = self._finish(windows[0].popleft())
                        if raising and isinstance(result, ConversationError):
                            raise result
                        yield result
                    windows.popleft()
        finally:
            # After a fork the futures belong to the parent, locks that its threads hold included.
            for window in windows if os.getpid() == process else ():
                for started in window:
                    if isinstance(started, tuple):
                        started[1].cancel()
        if failure is not None:
            raise failure

    def _start(
        self, chunk: Sequence[tuple[int, ConversationInput]], recent: _Recent, first_recent: _Recent
    ) -> deque[_Started]:
        """Starts a window; in a cascade the first model judges it and the rest is started."""
        if self._first is None:
            return self._start_here(chunk, recent)
        first = self._first
        judged = [first._finish(item) for item in first._start_here(chunk, first_recent)]
        stands = [
            isinstance(result, ConversationError) or self._stands(result) for result in judged
        ]
        rest = [item for item, settled in zip(chunk, stands, strict=True) if not settled]
        started = self._start_here(rest, recent)
        return deque(
            result if settled else started.popleft()
            for result, settled in zip(judged, stands, strict=True)
        )

    def _stands(self, verdict: Verdict) -> bool:
        """Whether a verdict of the cascade's first model is final."""
        low, high = self._open_points
        return not low <= verdict.refusal_probability < high

    def _start_here(
        self, chunk: Sequence[tuple[int, ConversationInput]], recent: _Recent
    ) -> deque[_Started]:
        """Encodes a window and starts what `recent` does not hold yet, keyed by the token ids."""
        encoded: list[Encoding | ConversationError] = []
        for row, conversation in chunk:
            try:
                encoded.append(self._encode(conversation, row))
            except ConversationError as error:
                encoded.append(error)
        keyed = [
            (item, b"" if isinstance(item, ConversationError) else item.ids.tobytes())
            for item in encoded
        ]
        new = {
            key: item.ids
            for item, key in keyed
            if not isinstance(item, ConversationError) and key not in recent
        }
        recent.update(zip(new, self._execution.submit(list(new.values())), strict=True))
        started: deque[_Started] = deque(
            item if isinstance(item, ConversationError) else (item, recent[key])
            for item, key in keyed
        )
        while len(recent) > _REMEMBERED:
            del recent[next(iter(recent))]
        return started

    def _finish(self, started: _Started) -> Verdict | ConversationError:
        if not isinstance(started, tuple):
            return started
        encoding, future = started
        return self._verdict(encoding, future.result())

    def _encode(self, conversation: ConversationInput, row: int | None) -> Encoding:
        parsed = parse_conversation(conversation, self.bundle.template, row=row)
        return self._encoder.encode(parsed, row=row)

    def _verdict(self, encoding: Encoding, logits: Logits) -> Verdict:
        return make_verdict(
            logits,
            self.bundle,
            threshold=self.threshold,
            tokens=len(encoding.ids),
            truncated=encoding.truncated,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path and the options; the copy opens its own session."""
        return _rebuild, (self._model, self._options)

    @property
    def forgeable(self) -> bool:
        """Whether this model's role tokens are ordinary text, which a message could imitate."""
        return self._encoder.forgeable

    def __repr__(self) -> str:
        return (
            f"RefusalClassifier({self.bundle.name!r}, variant={self.graph.name!r}, "
            f"provider={self.provider!r}, threads={self.threads})"
        )


def _rebuild(model: str | Path | None, options: dict[str, Any]) -> RefusalClassifier:
    return RefusalClassifier(model, **options)


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and ("role" in item or "from" in item)
