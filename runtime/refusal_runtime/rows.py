"""Reads conversations from files and writes verdicts, one output row for each input row."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from refusal_runtime.errors import ConversationError
from refusal_runtime.verdict import Verdict

STDIN = "-"
_RESULT_COLUMNS = (
    "id", "label", "score", "refusal_probability", "tokens", "truncated", "line", "error",
)  # fmt: skip
_CONVERSATION_KEYS = ("messages", "conversations", "text")


class InputError(Exception):
    """A whole input cannot be read."""


@dataclass(frozen=True, slots=True)
class Row:
    """One input row.

    Attributes:
        line: Its line (JSON Lines) or position (other formats) in its file, from 1.
        value: The conversation, as `RefusalClassifier.classify` takes it.
        fields: The input's own fields, for `--keep`; holds `id` if there is one.
        error: Why the row could not even be read; None if it could.
    """

    line: int
    value: Any
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_rows(name: str) -> Iterator[Row]:
    """Reads one input, by its file name extension (.gz is unpacked on the way).

    .csv and .parquet (this not packed) are tables with a `messages` or `conversations` column,
    JSON or nested, or a `text` column; everything else is JSON Lines, or one JSON array of
    conversations.

    Raises:
        InputError: The input cannot be opened, or is of a kind that needs an absent package.
    """
    base = name[:-3] if name.endswith(".gz") else name
    try:
        if base.endswith(".parquet"):
            yield from _parquet(name)
            return
        with _open(name) as handle:
            if base.endswith(".csv"):
                yield from _csv(handle)
            else:
                yield from _json(handle)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise InputError(f"{name} cannot be read: {error}") from error


def _open(name: str) -> BinaryIO:
    if name == STDIN:
        return sys.stdin.buffer
    if name.endswith(".gz"):
        return gzip.open(name, "rb")  # type: ignore[return-value]
    return Path(name).open("rb")


def _json(handle: BinaryIO) -> Iterator[Row]:
    """Reads JSON Lines in constant memory, or a JSON array at once.

    A file that begins with a bracket is one array if it parses as such, unless its first line is
    a list of messages by itself or further lines follow it.
    """
    first = handle.readline()
    opening = first.removeprefix(b"\xef\xbb\xbf")
    lines = itertools.chain([opening] if first else [], handle)
    if opening.strip().startswith(b"["):
        second = handle.readline()
        complete = _loads(opening)
        if isinstance(complete, list) and (second.strip() or not _is_array_of_rows(complete)):
            lines = itertools.chain([opening, second] if second else [opening], handle)
        else:
            everything = opening + second + handle.read()
            whole = _loads(everything)
            if isinstance(whole, list):
                yield from (_row(number, item) for number, item in enumerate(whole, 1))
                return
            alone = isinstance(complete, list) or not isinstance(_loads(second), ValueError)
            if second and not alone:
                raise InputError(f"the input begins like a JSON array but is not one: {whole}")
            lines = itertools.chain(io.BytesIO(everything))
    for number, line in enumerate(lines, 1):
        value = _loads(line)
        if isinstance(value, ValueError):
            problem = f"not valid JSON: {value}" if line.strip() else "empty line"
            yield Row(number, None, error=problem)
        else:
            yield _row(number, value)


def _loads(data: bytes) -> Any:
    """Parses JSON; returns the error instead of raising it."""
    try:
        return json.loads(data)
    except ValueError as error:  # covers JSON and UTF-8 errors
        return error
    except RecursionError:
        return ValueError("nested too deeply")


def _is_array_of_rows(value: Sequence[Any]) -> bool:
    return not any(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)


def _row(number: int, value: Any) -> Row:
    fields = value if isinstance(value, dict) else {}
    return Row(number, value, fields)


def _csv(handle: BinaryIO) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(
        handle, encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as text:
        for number, record in enumerate(csv.DictReader(text), 1):
            named = {key: value for key, value in record.items() if key is not None}
            yield _table_row(number, named)


def _parquet(name: str) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{name} needs the package pyarrow: pip install pyarrow") from error
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(name)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{name} cannot be read: {error}") from error
    for batch in table.iter_batches(batch_size=256):
        for record in batch.to_pylist():
            number += 1
            yield _table_row(number, record)


def _table_row(number: int, record: dict[str, Any]) -> Row:
    """A row of a table, whose conversation column may hold JSON text."""
    for key in ("messages", "conversations"):
        cell = record.get(key)
        if isinstance(cell, str) and cell.strip():
            value = _loads(cell.encode("utf-8", "surrogatepass"))
            if isinstance(value, ValueError):
                return Row(number, None, record, f"column {key!r} is not valid JSON: {value}")
            return Row(number, {key: value}, record)
    # An empty cell of a messages column says nothing; an empty text is one, and an error.
    given = {key: record[key] for key in _CONVERSATION_KEYS if record.get(key) is not None}
    chosen = {key: cell for key, cell in given.items() if key == "text" or cell != ""}
    return Row(number, chosen or record, record)


def result_fields(
    row: Row, result: Verdict | ConversationError | str, *, keep: bool, file: str | None
) -> dict[str, Any]:
    """Returns one output row.

    Args:
        row: The input row.
        result: Its verdict, or why there is none.
        keep: Whether to carry the input's own fields along.
        file: Name of the input, where there are several.
    """
    # The input's own label, say, must not get lost under ours.
    clashing = {*_RESULT_COLUMNS, "file"} - {"id"}
    kept = row.fields.items() if keep else ()
    fields = {f"input_{key}" if key in clashing else key: value for key, value in kept}
    if file is not None:
        fields["file"] = file
    fields["id"] = row.fields.get("id")
    if isinstance(result, Verdict):
        fields.update(
            label=result.label,
            score=result.score,
            refusal_probability=result.refusal_probability,
            tokens=result.tokens,
            truncated=result.truncated,
        )
        return fields
    fields["line"] = row.line
    if isinstance(result, ConversationError):
        result = f"{result.place}: {result.problem}; {result.remedy}"
    fields["error"] = result
    return fields


def dump_json(fields: Mapping[str, Any] | Sequence[Any]) -> str:
    """Serializes an output row or cell on one line; text that is not valid UTF-8 stays escaped."""
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False, default=str)
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(_finite(fields), default=str)
    except ValueError:  # NaN or infinity, which Python reads and JSON does not know
        return dump_json(_finite(fields))
    return text


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not know by null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Writer:
    """Writes output rows as they come; base class and the JSON Lines format."""

    def __init__(self, out: IO[str]) -> None:
        self.out = out

    def write(self, row: Row, fields: Mapping[str, Any]) -> None:
        self.out.write(dump_json(fields) + "\n")

    def close(self) -> None:
        """Writes whatever ends the format."""


class ArrayWriter(Writer):
    """One JSON array, an element a line."""

    _before = "[\n"

    def write(self, row: Row, fields: Mapping[str, Any]) -> None:
        self.out.write(self._before + dump_json(fields))
        self._before = ",\n"

    def close(self) -> None:
        self.out.write("[]\n" if self._before == "[\n" else "\n]\n")


class CsvWriter(Writer):
    """CSV with a header; nested fields kept by `--keep` are written as JSON.

    The columns are those of the first judged row; rows before it wait for them.
    """

    def __init__(self, out: IO[str]) -> None:
        super().__init__(out)
        self._columns: Sequence[str] = ()
        self._waiting: list[Mapping[str, Any]] = []

    def write(self, row: Row, fields: Mapping[str, Any]) -> None:
        self._waiting.append(fields)
        if self._columns or "error" not in fields:
            self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()

    def _flush(self) -> None:
        writer = csv.writer(self.out, lineterminator="\n")
        if not self._columns:
            kept = (key for key in self._waiting[-1] if key not in _RESULT_COLUMNS)
            self._columns = [*kept, *_RESULT_COLUMNS]
            writer.writerow(self._columns)
        for fields in self._waiting:
            cells = (fields.get(column) for column in self._columns)
            writer.writerow(
                [dump_json(cell) if isinstance(cell, (dict, list)) else cell for cell in cells]
            )
        self._waiting = []
