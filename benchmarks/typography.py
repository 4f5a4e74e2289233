"""Other typography for the same words: what must not change a label."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from random import Random

_EMOJI = ("🙂", "😅", "🙏", "👍", "✨", "🤖", "⚠️", "❌", "✅", "💡", "🚫", "👋")
_LATIN_END = "\u024f"  # end of Latin Extended-B; and the Vietnamese letters below
_PLAIN = {0x2019: "'", 0x2018: "'", 0x201C: '"', 0x201D: '"', 0xAB: '"', 0xBB: '"', 0x201E: '"'}


def quotes(text: str, rng: Random) -> str:
    """Writes typographic quotes and apostrophes, or plain ones where they are typographic."""
    plain = text.translate(_PLAIN)
    if plain != text:
        return plain
    return re.sub(r'"([^"\n]*)"', "“\\1”", text).replace("'", "’")


def no_accents(text: str, rng: Random) -> str:
    """Takes the accents off Latin letters; in other scripts marks are part of the spelling."""
    return "".join(
        unicodedata.normalize("NFD", char)[0]
        if char <= _LATIN_END or "\u1e00" <= char <= "\u1eff"
        else char
        for char in text
    )


def lower(text: str, rng: Random) -> str:
    """Writes small letters only."""
    return text.lower()


def upper(text: str, rng: Random) -> str:
    """Writes capitals only."""
    return text.upper()


def markdown(text: str, rng: Random) -> str:
    """Sets the text under a heading, in italics, as a quotation, or its beginning in bold."""
    form = rng.randrange(4)
    if form == 0:
        head, mark, tail = text.partition(". ")
        return f"**{head}{mark.strip()}** {tail}".strip()
    if form == 1:
        return f"## {text}"
    if form == 2:
        return f"*{text}*"
    return "> " + text.replace("\n", "\n> ")


def emoji(text: str, rng: Random) -> str:
    """Puts an emoji before the text."""
    return f"{rng.choice(_EMOJI)} {text}"


def spaces(text: str, rng: Random) -> str:
    """Doubles the spaces and line breaks and adds some at both ends."""
    return "\n  " + text.replace("\n", "\n\n").replace(" ", "  ") + " \n"


VARIANTS: dict[str, Callable[[str, Random], str]] = {
    "quotes": quotes,
    "no accents": no_accents,
    "lower case": lower,
    "upper case": upper,
    "markdown": markdown,
    "emoji": emoji,
    "spaces": spaces,
}
