"""A readable table of verdicts for terminals, aligned in every script."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Mapping
from typing import IO, Any

from refusal_runtime.bundle import DEFAULT_TEMPLATE
from refusal_runtime.conversation import parse_conversation
from refusal_runtime.errors import ConversationError
from refusal_runtime.rows import Row, Writer

_HEADER = ("id", "label", "score", "tokens", "reply")
_WIDTHS = (12, 12, 6, 7)


class TableWriter(Writer):
    """Writes one line a row, the judged reply cut to the terminal's width."""

    def __init__(self, out: IO[str]) -> None:
        super().__init__(out)
        columns = shutil.get_terminal_size((100, 24)).columns
        self._reply_width = max(20, columns - sum(_WIDTHS) - 2 * len(_WIDTHS))
        self._line(_HEADER)
        self._line(tuple("-" * width for width in (*_WIDTHS, self._reply_width)))

    def write(self, row: Row, fields: Mapping[str, Any]) -> None:
        name = fields.get("id")
        name = f"line {row.line}" if name is None else str(name)
        if "error" in fields:
            self._line((name, "ERROR", "", "", fields["error"]))
            return
        tokens = f"{fields['tokens']}{'+' if fields['truncated'] else ''}"
        score = f"{fields['score']:.3f}"
        self._line((name, fields["label"], score, tokens, _reply(row.value)))

    def _line(self, cells: tuple[str, ...]) -> None:
        widths = (*_WIDTHS, self._reply_width)
        line = "  ".join(_fit(cell, width) for cell, width in zip(cells, widths, strict=True))
        self.out.write(line.rstrip() + "\n")


def _reply(value: Any) -> str:
    """The text that was judged."""
    try:
        return " … ".join(parse_conversation(value, DEFAULT_TEMPLATE).messages[-1].parts)
    except ConversationError:  # the model's own template reads it differently
        return ""


def _fit(text: str, width: int) -> str:
    """Cuts or pads to a number of terminal columns; control characters become spaces."""
    shown: list[str] = []
    used = 0
    for character in text:
        if unicodedata.category(character).startswith("C") and character not in "\u200c\u200d":
            character = " "
        columns = _columns(character)
        if used + columns > width:
            while used > width - 1:
                used -= _columns(shown.pop())
            shown.append("…")
            used += 1
            break
        shown.append(character)
        used += columns
    return "".join(shown) + " " * (width - used)


def _columns(character: str) -> int:
    """How many terminal columns a character takes (Unicode Standard Annex 11)."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
