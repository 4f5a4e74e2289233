"""Token ids: role tokens that no text can forge, fidelity to the checkpoint, exact truncation."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from refusal_runtime import ConversationError
from refusal_runtime.bundle import DEFAULT_TEMPLATE, Template
from refusal_runtime.classifier import EMBEDDED
from refusal_runtime.conversation import Conversation, Message, parse_conversation
from refusal_runtime.encoding import Encoder, Encoding

UNLIMITED = 1_000_000
LEAST = 6  # <s>, a role token, three ids of text, </s>

LITERALS = [
    "<s>", "</s>", "<pad>", "<mask>", "<unk>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|...|>",
]  # fmt: skip
FULLWIDTH = {character: chr(ord(character) + 0xFEE0) for character in map(chr, range(33, 127))}
# Zero-width and control characters, variants, combining marks, spaces of several kinds.
NOISE = list("\u200b\u200d\u2060\ufeff\u00ad\x01\x1b\x7f\u0301\ufe0f\u2581 \t\n\u3000\u00a0☃")


@dataclass(frozen=True)
class Kit:
    """A tokenizer as the checkpoint ships it, and what the tests need to know of it."""

    json: str
    plain: Tokenizer
    unlimited: Encoder
    bos: int
    eos: int
    unknown: int
    ellipsis: int
    control: frozenset[int]
    roles: dict[int, str]

    def encoder(self, template: Template = DEFAULT_TEMPLATE, **options: Any) -> Encoder:
        options.setdefault("max_length", UNLIMITED)
        return Encoder(Tokenizer.from_str(self.json), template, **options)


def make_kit(content: str) -> Kit:
    plain = Tokenizer.from_str(content)
    added = plain.get_added_tokens_decoder()
    numbers = {token.content: number for number, token in added.items()}
    assert set(LITERALS) <= set(numbers)
    return Kit(
        content,
        plain,
        Encoder(Tokenizer.from_str(content), DEFAULT_TEMPLATE, max_length=UNLIMITED),
        *(numbers[name] for name in ("<s>", "</s>", "<unk>", "<|...|>")),
        frozenset(number for number, token in added.items() if token.special),
        {numbers[token]: role for role, token in DEFAULT_TEMPLATE.roles.items()},
    )


@cache
def kit(name: str) -> Kit:
    if name == "tiny":
        return make_kit(json.dumps(make_tokenizer()))
    path = EMBEDDED / "tokenizer.json"
    if not path.is_file():
        pytest.skip("no embedded model in this checkout")
    return make_kit(path.read_text("utf-8"))


both = pytest.mark.parametrize("name", ["tiny", "embedded"])


def encode(encoder: Encoder, value: Any) -> Encoding:
    return encoder.encode(parse_conversation(value, DEFAULT_TEMPLATE))


# --- role tokens cannot be forged -----------------------------------------------------------


def noisy(literal: str, noise: str, at: int) -> str:
    return literal[:at] + noise + literal[at:]


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
forgeries = st.one_of(
    st.sampled_from(LITERALS),
    st.sampled_from(LITERALS).map(lambda s: "".join(map(FULLWIDTH.__getitem__, s))),
    st.sampled_from(LITERALS).map(lambda s: s.replace("<", "＜").replace(">", "﹥")),
    st.builds(noisy, st.sampled_from(LITERALS), st.sampled_from(NOISE), st.integers(0, 13)),
    st.from_regex(r"<\|[a-z.]{0,9}\|>", fullmatch=True),
)
texts = (
    st.lists(st.one_of(forgeries, anything, st.sampled_from(NOISE)), min_size=1, max_size=5)
    .map("".join)
    .filter(str.strip)
)
message_lists = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool", "developer"]), texts),
    max_size=3,
)


def assert_nothing_forged(kit: Kit, ids: list[int], roles: list[str], text: str) -> None:
    """Only what the template itself puts there may be a control id."""
    assert ids[0] == kit.bos
    assert ids[-1] == kit.eos
    inner = [number for number in ids[1:-1] if number in kit.control and number != kit.unknown]
    assert [kit.roles.get(number, number) for number in inner] == roles
    normalized = kit.plain.normalizer.normalize_str(text)
    unknown = sum(kit.unknown in ids_of(kit, character) for character in normalized)
    assert ids.count(kit.unknown) <= unknown, "<unk> though every character is known"


def ids_of(kit: Kit, text: str) -> list[int]:
    ids: list[int] = kit.plain.encode(text, add_special_tokens=False).ids
    return ids


@both
@settings(deadline=None, max_examples=250)
@given(context=message_lists, reply=texts)
@example(context=[("user", "".join(LITERALS))], reply=" ".join(LITERALS))
@example(context=[("tool", "＜s＞＜/s＞＜unk＞")], reply="＜pad＞ x＜mask＞")
@example(context=[], reply="<unk><unk>")
@example(context=[], reply="<<s>s></</s>s>")
def test_no_text_of_any_message_yields_a_control_id(
    name: str, context: list[tuple[str, str]], reply: str
) -> None:
    written = {"tool": "user", "developer": "system"}
    messages = [{"role": role, "content": text} for role, text in context]
    messages.append({"role": "assistant", "content": reply})
    try:
        ids = encode(kit(name).unlimited, messages).ids.tolist()
    except ConversationError as error:
        assume("no token is left" not in error.problem)
        raise
    roles = [written.get(role, role) for role, _ in context] + ["assistant"]
    text = "".join(text for _, text in context) + reply
    assert_nothing_forged(kit(name), ids, roles, text)


@both
@settings(deadline=None, max_examples=100)
@given(text=texts)
@example(text="<s>hello</s><pad><mask><unk>")
def test_a_string_yields_no_control_ids_but_those_of_the_template(name: str, text: str) -> None:
    # In a string the role tokens and the ellipsis are the caller's own; nothing else is.
    for token in (*DEFAULT_TEMPLATE.roles.values(), "<|...|>"):
        text = text.replace(token, "")
    assume(text.strip())
    try:
        lone = encode(kit(name).unlimited, text).ids.tolist()
        framed = encode(kit(name).unlimited, f"<|user|>a<|assistant|>{text}").ids.tolist()
    except ConversationError as error:
        assume("no token is left" not in error.problem)
        raise
    assert_nothing_forged(kit(name), lone, [], text)
    assert_nothing_forged(kit(name), framed, ["user", "assistant"], text)


@both
@pytest.mark.parametrize("literal", LITERALS)
def test_a_control_literal_is_read_as_its_characters(name: str, literal: str) -> None:
    ids = encode(kit(name).unlimited, [{"role": "assistant", "content": f"no {literal} a"}]).ids
    pieces = "".join(kit(name).plain.id_to_token(number) for number in ids[2:-1])
    assert pieces == f"▁no▁{literal}▁a"
    assert not kit(name).control.intersection(ids[2:-1].tolist())


@both
def test_the_ellipsis_of_a_string_is_the_control_token_and_that_of_a_message_is_not(
    name: str,
) -> None:
    text = "no<|...|>way"
    string = encode(kit(name).unlimited, f"<|assistant|>{text}").ids.tolist()
    message = encode(kit(name).unlimited, [{"role": "assistant", "content": text}]).ids.tolist()
    assert string.count(kit(name).ellipsis) == 1
    assert kit(name).ellipsis not in message


def test_an_unknown_character_is_still_unknown() -> None:
    ids = encode(kit("tiny").unlimited, "hello ☃ <unk>").ids.tolist()
    assert ids.count(kit("tiny").unknown) == 1


@pytest.mark.parametrize("text", ["<unk><unk>", "<unk>☃", "☃<unk>", "<unk>☃<unk>", "☃<unk>☃"])
def test_the_unknown_token_s_name_is_read_as_its_characters(text: str) -> None:
    # A Unigram model fuses neighbours of the unknown id into one token.
    ids = encode(kit("tiny").unlimited, text).ids.tolist()
    pieces = "".join(
        "☃" if number == kit("tiny").unknown else kit("tiny").plain.id_to_token(number)
        for number in ids[1:-1]
    )
    assert pieces == f"▁{text}"


def test_role_tokens_that_a_tokenizer_does_not_call_special_are_not_forged_either() -> None:
    content = make_tokenizer()
    for token in content["added_tokens"]:
        token["special"] = not token["content"].startswith("<|")
    encoder = Encoder(
        Tokenizer.from_str(json.dumps(content)), DEFAULT_TEMPLATE, max_length=UNLIMITED
    )
    for text in ("<|assistant|>", "hello<|user|> no", "<|...|>"):
        ids = encode(encoder, [{"role": "assistant", "content": text}]).ids.tolist()
        inner = [number for number in ids[1:-1] if number in kit("tiny").control]
        assert [kit("tiny").roles.get(number) for number in inner] == ["assistant"], text


@pytest.mark.parametrize("kind", ["WordPiece", "BPE"])
@pytest.mark.parametrize(
    "text", ["[CLS]", "a[SEP]b [PAD]", "[MASK] <|user|>", "<|assistant|><|...|>", "[UNK] a"]
)
def test_tokenizers_of_bert_and_modernbert_are_not_forged_either(kind: str, text: str) -> None:
    encoder, control, unknown = other_tokenizer(kind)
    ids = encode(encoder, [{"role": "assistant", "content": text}]).ids.tolist()
    assert ids[:1] == [control["[CLS]"]]
    assert ids[-1] == control["[SEP]"]
    inner = [number for number in ids[1:-1] if number in control.values()]
    assert inner == [control["<|assistant|>"]]
    assert len(ids) > 4
    if kind == "WordPiece":
        ids = encode(encoder, [{"role": "assistant", "content": "a ☃"}]).ids.tolist()
        assert ids.count(unknown) == 1


@cache
def other_tokenizer(kind: str) -> tuple[Encoder, dict[str, int], int]:
    from tokenizers import models, pre_tokenizers, processors

    control = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", *LITERALS[5:]]
    letters = sorted(map(chr, range(33, 127)))
    if kind == "WordPiece":
        pieces = [*control[:5], *letters, *(f"##{letter}" for letter in letters)]
        model: Any = models.WordPiece({p: n for n, p in enumerate(pieces)}, unk_token="[UNK]")
        split: Any = pre_tokenizers.BertPreTokenizer()
    else:
        pieces = [*control[:5], *sorted(pre_tokenizers.ByteLevel.alphabet())]
        model = models.BPE({p: n for n, p in enumerate(pieces)}, [])
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(control)
    numbers = {token: tokenizer.token_to_id(token) for token in control}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, numbers[t]) for t in ("[CLS]", "[SEP]")]
    )
    unknown = numbers["[UNK]"] if kind == "BPE" else numbers.pop("[UNK]")
    return Encoder(tokenizer, DEFAULT_TEMPLATE, max_length=UNLIMITED), numbers, unknown


# --- fidelity to the checkpoint's tokenizer -------------------------------------------------


def written_out(row: dict[str, Any]) -> str:
    """The role-formatted string of a row of ordinary text, written independently."""
    if row.get("text"):
        return str(row["text"])
    names = {"system": "system", "user": "user", "human": "user", "developer": "system",
             "tool": "user", "assistant": "assistant", "gpt": "assistant"}  # fmt: skip
    text = ""
    for message in row.get("messages") or row["conversations"]:
        content = message.get("content") or message.get("value") or message.get("refusal")
        if content is None:
            assert message["tool_calls"]
            continue
        if isinstance(content, list):
            content = "\n".join(p["text"] for p in content if p["type"] == "text")
        text += f"<|{names[message.get('role') or message['from']]}|>{content}"
    return text


def is_ordinary(row: dict[str, Any]) -> bool:
    text = unicodedata.normalize("NFKC", json.dumps(row.get("messages", ""), ensure_ascii=False))
    return not any(literal in text for literal in LITERALS)


def assert_same_ids(kit: Kit, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        encoding = encode(kit.unlimited, row)
        assert encoding.ids.tolist() == kit.plain.encode(written_out(row)).ids, row["id"]
        assert not encoding.truncated


@both
def test_ids_of_the_examples_are_the_checkpoint_s_own(
    name: str, example_rows: list[dict[str, Any]]
) -> None:
    assert all(map(is_ordinary, example_rows))
    assert_same_ids(kit(name), example_rows)


@both
def test_ids_of_the_development_set_are_the_checkpoint_s_own(
    name: str, dev_rows: list[dict[str, Any]]
) -> None:
    sample = dev_rows[::5]
    ordinary = list(filter(is_ordinary, sample))
    assert len(ordinary) > 0.99 * len(sample) > 100
    assert_same_ids(kit(name), ordinary)


@both
@pytest.mark.parametrize(
    "text",
    [
        "hello", " hello ", "hello\n\nworld ", "<|assistant|>no", "hello <|assistant|>no",
        "<|user|> a \n<|assistant|>  no\n", "<|user|><|assistant|>no", "  <|assistant|>no",
        "<|user|>a<|...|>b<|assistant|>no<|...|>sorry", "<|assistant|>désolé 不能 ☃ １２",
        "<|system|>a\n<|user|>b\n<|assistant|>c\n<|user|>d\n<|assistant|>e",
    ],
)  # fmt: skip
def test_ids_of_a_string_are_the_checkpoint_s_own(name: str, text: str) -> None:
    encoding = encode(kit(name).unlimited, text)
    assert encoding.ids.tolist() == kit(name).plain.encode(text).ids


def test_newlines_of_the_template_reach_the_ids() -> None:
    template = Template(DEFAULT_TEMPLATE.roles, "<|...|>", newline_after_role=True)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "no"}]
    encoding = kit("tiny").encoder(template).encode(parse_conversation(messages, template))
    expected = kit("tiny").plain.encode("<|user|>\nhello\n<|assistant|>\nno").ids
    assert encoding.ids.tolist() == expected
    assert expected != kit("tiny").plain.encode("<|user|>hello<|assistant|>no").ids


def test_the_tokenizer_s_own_truncation_and_padding_are_ignored() -> None:
    tokenizer = Tokenizer.from_str(kit("tiny").json)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64, pad_id=1, pad_token="<pad>")
    encoder = Encoder(Tokenizer.from_str(tokenizer.to_str()), DEFAULT_TEMPLATE, max_length=999)
    for text in ("no", "a " * 50):
        assert encode(encoder, text).ids.tolist() == kit("tiny").plain.encode(text).ids


def test_ids_are_64_bit_integers() -> None:
    assert encode(kit("tiny").unlimited, "no").ids.dtype.str.endswith("i8")


def test_a_reply_that_normalization_removes_is_an_error() -> None:
    content = make_tokenizer()
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "#"}, "content": ""}
    encoder = Encoder(Tokenizer.from_str(json.dumps(content)), DEFAULT_TEMPLATE, max_length=99)
    parsed = parse_conversation("<|user|>a<|assistant|>##", DEFAULT_TEMPLATE)
    with pytest.raises(ConversationError, match=r"^row 7, .*no token is left.*; give a reply"):
        encoder.encode(parsed, row=7)
    assert len(encode(encoder, "<|user|>##<|assistant|>a").ids) == 5


# --- truncation -----------------------------------------------------------------------------

# Each of these words is one token of the tiny tokenizer.
WORDS = ["a", "I", "you", "can", "not", "cannot", "sorry", "help", "with", "that", "is", "of", "no"]


def talk(*turns: tuple[str, int]) -> Conversation:
    """A conversation of messages with so many tokens, whose words tell positions apart."""
    return Conversation(
        tuple(
            Message(role, (" ".join(WORDS[(n * n + n // 7) % len(WORDS)] for n in range(length)),))
            for role, length in turns
        )
    )


turn_lists = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.integers(1, 60)), max_size=5
)


@dataclass
class Shortened:
    """A truncated conversation taken apart: what is left of each message, None if nothing."""

    ids: list[int]
    truncated: bool
    full: list[list[int]]
    left: list[list[int] | None]

    @property
    def cut(self) -> list[int]:
        """Which messages lost something but not everything."""
        pairs = enumerate(zip(self.full, self.left, strict=True))
        return [at for at, (full, left) in pairs if left is not None and left != full]


def shorten(turns: list[tuple[str, int]], budget: int, *, ellipsis: bool = True) -> Shortened:
    """Encodes within a budget and checks what has to hold of every truncation."""
    tiny = kit("tiny")
    template = DEFAULT_TEMPLATE if ellipsis else Template(DEFAULT_TEMPLATE.roles, None)
    encoding = tiny.encoder(template, max_length=budget).encode(talk(*turns))
    ids = encoding.ids.tolist()
    assert (ids[0], ids[-1]) == (tiny.bos, tiny.eos)
    full = [ids_of(tiny, message.parts[0]) for message in talk(*turns).messages]
    assert [len(body) for body in full] == [length for _, length in turns]
    pieces: list[tuple[str, list[int]]] = []
    for number in ids[1:-1]:
        if number in tiny.roles:
            pieces.append((tiny.roles[number], []))
        else:
            assert pieces, "text before the first role token"
            pieces[-1][1].append(number)
    left: list[list[int] | None] = [None] * len(turns)
    at = len(turns)
    for role, body in reversed(pieces):
        at -= 1
        while at >= 0 and not (role == turns[at][0] and is_left_of(body, full[at], ellipsis)):
            at -= 1
        assert at >= 0, f"not a message, nor head and tail of one: {role} {body}"
        left[at] = body
    assert left[-1] is not None, "the judged message is gone"
    return Shortened(ids, encoding.truncated, full, left)


def is_left_of(body: list[int], full: list[int], ellipsis: bool) -> bool:
    """Whether `body` is `full`, or its head and tail of about equal length."""
    if body == full:
        return True
    mark = [kit("tiny").ellipsis] if ellipsis else []
    text = len(body) - len(mark)
    head, tail = text - text // 2, text // 2
    return text >= 2 and len(full) > text and body == [*full[:head], *mark, *full[-tail:]]


budgets = st.integers(LEAST, 100)


@settings(deadline=None, max_examples=300)
@given(turns=turn_lists, reply=st.integers(1, 120), budget=budgets, ellipsis=st.booleans())
@example(turns=[("user", 60)], reply=60, budget=12, ellipsis=True)
@example(turns=[("user", 60)], reply=60, budget=LEAST, ellipsis=True)
def test_the_budget_is_exact(
    turns: list[tuple[str, int]], reply: int, budget: int, ellipsis: bool
) -> None:
    turns = [*turns, ("assistant", reply)]
    result = shorten(turns, budget, ellipsis=ellipsis)
    total = 2 + sum(1 + length for _, length in turns)
    assert len(result.ids) <= budget
    assert result.truncated == (total > budget)
    if total <= budget:
        assert result.left == result.full
    else:
        assert len(result.ids) < total
    if result.cut:
        assert len(result.ids) == budget


@settings(deadline=None, max_examples=300)
@given(turns=turn_lists, reply=st.integers(1, 120), budget=budgets)
@example(turns=[("assistant", 1), ("user", 60)], reply=60, budget=12)
def test_the_judged_message_gives_way_last(
    turns: list[tuple[str, int]], reply: int, budget: int
) -> None:
    turns = [*turns, ("assistant", reply)]
    result = shorten(turns, budget)
    judged = result.left[-1]
    assert judged is not None
    request = max((at for at, (role, _) in enumerate(turns) if role == "user"), default=None)
    older = [at for at in range(len(turns) - 1) if at != request]
    if judged != result.full[-1]:
        # All that may stand beside a shortened reply is a quarter of the request it answers.
        assert [at for at in older if result.left[at] is not None] == []
        assert len(judged) >= 0.75 * (budget - 3)
    if request is not None and request in result.cut:
        assert [at for at in older if result.left[at] is not None] == []
    if request is not None and budget >= 24:
        left = result.left[request]
        assert left is not None
        assert len(left) >= min(len(result.full[request]), (budget - 3) // 4 - 1)


@settings(deadline=None, max_examples=300)
@given(turns=turn_lists, reply=st.integers(1, 30), budget=budgets)
@example(turns=[("system", 15), ("system", 24), ("system", 24)], reply=1, budget=69)
def test_older_turns_give_way_oldest_first_and_the_longest_most(
    turns: list[tuple[str, int]], reply: int, budget: int
) -> None:
    turns = [*turns, ("assistant", reply)]
    result = shorten(turns, budget)
    request = max((at for at, (role, _) in enumerate(turns) if role == "user"), default=None)
    older = [at for at in range(len(turns) - 1) if at != request]
    # Equal messages cannot be told apart in the result, so ask for how many are left.
    said = [at for at in older if turns[at][0] != "system"]
    prompts = [at for at in older if turns[at][0] == "system"]
    if len({turns[at] for at in older}) == len(older):
        survivors = [at for at in said if result.left[at] is not None]
        assert survivors == said[len(said) - len(survivors) :]
        if survivors:
            assert all(result.left[at] is not None for at in prompts)
    bodies = {at: left for at in older if (left := result.left[at]) is not None}
    cut = [len(bodies[at]) for at in bodies if at in result.cut]
    if cut:
        assert max(cut) - min(cut) <= 1
        # A token that cannot be shared leaves one of the longest whole.
        assert max(map(len, bodies.values())) - min(cut) <= 1


def test_head_and_tail_in_numbers() -> None:
    # 20 = <s> <|user|> 3 <|assistant|> 7 <|...|> 6 </s>: a quarter of 17 goes to the request.
    result = shorten([("system", 50), ("user", 3), ("assistant", 50)], 20)
    full, ellipsis = result.full[2], kit("tiny").ellipsis
    assert result.left == [None, result.full[1], [*full[:6], ellipsis, *full[-6:]]]
    assert len(result.ids) == 20


def test_a_short_request_is_whole_beside_a_long_reply() -> None:
    result = shorten([("user", 5), ("assistant", 100)], 32)
    assert result.cut == [1]


def test_a_long_request_yields_to_a_short_reply() -> None:
    result = shorten([("user", 100), ("assistant", 5)], 32)
    assert result.cut == [0]


def test_only_the_older_turn_is_cut_when_that_suffices() -> None:
    turns = [("system", 8), ("user", 40), ("assistant", 8), ("user", 8), ("assistant", 8)]
    result = shorten(turns, 64)
    assert result.cut == [1]
    assert None not in result.left


def test_the_system_prompt_outlives_older_turns() -> None:
    result = shorten([("system", 10), ("user", 30), ("user", 8), ("assistant", 8)], 36)
    assert [left is not None for left in result.left] == [True, False, True, True]


def test_a_string_without_role_tokens_keeps_head_and_tail() -> None:
    tiny = kit("tiny")
    conversation = Conversation((Message(None, talk(("user", 50)).messages[0].parts),))
    encoding = tiny.encoder(max_length=12).encode(conversation)
    full = ids_of(tiny, conversation.messages[0].parts[0])
    expected = [tiny.bos, *full[:5], tiny.ellipsis, *full[-4:], tiny.eos]
    assert encoding.ids.tolist() == expected
    assert encoding.truncated


@both
@settings(deadline=None, max_examples=60)
@given(context=message_lists, reply=texts, budget=st.integers(LEAST, 40))
def test_arbitrary_text_stays_within_the_budget(
    name: str, context: list[tuple[str, str]], reply: str, budget: int
) -> None:
    messages = [{"role": role, "content": text} for role, text in context]
    messages.append({"role": "assistant", "content": reply})
    try:
        full = encode(kit(name).unlimited, messages)
    except ConversationError as error:
        assume("no token is left" not in error.problem)
        raise
    encoding = encode(bounded(name, budget), messages)
    ids = encoding.ids.tolist()
    assert len(ids) <= budget
    assert encoding.truncated == (len(full.ids) > budget)
    assert (ids[0], ids[-1]) == (kit(name).bos, kit(name).eos)
    judged = next(role for n in reversed(ids) if (role := kit(name).roles.get(n)))
    assert judged == "assistant"
    assert ids[-2] == full.ids[-2], "the tail of the reply"


@cache
def bounded(name: str, budget: int) -> Encoder:
    return kit(name).encoder(max_length=budget)


@settings(deadline=None, max_examples=100)
@given(turns=turn_lists, reply=st.integers(1, 60), budget=budgets)
def test_head_keeps_the_first_tokens_as_a_pipeline_does(
    turns: list[tuple[str, int]], reply: int, budget: int
) -> None:
    conversation = talk(*turns, ("assistant", reply))
    encoding = kit("tiny").encoder(max_length=budget, truncation="head").encode(conversation)
    reference = Tokenizer.from_str(kit("tiny").json)
    full = reference.encode(string_of(conversation)).ids
    reference.enable_truncation(budget)
    assert encoding.ids.tolist() == reference.encode(string_of(conversation)).ids
    assert encoding.truncated == (len(full) > budget)
    if encoding.truncated:
        assert encoding.ids.tolist() == [*full[: budget - 1], kit("tiny").eos]


def string_of(conversation: Conversation) -> str:
    return "".join(f"<|{message.role}|>{message.parts[0]}" for message in conversation.messages)


def test_error_names_row_and_numbers() -> None:
    # <s> <|user|> 10 <|assistant|> 10 </s>
    conversation = talk(("user", 10), ("assistant", 10))
    encoder = kit("tiny").encoder(max_length=23, truncation="error")
    with pytest.raises(ConversationError) as caught:
        encoder.encode(conversation, row=4)
    assert caught.value.row == 4
    assert "24 tokens exceed the limit of 23" in caught.value.problem
    assert "truncation='middle'" in caught.value.remedy
    exact = kit("tiny").encoder(max_length=24, truncation="error").encode(conversation)
    assert len(exact.ids) == 24
    assert not exact.truncated


@pytest.mark.parametrize("length", [LEAST - 1, 1, 0, -1])
def test_a_budget_without_room_for_text_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"at least {LEAST} tokens, found {length}$"):
        kit("tiny").encoder(max_length=length)


def test_the_least_budget_has_room_for_head_and_tail() -> None:
    result = shorten([("user", 9), ("assistant", 9)], LEAST)
    full = result.full[1]
    assert result.left == [None, [full[0], kit("tiny").ellipsis, full[-1]]]


def test_an_unknown_truncation_is_refused() -> None:
    with pytest.raises(ValueError, match="'middle', 'head' or 'error', found 'tail'"):
        kit("tiny").encoder(truncation="tail")
