"""Parses and validates what comes in: every accepted shape becomes one `Conversation`.

What is judged is the last assistant message, so messages after it are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from refusal_runtime.bundle import Template
from refusal_runtime.errors import ConversationError

ConversationInput: TypeAlias = "str | Sequence[Mapping[str, Any]] | Mapping[str, Any]"

# Every role name met in OpenAI, ShareGPT and similar data, by the role that the model knows.
# Developer messages instruct like system prompts. What a tool returns is, like a user's words,
# something the assistant is given to react to.
ROLE_ALIASES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "tool": "user",
    "function": "user",
    "function_response": "user",
    "observation": "user",
    "ipython": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
}

# Types of content parts that hold text, by the key that holds it.
_TEXT_PARTS = {
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal",
}  # fmt: skip
# The classifier reads text only; these parts are legitimate and silently passed over.
_MEDIA_PARTS = {
    "image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file",
    "input_file",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        role: "system", "user" or "assistant"; None for text that no role token opens.
        parts: Its text; between two parts stands the ellipsis token for omitted text.
    """

    role: str | None
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A validated conversation; its last message is the one to judge."""

    messages: tuple[Message, ...]


def parse_conversation(
    value: ConversationInput, template: Template, *, row: int | None = None
) -> Conversation:
    """Parses one conversation of any accepted shape.

    Args:
        value: A list of messages (`role`/`content` or `from`/`value`), a mapping with
            `messages`, `conversations` or `text`, or a string, role-formatted or plain.
        template: The model's role tokens, for role-formatted strings.
        row: Position in the call, for error messages.

    Raises:
        ConversationError: The value cannot be judged; says where, why and what to do.
    """
    return _Parser(template, row).conversation(value)


class _Parser:
    """Parses one conversation, remembering its row for error messages."""

    def __init__(self, template: Template, row: int | None) -> None:
        self.template = template
        self.row = row

    def error(self, place: str, problem: str, remedy: str) -> ConversationError:
        return ConversationError(problem, remedy, place=place, row=self.row)

    def conversation(self, value: object, place: str = "conversation") -> Conversation:
        if isinstance(value, str):
            return self.string(value, "text")
        if isinstance(value, Mapping):
            for key in ("messages", "conversations", "text"):
                if value.get(key) is not None:
                    inner = value[key]
                    if (key == "text") != isinstance(inner, str):
                        wanted = "a string" if key == "text" else "a list of messages"
                        raise self.error(key, f"found {_kind(inner)}", f"give {wanted} as {key!r}")
                    return self.string(inner, key) if key == "text" else self.list(inner, key)
            keys = ", ".join(repr(key) for key in list(value)[:6]) or "none"
            raise self.error(
                place,
                f"a mapping without 'messages', 'conversations' or 'text' (keys: {keys})",
                "name the conversation by one of these keys",
            )
        return self.list(value, "messages")

    def list(self, value: object, place: str) -> Conversation:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
            raise self.error(
                place, f"found {_kind(value)}", "give a list of messages or a role-formatted string"
            )
        messages = []
        last = -1  # index in value of the last assistant message, even one that only calls tools
        for index, item in enumerate(value):
            role, text = self.message(item, f"{place}[{index}]")
            if role == "assistant":
                last = index
            messages.append((role, text))
        if last < 0:
            raise self.error(
                place,
                "no assistant message" if messages else "no messages",
                "add the assistant's reply that is to be judged",
            )
        if messages[last][1] is None:
            raise self.error(
                f"{place}[{last}]",
                "the last assistant message only calls tools",
                "leave it out, or end the conversation with the assistant's text",
            )
        kept = [(role, text) for role, text in messages[: last + 1] if text is not None]
        newline = "\n" if self.template.newline_after_role else ""
        return Conversation(
            tuple(
                Message(role, (newline + text + (newline if index < len(kept) - 1 else ""),))
                for index, (role, text) in enumerate(kept)
            )
        )

    def message(self, item: object, place: str) -> tuple[str, str | None]:
        """Returns a message's role and text; None where it only calls tools or shows pictures."""
        if not isinstance(item, Mapping):
            raise self.error(
                place, f"found {_kind(item)}", "give an object with 'role' and 'content'"
            )
        role_key, text_key = ("role", "content") if "role" in item else ("from", "value")
        if role_key not in item:
            raise self.error(place, "no 'role' (or 'from')", "say who speaks: user, assistant, ...")
        name = item[role_key]
        role = ROLE_ALIASES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise self.error(
                f"{place}.{role_key}",
                f"unknown role {name!r:.40}",
                f"use one of {', '.join(ROLE_ALIASES)}",
            )
        place = f"{place}.{text_key}"
        text = self.content(item.get(text_key), place)
        if role == "assistant":
            refused = self.content(item.get("refusal"), f"{place.rpartition('.')[0]}.refusal")
            if refused and refused.strip():
                text = f"{text}\n{refused}" if text else refused
            if not text and (item.get("tool_calls") or item.get("function_call")):
                return role, None
        elif not text and _holds_media(item.get(text_key)):
            return role, None
        if text is None:
            raise self.error(
                place,
                "no content" if text_key not in item else "content is null",
                "give the message's text, or leave the message out",
            )
        return role, self.filled(text, place)

    def content(self, value: object, place: str) -> str | None:
        """Returns the text of OpenAI's content shapes: a string, null, or a list of parts."""
        if value is None:
            return None
        if isinstance(value, str):
            return self.readable(value, place)
        if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
            raise self.error(place, f"found {_kind(value)}", "give a string or a list of parts")
        texts = []
        for index, part in enumerate(value):
            spot = f"{place}[{index}]"
            if isinstance(part, str):
                texts.append(self.readable(part, spot))
                continue
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind in _MEDIA_PARTS:
                continue
            key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
            if not isinstance(part, Mapping) or key is None:
                found = f"a part of type {kind!r:.40}" if kind else _kind(part)
                raise self.error(spot, f"found {found}", "give parts {'type': 'text', 'text': ...}")
            text = part.get(key)
            if not isinstance(text, str):
                raise self.error(f"{spot}.{key}", f"found {_kind(text)}", "give a string")
            texts.append(self.readable(text, f"{spot}.{key}"))
        return "\n".join(texts)

    def string(self, text: str, place: str) -> Conversation:
        """Parses a role-formatted string; one without role tokens is taken as it stands."""
        self.filled(self.readable(text, place), place)
        names = {token: role for role, token in self.template.roles.items()}
        pattern = "|".join(re.escape(token) for token in sorted(names, key=len, reverse=True))
        opening, *pieces = re.split(f"({pattern})", text)
        if not pieces:
            return Conversation((Message(None, self.split(text)),))
        messages = [Message(None, self.split(opening))] if opening else []
        last = -1
        for token, content in zip(pieces[::2], pieces[1::2], strict=True):
            if names[token] == "assistant":
                last = len(messages)
            messages.append(Message(names[token], self.split(content)))
        if last < 0:
            raise self.error(
                place,
                f"no assistant message (no {self.template.roles['assistant']})",
                "add the assistant's reply that is to be judged",
            )
        if not "".join(messages[last].parts).strip():
            raise self.error(
                place, "the last assistant message is empty", "give the reply that is to be judged"
            )
        return Conversation(tuple(messages[: last + 1]))

    def split(self, text: str) -> tuple[str, ...]:
        return tuple(text.split(self.template.ellipsis)) if self.template.ellipsis else (text,)

    def filled(self, text: str, place: str) -> str:
        """Refuses empty text."""
        if not text.strip():
            raise self.error(
                place,
                "the text is empty" if not text else "the text is only white space",
                "give the message's text, or leave the message out",
            )
        return text

    def readable(self, text: str, place: str) -> str:
        """Refuses text that no tokenizer should see."""
        at = text.find("\0")
        if at >= 0:
            raise self.error(place, f"NUL character at position {at}", "remove it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                place,
                f"lone surrogate U+{ord(text[error.start]):04X} at position {error.start}",
                "decode the text properly, or replace it by U+FFFD",
            ) from None
        return text


def _holds_media(content: object) -> bool:
    parts = content if isinstance(content, (list, tuple)) else ()
    return any(
        isinstance(part, Mapping) and part.get("type") in tuple(_MEDIA_PARTS) for part in parts
    )


def _kind(value: object) -> str:
    """Names a value's type in JSON's words, which is what most callers hold in hand."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    return f"a {type(value).__name__}"
