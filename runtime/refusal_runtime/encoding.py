"""Turns a conversation into token ids: exact budget, unforgeable role tokens, no silent cut."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from refusal_runtime.bundle import Template
from refusal_runtime.conversation import Conversation, Message
from refusal_runtime.errors import BundleError, ConversationError

IdArray = npt.NDArray[np.int64]
Truncation = Literal["middle", "head", "error"]

# A message of the older context is kept only while this many of its tokens fit.
_LEAST_CONTEXT = 16
# The request that the judged reply answers may take this share of the budget when both are long.
_REQUEST_SHARE = 4


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of one conversation.

    Attributes:
        ids: int64, shape (tokens,), control tokens included.
        truncated: Whether anything of the conversation is missing from them.
    """

    ids: IdArray
    truncated: bool


@dataclass(slots=True)
class _Segment:
    """One message in tokens: those of its role token, those of its text."""

    role: str | None
    marker: list[int]
    ids: list[int]


class Encoder:
    """Encodes conversations for one model; thread-safe.

    Args:
        tokenizer: The checkpoint's own tokenizer. It is put into a mode in which the text of a
            message cannot produce its special tokens, so it must not be shared.
        template: The conversation template.
        max_length: Token budget, control tokens included.
        truncation: "middle" elides what matters least, "head" keeps the first tokens as
            `truncation=True` of a transformers pipeline does, "error" refuses.

    Raises:
        ValueError: `truncation` is unknown or `max_length` leaves no room for any text.
        BundleError: The tokenizer is of an unknown kind.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        *,
        max_length: int,
        truncation: Truncation = "middle",
    ) -> None:
        if truncation not in ("middle", "head", "error"):
            raise ValueError(
                f"truncation should be 'middle', 'head' or 'error', found {truncation!r}"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.max_length = max_length
        self.truncation = truncation
        self._tokenizer = tokenizer
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        framed = tokenizer.encode("a").ids
        starts = [at for at in range(len(framed)) if framed[at : at + len(plain)] == plain]
        if not plain or not starts:
            raise BundleError("the tokenizer does not frame text with control tokens as expected")
        start = starts[0]
        self._prefix, self._suffix = framed[:start], framed[start + len(plain) :]
        self._markers: dict[str | None, list[int]] = {None: []}
        for role, token in template.roles.items():
            self._markers[role] = tokenizer.encode(token, add_special_tokens=False).ids
        self._ellipsis: list[int] = []
        if template.ellipsis is not None:
            self._ellipsis = tokenizer.encode(template.ellipsis, add_special_tokens=False).ids
        tokens = {template.ellipsis, *template.roles.values()}
        self._spelling, self._unknown = _control_spelling(tokenizer, tokens)
        tokenizer.encode_special_tokens = True
        # Without tokens of their own, roles are marked by text that any message could contain.
        self.forgeable = any(len(self._markers[role]) != 1 for role in template.roles)
        longest = max(map(len, self._markers.values()))
        least = len(self._prefix) + len(self._suffix) + longest + 3
        if max_length < least:
            raise ValueError(f"max_length should be at least {least} tokens, found {max_length}")

    def encode(self, conversation: Conversation, *, row: int | None = None) -> Encoding:
        """Encodes one conversation.

        Args:
            conversation: What `parse_conversation` returned.
            row: Position in the call, for error messages.

        Raises:
            ConversationError: The judged message has no tokens at all, or the conversation
                exceeds the budget and `truncation` is "error".
        """
        segments = [self._segment(message) for message in conversation.messages]
        if not segments[-1].ids:
            raise ConversationError(
                "no token is left of the last assistant message after normalization",
                "give a reply with visible text",
                place="conversation",
                row=row,
            )
        room = self.max_length - len(self._prefix) - len(self._suffix)
        total = sum(len(segment.marker) + len(segment.ids) for segment in segments)
        if total > room and self.truncation == "error":
            raise ConversationError(
                f"{total + self.max_length - room} tokens exceed the limit of {self.max_length}",
                "shorten the conversation or use truncation='middle'",
                place="conversation",
                row=row,
            )
        if total > room and self.truncation == "middle":
            segments = self._shorten(segments, room)
        body = [number for segment in segments for number in (*segment.marker, *segment.ids)]
        ids = np.array([*self._prefix, *body[:room], *self._suffix], dtype=np.int64)
        return Encoding(ids, total > room)

    def _segment(self, message: Message) -> _Segment:
        ids = self._text(message.parts[0])
        for part in message.parts[1:]:
            ids = [*ids, *self._ellipsis, *self._text(part)]
        return _Segment(message.role, self._markers[message.role], ids)

    def _text(self, text: str) -> list[int]:
        """Returns the ids of a text, none of which is a control id."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._spelling.keys().isdisjoint(ids):
            return ids
        plain: list[int] = []
        unknown, name = self._unknown
        for number, token in zip(ids, encoding.tokens, strict=True):
            if number != unknown:
                plain.extend(self._spelling.get(number, [number]))
                continue
            # Unigram fuses neighbouring unknowns; between spelled-out names of the unknown token
            # stand characters that no piece covers, for which the unknown id is right.
            for position, rest in enumerate(token.split(name)):
                plain.extend(self._spelling[unknown] if position else [])
                plain.extend([unknown] if rest else [])
        return plain

    def _shorten(self, segments: list[_Segment], room: int) -> list[_Segment]:
        """Fits a conversation into `room` tokens.

        The judged message and the request before it are served first, then the other messages
        share what is left: the longest give way first, down to a least length, then the oldest
        turns go altogether, the system prompt last.
        """
        judged = segments[-1]
        request = next((s for s in reversed(segments[:-1]) if s.role == "user"), None)
        space = room - len(judged.marker)
        reserved = 0
        if request is not None:
            reserved = min(len(request.marker) + len(request.ids), space // _REQUEST_SHARE)
        keep = {id(judged): min(len(judged.ids), space - reserved)}
        space -= keep[id(judged)]
        if request is not None:
            share = min(len(request.ids), space - len(request.marker))
            if share == len(request.ids) or share >= 3:
                keep[id(request)] = share
                space -= len(request.marker) + share
            else:  # too little for the request to say anything: back to the judged message
                more = min(len(judged.ids) - keep[id(judged)], space)
                keep[id(judged)] += more
                space -= more
        rest = [s for s in segments if s is not judged and s is not request]
        # Oldest first, the system prompt after all turns: the order in which they may go.
        leaving = sorted(rest, key=lambda segment: segment.role == "system")
        while rest and space < sum(len(s.marker) + min(len(s.ids), _LEAST_CONTEXT) for s in rest):
            gone = leaving.pop(0)
            rest = [s for s in rest if s is not gone]
        shares = _level([len(s.ids) for s in rest], space - sum(len(s.marker) for s in rest))
        keep.update((id(s), share) for s, share in zip(rest, shares, strict=True))
        return [
            _Segment(s.role, s.marker, self._elide(s.ids, keep[id(s)]))
            for s in segments
            if id(s) in keep
        ]

    def _elide(self, ids: list[int], keep: int) -> list[int]:
        """Replaces the middle by the ellipsis token so that exactly `keep` ids remain."""
        if len(ids) <= keep:
            return ids
        mark = self._ellipsis if keep >= len(self._ellipsis) + 2 else []
        tail = (keep - len(mark)) // 2
        head = keep - len(mark) - tail
        return [*ids[:head], *mark, *ids[len(ids) - tail :]]


def _control_spelling(
    tokenizer: Tokenizer, template: Collection[str | None]
) -> tuple[dict[int, list[int]], tuple[int, str]]:
    """Maps each control id to the ids of its characters, as ordinary text would have them.

    `encode_special_tokens` keeps added tokens from being recognized in text, but `<s>`, `</s>`
    and the like are also pieces of a Unigram vocabulary, and normalization can compose them
    (from fullwidth brackets, say), so they still come out as control ids.

    Args:
        tokenizer: The tokenizer.
        template: The template's tokens, which some tokenizers do not call special.

    Returns:
        The spellings, and the id and text of the unknown token of a Unigram vocabulary. In other
        vocabularies no text spells the unknown token, so its id needs no spelling.
    """
    spelling: dict[int, list[int]] = {}
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if token.special or token.content in template:
            ids = [tokenizer.token_to_id(character) for character in token.content]
            spelling[number] = [found for found in ids if found is not None]
    if type(tokenizer.model).__name__ == "Unigram":
        number = tokenizer.token_to_id("<unk>")
        return spelling, (-1, "") if number is None else (number, "<unk>")
    unknown = getattr(tokenizer.model, "unk_token", None)
    spelling.pop(tokenizer.token_to_id(unknown) if unknown else -1, None)
    return spelling, (-1, "")


def _level(lengths: list[int], space: int) -> list[int]:
    """Shares `space` out so that only the longest lengths are cut, to a common level.

    The shares add up to exactly `space` whenever the lengths exceed it.
    """
    shares = [0] * len(lengths)
    left = space
    waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
    for position, index in enumerate(waiting):
        shares[index] = min(lengths[index], left // (len(waiting) - position))
        left -= shares[index]
    return shares


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads `tokenizer.json`.

    Raises:
        BundleError: The file is missing or no tokenizer.
    """
    load: Callable[[str], Tokenizer] = Tokenizer.from_file
    try:
        return load(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise BundleError(f"{path} is not a usable tokenizer ({error})") from error
