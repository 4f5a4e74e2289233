"""Reads conversations from files and writes verdicts, one output row for each input row."""

from __future__ import annotations

import csv
import gzip
import io
import json
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

    .csv and .parquet are tables with a `messages` or `conversations` column (JSON or nested), or
    a `text` column; everything else is JSON Lines, or one JSON array of conversations.

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

    A file whose first line is no complete JSON value, or the only one and an array of
    conversations rather than of messages, is taken for one array.
    """
    first = handle.readline()
    opening = first.removeprefix(b"\xef\xbb\xbf").strip()
    if opening.startswith(b"["):
        second = handle.readline()
        complete = _loads(opening)
        if not isinstance(complete, list) or (not second.strip() and _is_array_of_rows(complete)):
            whole = _loads(b"".join((opening, b"\n", second, handle.read())))
            if isinstance(whole, list):
                yield from (_row(number, item) for number, item in enumerate(whole, 1))
                return
            if not isinstance(complete, list) and not second:
                yield Row(1, None, error=f"not valid JSON: {whole}")
                return
            raise InputError(f"the input begins like a JSON array but is not valid JSON: {whole}")
        lines: Iterator[bytes] = iter((opening, second) if second else (opening,))
    else:
        lines = iter((opening,) if first else ())
    number = 0
    for source in (lines, handle):
        for line in source:
            number += 1
            value = _loads(line)
            if isinstance(value, ValueError):
                blank = not line.strip()
                yield Row(number, None, error="empty line" if blank else f"not valid JSON: {value}")
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
    text = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="")
    for number, record in enumerate(csv.DictReader(text), 1):
        yield _table_row(number, {key: value for key, value in record.items() if key is not None})


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
        if isinstance(cell, str) and cell:
            value = _loads(cell.encode("utf-8", "surrogatepass"))
            if isinstance(value, ValueError):
                return Row(number, None, record, f"column {key!r} is not valid JSON: {value}")
            return Row(number, {key: value}, record)
    chosen = {key: record[key] for key in _CONVERSATION_KEYS if record.get(key) is not None}
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
    fields = dict(row.fields) if keep else {}
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


def dump_json(fields: Mapping[str, Any]) -> str:
    """Serializes one output row on one line; text that is no valid UTF-8 stays escaped."""
    text = json.dumps(fields, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(fields, default=str)
    return text


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
    """CSV with a header; nested fields kept by `--keep` are written as JSON."""

    _columns: Sequence[str] = ()

    def write(self, row: Row, fields: Mapping[str, Any]) -> None:
        writer = csv.writer(self.out, lineterminator="\n")
        if not self._columns:
            kept = (key for key in fields if key not in _RESULT_COLUMNS)
            self._columns = [*kept, *_RESULT_COLUMNS]
            writer.writerow(self._columns)
        cells = (fields.get(column) for column in self._columns)
        writer.writerow(
            [json.dumps(cell) if isinstance(cell, (dict, list)) else cell for cell in cells]
        )
