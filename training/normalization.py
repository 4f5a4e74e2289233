"""Makes a tokenizer blind to typography: what must not change a verdict does not reach the model.

Capitals, quotation marks, markdown emphasis, headings and quoting, an emoji before the text and
spaces around it say nothing about whether a reply refuses, yet each changed some verdicts when
they were left to training.  They are taken away by the tokenizer's own normalizer, so that what
loads tokenizer.json with the tokenizers library does the same, and before the vocabulary's
normalizer, which turns line breaks into spaces.  Bullets, numbers and tables stay: they tell how
an answer is built.  In code an asterisk before a name or a number sign at a line's beginning may
go too.  A text that holds nothing else keeps what it has, an emoji alone for instance.
"""

from __future__ import annotations

import copy
from typing import Any

# Headings and quoting at a line's beginning where text follows; empty lines of a quotation.
# Possessive repetitions, for nobody may stop the tokenizer by a line of many blanks.
_LINE_MARKS = r"(?m)^[ \t]*+(?:(?:#{1,6}|>)[ \t]++)+(?=\S)|^[ \t]*+>[ \t]*+\n(?=\s*+\S)"
# Asterisks around words; those between numbers or names are signs, those between spaces bullets.
_EMPHASIS = r"(?<![0-9A-Za-z*])\*{1,3}(?=[^\s*])|(?<=[^\s*])\*{1,3}(?![0-9A-Za-z*])"
_PICTURES = r"\p{Extended_Pictographic}\x{FE0F}\x{200D}\x{1F3FB}-\x{1F3FF}"
_EMOJI = rf"\A[\s{_PICTURES}]++(?=[^\s{_PICTURES}])"
_REPLACED = (
    (_EMOJI, ""),
    (f"{_LINE_MARKS}|{_EMPHASIS}", ""),
    ("[\u2018\u2019]", "'"),
    ("[\u201c\u201d\u201e\u00ab\u00bb]", '"'),
)
_COMBINING_DOT = "\u0307"  # what is left of a Turkish capital I with a dot in small letters


def without_typography(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Returns the tokenizer with a normalizer that removes typography.

    Args:
        tokenizer: The content of a tokenizer.json whose normalizer is a sequence.
    """
    tokenizer = copy.deepcopy(tokenizer)
    own = tokenizer["normalizer"]["normalizers"]
    first = [replace({"Regex": pattern}, content) for pattern, content in _REPLACED]
    last = [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Lowercase"},
        replace({"String": _COMBINING_DOT}, ""),
    ]
    tokenizer["normalizer"]["normalizers"] = [*first, *own, *last]
    return tokenizer


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    """Returns a Replace normalizer of tokenizer.json."""
    return {"type": "Replace", "pattern": pattern, "content": content}
