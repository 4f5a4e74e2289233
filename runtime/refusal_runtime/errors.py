"""Every error this package raises on purpose, each saying what was found and what to do."""

from __future__ import annotations


class RefusalRuntimeError(Exception):
    """Base class of every error raised on purpose by `refusal_runtime`."""


class ConversationError(RefusalRuntimeError, ValueError):
    """One conversation cannot be judged; the other conversations of the call are unaffected.

    Attributes:
        row: Zero-based position of the conversation in its call, or None for a lone one.
        place: Where in the conversation the problem is, such as ``messages[2].content``.
        problem: What was found.
        remedy: What to do about it.
    """

    def __init__(self, problem: str, remedy: str, *, place: str, row: int | None = None) -> None:
        self.row = row
        self.place = place
        self.problem = problem
        self.remedy = remedy
        where = place if row is None else f"row {row}, {place}"
        super().__init__(f"{where}: {problem}; {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_conversation_error, (self.problem, self.remedy, self.place, self.row)


def _rebuild_conversation_error(
    problem: str, remedy: str, place: str, row: int | None
) -> ConversationError:
    """Lets `ConversationError`, whose arguments are keyword-only, cross a process boundary."""
    return ConversationError(problem, remedy, place=place, row=row)


class BundleError(RefusalRuntimeError):
    """A model folder is missing, incomplete, corrupted or of an unknown format."""


class HubError(BundleError):
    """A model could not be obtained from the Hugging Face Hub or its local cache."""


class ProviderError(RefusalRuntimeError):
    """onnxruntime is absent or conflicting, or the requested execution provider cannot run."""
