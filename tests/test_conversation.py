"""Parsing: every accepted shape of a conversation, and what every refused one is told."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from refusal_runtime import ConversationError
from refusal_runtime.bundle import DEFAULT_TEMPLATE, Template
from refusal_runtime.conversation import ROLE_ALIASES, Conversation, parse_conversation
from refusal_runtime.errors import RefusalRuntimeError

NEWLINES = Template(DEFAULT_TEMPLATE.roles, DEFAULT_TEMPLATE.ellipsis, newline_after_role=True)
NO_ELLIPSIS = Template(DEFAULT_TEMPLATE.roles, None)

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "no"}
CALLS = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]


def parse(value: Any, template: Template = DEFAULT_TEMPLATE) -> list[tuple[str | None, Any]]:
    """Parses to (role, text) pairs; a text with elisions is the tuple of its parts."""
    return plain(parse_conversation(value, template))


def plain(conversation: Conversation) -> list[tuple[str | None, Any]]:
    return [
        (message.role, message.parts[0] if len(message.parts) == 1 else message.parts)
        for message in conversation.messages
    ]


def refusal(value: Any, template: Template = DEFAULT_TEMPLATE) -> ConversationError:
    with pytest.raises(ConversationError) as caught:
        parse_conversation(value, template, row=3)
    return caught.value


def reply(content: Any, **more: Any) -> list[dict[str, Any]]:
    """A conversation whose judged message, `messages[1]`, has this content."""
    return [USER, {"role": "assistant", "content": content, **more}]


# --- strings --------------------------------------------------------------------------------


def test_a_role_formatted_string() -> None:
    text = "<|system|>Be terse.<|user|>hi<|assistant|>no"
    assert parse(text) == [("system", "Be terse."), ("user", "hi"), ("assistant", "no")]


def test_a_string_is_taken_to_the_letter() -> None:
    text = "<|user|> a\n\n<|assistant|>\tb \n"
    assert parse(text) == [("user", " a\n\n"), ("assistant", "\tb \n")]
    # The caller of a string writes the template; nothing is added to it.
    assert parse(text, NEWLINES) == parse(text)


def test_a_string_without_role_tokens_is_classified_as_it_stands() -> None:
    assert parse(" I can't. ") == [(None, " I can't. ")]
    assert parse("<s> <|tool|> <|Assistant|>") == [(None, "<s> <|tool|> <|Assistant|>")]


def test_text_before_the_first_role_token_is_kept() -> None:
    assert parse("Hello <|assistant|>no") == [(None, "Hello "), ("assistant", "no")]


def test_only_the_reply_is_a_conversation() -> None:
    assert parse("<|assistant|>no") == [("assistant", "no")]
    assert parse([REPLY]) == [("assistant", "no")]


def test_a_role_without_text_before_the_reply_is_kept_in_a_string() -> None:
    assert parse("<|user|><|assistant|>no") == [("user", ""), ("assistant", "no")]


def test_the_ellipsis_token_of_a_string_stands_for_omitted_text() -> None:
    assert parse("<|user|>a<|...|>b<|...|>c<|assistant|>no") == [
        ("user", ("a", "b", "c")),
        ("assistant", "no"),
    ]
    assert parse("a<|...|>b") == [(None, ("a", "b"))]
    assert parse("a<|...|>b", NO_ELLIPSIS) == [(None, "a<|...|>b")]


def test_the_tokens_of_a_string_are_the_template_s() -> None:
    # "[A" opens "[A2", so the longer token has to win.
    template = Template({"system": "[S]", "user": "[A", "assistant": "[A2"}, "[..]")
    assert parse("[Ahi[A2no[..]way", template) == [("user", "hi"), ("assistant", ("no", "way"))]
    assert parse("<|user|>hi", template) == [(None, "<|user|>hi")]


# --- lists of messages ----------------------------------------------------------------------


def test_a_list_of_messages() -> None:
    messages = [{"role": "system", "content": "Be terse."}, USER, REPLY]
    expected = [("system", "Be terse."), ("user", "hi"), ("assistant", "no")]
    assert parse(messages) == expected
    assert parse(tuple(messages)) == expected


def test_messages_are_taken_to_the_letter_and_never_parsed() -> None:
    text = " \n<|assistant|> <s> <|...|> "
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert parse(messages) == [("user", text), ("assistant", text)]


@pytest.mark.parametrize(("name", "role"), ROLE_ALIASES.items())
def test_every_role_name_in_both_spellings(name: str, role: str) -> None:
    for written in (name, f" {name.upper()} "):
        openai = [{"role": written, "content": "x"}, REPLY]
        sharegpt = [{"from": written, "value": "x"}, {"from": "gpt", "value": "no"}]
        assert parse(openai) == parse(sharegpt) == [(role, "x"), ("assistant", "no")]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("developer", "system"),
        ("tool", "user"),
        ("function", "user"),
        ("human", "user"),
        ("gpt", "assistant"),
    ],
)
def test_the_roles_of_openai_and_sharegpt_map_sensibly(name: str, role: str) -> None:
    assert ROLE_ALIASES[name] == role


def test_fields_that_do_not_matter_are_ignored() -> None:
    tool = {"role": "tool", "content": "42", "tool_call_id": "1", "name": "look"}
    assert parse([USER, tool, {**REPLY, "annotations": [], "audio": None}]) == [
        ("user", "hi"),
        ("user", "42"),
        ("assistant", "no"),
    ]


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_content_as_text_parts(kind: str) -> None:
    parts = [{"type": kind, "text": "I"}, "cannot", {"type": kind, "text": "help"}]
    assert parse(reply(parts)) == [("user", "hi"), ("assistant", "I\ncannot\nhelp")]


@pytest.mark.parametrize(
    "media",
    [
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "f"}},
    ],
)
def test_media_parts_are_passed_over(media: dict[str, Any]) -> None:
    user = {"role": "user", "content": [media, {"type": "text", "text": "what is it?"}]}
    assert parse([user, REPLY]) == [("user", "what is it?"), ("assistant", "no")]


def test_a_refusal_part() -> None:
    parts = [{"type": "text", "text": "Hm."}, {"type": "refusal", "refusal": "I can't."}]
    assert parse(reply(parts)) == [("user", "hi"), ("assistant", "Hm.\nI can't.")]


@pytest.mark.parametrize("content", [None, ""])
def test_the_refusal_field_stands_in_for_content(content: str | None) -> None:
    expected = [("user", "hi"), ("assistant", "I can't.")]
    assert parse(reply(content, refusal="I can't.")) == expected
    assert parse([USER, {"role": "assistant", "refusal": "I can't."}]) == expected


def test_the_refusal_field_follows_content() -> None:
    assert parse(reply("Hm.", refusal="I can't."))[-1] == ("assistant", "Hm.\nI can't.")


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_refusal_field_changes_nothing(empty: Any) -> None:
    assert parse(reply("Sure.", refusal=empty)) == parse(reply("Sure."))


def test_a_refusal_field_of_others_than_the_assistant_is_no_text() -> None:
    assert parse([{**USER, "refusal": "x"}, REPLY]) == [("user", "hi"), ("assistant", "no")]


@pytest.mark.parametrize(
    "calling",
    [
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "assistant", "tool_calls": CALLS},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    ],
)
def test_an_earlier_message_that_only_calls_tools_is_left_out(calling: dict[str, Any]) -> None:
    tool = {"role": "tool", "content": "42"}
    assert parse([USER, calling, tool, REPLY]) == [
        ("user", "hi"),
        ("user", "42"),
        ("assistant", "no"),
    ]


def test_text_next_to_tool_calls_is_judged() -> None:
    assert parse(reply("Let me look.", tool_calls=CALLS))[-1] == ("assistant", "Let me look.")


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_mapping_rows(key: str) -> None:
    expected = [("user", "hi"), ("assistant", "no")]
    assert parse({"id": 1, key: [USER, REPLY]}) == expected
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "no"}]
    assert parse({key: sharegpt, "text": None}) == expected


def test_mapping_rows_with_text() -> None:
    assert parse({"text": "<|user|>hi<|assistant|>no"}) == [("user", "hi"), ("assistant", "no")]
    assert parse({"messages": None, "text": "no"}) == [(None, "no")]


# --- what is judged -------------------------------------------------------------------------


def test_what_follows_the_last_assistant_message_is_dropped() -> None:
    more = [{"role": "user", "content": "why?"}, {"role": "tool", "content": "42"}]
    assert parse([USER, REPLY, *more]) == [("user", "hi"), ("assistant", "no")]
    text = "<|user|>hi<|assistant|>no<|user|>why?<|system|>x"
    assert parse(text) == [("user", "hi"), ("assistant", "no")]


def test_the_last_assistant_message_is_judged_in_the_context_of_earlier_ones() -> None:
    messages = [USER, REPLY, {"role": "user", "content": "why?"}, *reply("so")[1:]]
    expected = [("user", "hi"), ("assistant", "no"), ("user", "why?"), ("assistant", "so")]
    assert parse(messages) == expected
    assert parse("<|user|>hi<|assistant|>no<|user|>why?<|assistant|>so") == expected


def test_two_assistant_messages_in_a_row_are_not_merged() -> None:
    assert parse([USER, REPLY, REPLY]) == [
        ("user", "hi"),
        ("assistant", "no"),
        ("assistant", "no"),
    ]


# --- templates with newlines ----------------------------------------------------------------


def test_a_newline_follows_each_role_token_and_separates_messages() -> None:
    messages = [{"role": "system", "content": "s"}, USER, REPLY, USER]
    written = "".join(
        NEWLINES.roles[message.role or ""] + "".join(message.parts)
        for message in parse_conversation(messages, NEWLINES).messages
    )
    assert written == "<|system|>\ns\n<|user|>\nhi\n<|assistant|>\nno"


def test_messages_and_the_string_written_of_them_are_one_conversation() -> None:
    text = "<|user|>\nhi\n<|assistant|>\nno"
    assert parse([USER, REPLY], NEWLINES) == parse(text, NEWLINES)
    assert parse([USER, REPLY]) == parse(text.replace("\n", ""))


# --- errors ---------------------------------------------------------------------------------

SURROGATE, NUL = "ab\ud800", "a\0b"

ERRORS: dict[str, tuple[Any, str, str, str]] = {
    # name: (input, place, part of the problem, part of the remedy)
    "no messages": ([], "messages", "no messages", "assistant's reply"),
    "no assistant": ([USER], "messages", "no assistant message", "assistant's reply"),
    "no assistant in a string": ("<|user|>hi", "text", "no assistant message", "reply"),
    "no assistant in a row": ({"messages": [USER]}, "messages", "no assistant message", "reply"),
    "no assistant in ShareGPT": (
        {"conversations": [{"from": "human", "value": "x"}]},
        "conversations", "no assistant message", "reply",
    ),
    "no assistant in a text row": ({"text": "<|user|>hi"}, "text", "no assistant", "reply"),
    "empty string": ("", "text", "empty", "give"),
    "blank string": (" \n\t　", "text", "only white space", "give"),
    "empty reply in a string": ("<|user|>hi<|assistant|> \n", "text", "empty", "give the reply"),
    "elided reply in a string": ("<|assistant|> <|...|> ", "text", "empty", "give the reply"),
    "empty content": (reply(""), "messages[1].content", "empty", "leave the message out"),
    "blank content": (reply(" \n"), "messages[1].content", "only white space", "leave"),
    "empty content of a user": (
        [{"role": "user", "content": ""}, REPLY], "messages[0].content", "empty", "leave",
    ),
    "null content": (reply(None), "messages[1].content", "content is null", "give"),
    "missing content": ([USER, {"role": "assistant"}], "messages[1].content", "no content", "give"),
    "missing value": (
        {"conversations": [{"from": "gpt"}]}, "conversations[0].value", "no content", "give",
    ),
    "no parts": (reply([]), "messages[1].content", "empty", "give"),
    "only tool calls": (reply(None, tool_calls=CALLS), "messages[1]", "only calls tools", "leave"),
    "tool calls last": (
        [USER, REPLY, {"role": "assistant", "content": None, "tool_calls": CALLS}],
        "messages[2]", "only calls tools", "leave",
    ),
    "no tool calls": (reply(None, tool_calls=[]), "messages[1].content", "null", "give"),
    "unknown role": (
        [{"role": "narrator", "content": "x"}, REPLY], "messages[0].role",
        "unknown role 'narrator'", "use one of system, developer, user",
    ),
    "unknown role in ShareGPT": (
        {"conversations": [{"from": "me", "value": "x"}]}, "conversations[0].from",
        "unknown role 'me'", "use one of",
    ),
    "null role": ([{"role": None, "content": "x"}], "messages[0].role", "None", "use one of"),
    "role of a wrong type": ([{"role": ["user"]}], "messages[0].role", "['user']", "use one of"),
    "no role": ([{"content": "x"}], "messages[0]", "no 'role'", "say who speaks"),
    "null": (None, "messages", "found null", "list of messages"),
    "a number": (5, "messages", "found a number", "list of messages"),
    "a boolean": (True, "messages", "found a boolean", "list of messages"),
    "bytes": (b"<|assistant|>no", "messages", "found a bytes", "list of messages"),
    "a set": ({"x"}, "messages", "found a set", "list of messages"),
    "a generator": ((m for m in [REPLY]), "messages", "found a generator", "list of messages"),
    "a lone message": (REPLY, "conversation", "'role', 'content'", "name the conversation"),
    "an empty object": ({}, "conversation", "keys: none", "name the conversation"),
    "nulls": ({"messages": None}, "conversation", "'messages'", "name the conversation"),
    "messages of a wrong type": ({"messages": "x"}, "messages", "found a str", "list of messages"),
    "messages as an object": ({"messages": REPLY}, "messages", "found an object", "list of"),
    "text of a wrong type": ({"text": [USER, REPLY]}, "text", "found a list", "a string"),
    "message of a wrong type": (["hi"], "messages[0]", "found a str", "'role' and 'content'"),
    "null message": ([USER, None], "messages[1]", "found null", "'role' and 'content'"),
    "content as a number": (reply(4.5), "messages[1].content", "found a number", "a string"),
    "content as an object": (reply({"text": "x"}), "messages[1].content", "an object", "a string"),
    "content as bytes": (reply(b"x"), "messages[1].content", "found a bytes", "a string"),
    "part of a wrong type": (
        reply([{"type": "text", "text": "x"}, 7]), "messages[1].content[1]", "a number", "parts",
    ),
    "part of an unknown type": (
        reply([{"type": "hologram"}]), "messages[1].content[0]", "'hologram'", "give parts",
    ),
    "part without a type": (reply([{"text": "x"}]), "messages[1].content[0]", "an object", "parts"),
    "part with an unhashable type": (
        reply([{"type": ["text"]}]), "messages[1].content[0]", "['text']", "give parts",
    ),
    "part without text": (
        reply([{"type": "text"}]), "messages[1].content[0].text", "found null", "a string",
    ),
    "refusal part without text": (
        reply([{"type": "refusal", "refusal": 1}]),
        "messages[1].content[0].refusal", "found a number", "a string",
    ),
    "refusal of a wrong type": (
        reply("x", refusal=True), "messages[1].refusal", "found a boolean", "a string",
    ),
    "surrogate in a string": (SURROGATE, "text", "lone surrogate U+D800 at position 2", "U+FFFD"),
    "surrogate in a message": (
        [{"role": "user", "content": SURROGATE}, REPLY],
        "messages[0].content", "lone surrogate U+D800 at position 2", "U+FFFD",
    ),
    "surrogate in a refusal": (
        reply(None, refusal=SURROGATE), "messages[1].refusal", "U+D800 at position 2", "U+FFFD",
    ),
    "surrogate in a part": (
        reply(["x", {"type": "text", "text": SURROGATE}]),
        "messages[1].content[1].text", "U+D800 at position 2", "U+FFFD",
    ),
    "NUL in a string": ("<|assistant|>" + NUL, "text", "NUL character at position 14", "remove"),
    "NUL in ShareGPT": (
        {"conversations": [{"from": "gpt", "value": NUL}]},
        "conversations[0].value", "NUL character at position 1", "remove",
    ),
    "NUL in a refusal": (
        reply("x", refusal=NUL), "messages[1].refusal", "NUL character at position 1", "remove",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("value", "place", "problem", "remedy"), ERRORS.values(), ids=list(ERRORS))
def test_errors_name_row_place_and_remedy(
    value: Any, place: str, problem: str, remedy: str
) -> None:
    error = refusal(value)
    assert (error.row, error.place) == (3, place)
    assert problem in error.problem
    assert remedy in error.remedy
    assert str(error) == f"row 3, {error.place}: {error.problem}; {error.remedy}"


def test_a_lone_conversation_has_no_row() -> None:
    with pytest.raises(ConversationError) as caught:
        parse_conversation([USER], DEFAULT_TEMPLATE)
    assert caught.value.row is None
    assert str(caught.value).startswith("messages: no assistant message; ")


def test_errors_are_value_errors_and_cross_process_boundaries() -> None:
    error = refusal([USER])
    assert isinstance(error, ValueError)
    assert isinstance(error, RefusalRuntimeError)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ConversationError
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_a_long_role_or_many_keys_do_not_flood_the_message() -> None:
    assert len(str(refusal([{"role": "x" * 9999, "content": "x"}]))) < 400
    assert len(str(refusal({f"key{n}": n for n in range(9999)}))) < 400


@pytest.mark.parametrize("text", ["\ufffd", "\U0001f642", "a\u200bb", "\ufeffa", "\x1b[0m"])
def test_odd_but_valid_text_passes(text: str) -> None:
    assert parse(reply(text)) == [("user", "hi"), ("assistant", text)]
    assert parse(text) == [(None, text)]


def test_a_message_of_pictures_only_is_left_out_unless_it_is_judged() -> None:
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    seen = {"role": "user", "content": [picture]}
    reply = {"role": "assistant", "content": "I cannot see it"}
    conversation = parse_conversation([seen, reply], DEFAULT_TEMPLATE)
    assert [message.role for message in conversation.messages] == ["assistant"]
    with pytest.raises(ConversationError, match="the text is empty"):
        parse_conversation([seen, {"role": "assistant", "content": [picture]}], DEFAULT_TEMPLATE)
