"""Input formats row by row, output fields, CSV and table output."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refusal_runtime import ConversationError, Verdict
from refusal_runtime.rows import (
    ArrayWriter,
    CsvWriter,
    InputError,
    Row,
    Writer,
    dump_json,
    read_rows,
    result_fields,
)
from refusal_runtime.table import TableWriter

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "no"}]
VERDICT = Verdict("Refusal", 0.9, 0.9, True, 7, False, (0.1, 2.3))


def read(path: Path, content: str | bytes) -> list[Row]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(str(path)))


def lines(*values: Any) -> str:
    """JSON Lines; a string is put in as it stands."""
    return "".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values)


# --- JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [{"messages": MESSAGES, "id": 1}, {"conversations": SHAREGPT}, {"text": "a"}, MESSAGES]
)
def test_every_row_shape_comes_through_in_json_lines(tmp_path: Path, value: Any) -> None:
    rows = read(tmp_path / "a.jsonl", lines(value, value))
    assert [(row.line, row.value, row.error) for row in rows] == [
        (1, value, None),
        (2, value, None),
    ]
    assert rows[0].fields == (value if isinstance(value, dict) else {})


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_last_line_may_lack_its_newline(tmp_path: Path, end: str) -> None:
    rows = read(tmp_path / "a.jsonl", '{"text": "a"}\r\n{"text": "b"}' + end)
    assert [row.value for row in rows] == [{"text": "a"}, {"text": "b"}]


def test_no_input_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", "") == []
    assert read(tmp_path / "b.jsonl", "[]") == []


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    for content in (lines({"text": "é"}), json.dumps([{"text": "é"}])):
        assert [r.value for r in read(tmp_path / "a.jsonl", mark + content.encode())] == [
            {"text": "é"}
        ]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("value", [[{"text": "a"}, {"text": "b"}], [MESSAGES, MESSAGES], ["a"]])
def test_one_json_array_is_many_rows(tmp_path: Path, value: list[Any], indent: int | None) -> None:
    rows = read(tmp_path / "a.json", json.dumps(value, indent=indent) + "\n")
    assert [(row.line, row.value) for row in rows] == list(enumerate(value, 1))


def test_a_lone_line_with_a_bare_list_of_messages_is_one_row(tmp_path: Path) -> None:
    for messages in (MESSAGES, SHAREGPT):
        for end in ("", "\n", "\n\n"):
            rows = read(tmp_path / "a.jsonl", json.dumps(messages) + end)
            assert rows[0].value == messages
            assert [row.error for row in rows[1:]] == ["empty line"] * (len(end) - 1)


BROKEN = [
    pytest.param(b'{"text": "a', "not valid JSON", id="cut"),
    pytest.param(b"", "empty line", id="blank"),
    pytest.param(b" \t", "empty line", id="white"),
    pytest.param(b'{"text": "\xff\xfe"}', "not valid JSON", id="invalid-utf8"),
    pytest.param(b"{" * 3, "not valid JSON", id="braces"),
    pytest.param(b"[" * 100_000, "nested too deeply", id="deep"),
    pytest.param(b'[{"role": "us', "not valid JSON", id="cut-list"),
    pytest.param(b"\x00\x00\x00", "not valid JSON", id="nul-bytes"),
    pytest.param(b"1" * 5000, "not valid JSON", id="huge-number"),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_broken_line_is_one_row_wherever_it_stands(
    tmp_path: Path, line: bytes, problem: str, position: int
) -> None:
    content = [b'{"text": "a"}', b'{"text": "b"}']
    content.insert(position, line)
    rows = read(tmp_path / "a.jsonl", b"\n".join(content) + b"\n")
    assert [row.line for row in rows] == [1, 2, 3]
    assert [row.error is not None for row in rows] == [i == position for i in range(3)]
    assert problem in str(rows[position].error)


def test_an_empty_list_or_a_lone_string_first_does_not_swallow_the_rest(tmp_path: Path) -> None:
    for first in ([], ["a"]):
        rows = read(tmp_path / "a.jsonl", lines(first, "", {"text": "b"}))
        assert [row.value for row in rows] == [first, None, {"text": "b"}]


def test_a_broken_array_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="begins like a JSON array but is not one"):
        read(tmp_path / "a.json", '[\n  {"text": "a"},\n  {"text": \n]')


def test_gz_is_unpacked_and_truncation_is_an_error(tmp_path: Path) -> None:
    packed = gzip.compress(lines(*({"text": f"{i} {i**9}"} for i in range(3000))).encode())
    assert len(read(tmp_path / "a.jsonl.gz", packed)) == 3000
    with pytest.raises(InputError, match=r"a\.jsonl\.gz cannot be read"):
        read(tmp_path / "a.jsonl.gz", packed[: len(packed) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "a.jsonl.gz", b"no gzip")


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*({"text": str(i)} for i in range(100_000))))
    rows = read_rows(str(path))
    assert next(rows).value == {"text": "0"}
    path.write_text("")  # what has not been read yet is gone
    assert len(list(rows)) < 50_000


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    for name in ("absent.jsonl", "absent.csv", "absent.parquet", "absent.jsonl.gz"):
        with pytest.raises(InputError, match=name):
            list(read_rows(str(tmp_path / name)))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_rows(str(tmp_path)))


# --- tables ---------------------------------------------------------------------------------


def to_csv(*records: tuple[str, ...]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(records)
    return text.getvalue()


def test_csv_with_text(tmp_path: Path) -> None:
    rows = read(
        tmp_path / "a.csv", to_csv(("id", "text"), ("x", 'two\nlines, "quoted"'), ("y", ""))
    )
    assert [(row.line, row.value, row.fields["id"]) for row in rows] == [
        (1, {"text": 'two\nlines, "quoted"'}, "x"),
        (2, {"text": ""}, "y"),
    ]
    assert read(tmp_path / "b.csv", "\ufefftext\na\n")[0].value == {"text": "a"}
    packed = gzip.compress(b"text\na\n")
    assert read(tmp_path / "c.csv.gz", packed)[0].value == {"text": "a"}


def test_csv_with_json_columns(tmp_path: Path) -> None:
    table = to_csv(("id", "messages"), ("1", json.dumps(MESSAGES)), ("2", "[{"), ("3", "[]"))
    rows = read(tmp_path / "a.csv", table)
    assert [row.value for row in rows] == [{"messages": MESSAGES}, None, {"messages": []}]
    assert [row.fields["id"] for row in rows] == ["1", "2", "3"]
    assert "column 'messages' is not valid JSON" in str(rows[1].error)
    table = to_csv(("conversations",), (json.dumps(SHAREGPT),))
    assert read(tmp_path / "b.csv", table)[0].value == {"conversations": SHAREGPT}


def test_an_empty_cell_gives_way_to_the_next_column(tmp_path: Path) -> None:
    table = to_csv(("messages", "text"), (json.dumps(MESSAGES), ""), ("", "plain"))
    first, second = read(tmp_path / "a.csv", table)
    assert first.value == {"messages": MESSAGES}
    # CSV knows no null: an empty cell is an absent value.
    assert second.value == {"text": "plain"}


def test_csv_that_is_no_utf8_fails_row_by_row(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", b"text\nfine\n\xff\xfe\nfine\n")
    assert [row.value["text"] for row in rows] == ["fine", "\udcff\udcfe", "fine"]


@pytest.mark.parametrize("nested", [True, False])
def test_parquet(tmp_path: Path, nested: bool) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for key, value in (("messages", MESSAGES), ("conversations", SHAREGPT), ("text", "hi")):
        cell = value if nested or key == "text" else json.dumps(value)
        path = tmp_path / f"{key}.parquet"
        pq.write_table(pa.table({"id": list(range(600)), key: [cell] * 600}), path)
        rows = list(read_rows(str(path)))
        assert [row.line for row in rows] == list(range(1, 601))
        assert all(row.value == {key: value} for row in rows)
        assert rows[-1].fields["id"] == 599


def test_what_is_no_parquet_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        read(tmp_path / "a.parquet", "no parquet")


# --- output ---------------------------------------------------------------------------------


def test_result_fields_of_verdicts_and_errors() -> None:
    row = Row(4, None, {"id": "x", "source": "s", "text": "hi"})
    result = {"id": "x", "label": "Refusal", "score": 0.9, "refusal_probability": 0.9,
              "tokens": 7, "truncated": False}  # fmt: skip
    assert result_fields(row, VERDICT, keep=False, file=None) == result
    assert result_fields(row, VERDICT, keep=True, file=None) == {**row.fields, **result}
    assert result_fields(row, VERDICT, keep=False, file="a")["file"] == "a"
    error = ConversationError("found null", "give text", place="text")
    assert result_fields(row, error, keep=False, file=None) == {
        "id": "x", "line": 4, "error": "text: found null; give text",
    }  # fmt: skip
    assert result_fields(Row(9, None), "bad", keep=True, file=None) == {
        "id": None, "line": 9, "error": "bad",
    }  # fmt: skip


def test_a_kept_field_cannot_make_a_verdict_look_like_an_error() -> None:
    row = Row(1, {"text": "hi"}, {"text": "hi", "error": "old", "label": "mine", "line": 5})
    judged = result_fields(row, VERDICT, keep=True, file=None)
    assert judged["label"] == "Refusal"
    assert "error" not in judged
    failed = result_fields(row, "bad", keep=True, file=None)
    assert (failed["error"], failed["line"]) == ("bad", 1)


def test_json_output_is_one_line_of_valid_utf8() -> None:
    for text in ("né\u2028\n\r\0", "\ud800", "😀"):
        line = dump_json({"id": text})
        assert "\n" not in line
        assert json.loads(line.encode("utf-8")) == {"id": text}
    assert dump_json({"id": "né😀"}) == '{"id": "né😀"}'


def test_json_output_is_strict_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    row = next(_only('{"text": "hi", "weight": NaN, "cost": Infinity}'))
    json.loads(dump_json(result_fields(row, VERDICT, keep=True, file=None)), parse_constant=refuse)


def _only(line: str) -> Iterator[Row]:
    yield Row(1, json.loads(line), json.loads(line))


@pytest.mark.parametrize("depth", range(900, 1000, 9))
def test_whatever_could_be_read_can_be_kept(tmp_path: Path, depth: int) -> None:
    deep = '{"text": "hi", "deep": ' + "[" * depth + "]" * depth + "}"
    for row in read(tmp_path / "a.jsonl", lines({"text": "a"}, deep)):
        dump_json(result_fields(row, row.error or VERDICT, keep=True, file=None))


def fields(number: int = 1, **more: Any) -> dict[str, Any]:
    return {
        **result_fields(Row(number, None, {"id": number}), VERDICT, keep=False, file=None),
        **more,
    }


def test_array_writer_makes_one_array() -> None:
    for count in (0, 1, 3):
        out = io.StringIO()
        writer = ArrayWriter(out)
        for number in range(count):
            writer.write(Row(number, None), fields(number))
        writer.close()
        assert json.loads(out.getvalue()) == [fields(number) for number in range(count)]


def test_csv_writer_makes_a_table_that_csv_reads_back() -> None:
    out = io.StringIO()
    writer: Writer = CsvWriter(out)
    writer.write(Row(1, None), fields(1, source="a,b\n", tags=["x"]))
    writer.write(Row(2, None), {"id": "2", "line": 2, "error": "bad", "source": "c"})
    writer.close()
    first, second = csv.DictReader(io.StringIO(out.getvalue()))
    assert (first["id"], first["label"], first["tokens"]) == ("1", "Refusal", "7")
    assert (first["source"], first["tags"], first["error"]) == ("a,b\n", '["x"]', "")
    assert float(first["score"]) == 0.9
    assert (second["id"], second["line"], second["error"], second["label"]) == ("2", "2", "bad", "")


def test_csv_writer_keeps_the_columns_of_later_rows_when_the_first_row_failed() -> None:
    out = io.StringIO()
    writer = CsvWriter(out)
    writer.write(Row(1, None), {"id": None, "line": 1, "error": "not valid JSON"})
    writer.write(Row(2, None), fields(2, source="kept"))
    writer.close()
    assert "kept" in out.getvalue()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def table(value: Any, **more: Any) -> str:
    out = io.StringIO()
    TableWriter(out).write(Row(3, value), fields(1, **more))
    header, rule, line = out.getvalue().splitlines()
    assert header.split() == ["id", "label", "score", "tokens", "reply"]
    assert set(rule) == {"-", " "}
    return line


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    "value",
    [
        "<|user|>hi<|assistant|>the reply",
        {"text": "<|user|>hi<|assistant|>the reply"},
        {"text": "<|user|>hi<|assistant|>the reply<|user|>thanks"},
        {"text": "the reply"},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "the reply"}]},
        {"messages": [{"role": "Assistant", "content": "the reply"}]},
        {"messages": [{"role": "model", "content": "the reply"}]},
        {"messages": [{"role": "assistant", "content": "the reply"}, MESSAGES[0]]},
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "the reply"}]}]},
        {"messages": [{"role": "assistant", "content": None, "refusal": "the reply"}]},
        {"conversations": [*SHAREGPT, {"from": "gpt", "value": "the reply"}]},
        {"messages": None, "text": "the reply"},
        [{"role": "assistant", "content": "the reply"}],
    ],
    ids=json.dumps,
)
def test_the_table_shows_the_reply_that_was_judged(value: Any) -> None:
    line = table(value)
    assert line.startswith("1")
    assert line.endswith("  the reply")
    assert line.split()[1:4] == ["Refusal", "0.900", "7"]


@pytest.mark.usefixtures("terminal")
def test_the_table_marks_truncation_errors_and_unnamed_rows() -> None:
    assert " 7+ " in table("x", truncated=True)
    assert table("x", id=None).startswith("line 3")
    out = io.StringIO()
    TableWriter(out).write(Row(8, None), {"id": None, "line": 8, "error": "not valid JSON"})
    assert out.getvalue().splitlines()[-1].split() == ["line", "8", "ERROR", "not", "valid", "JSON"]


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    "text",
    ["a" * 500, "抱歉，我不能帮助你。" * 50, "मुझे माफ़ करें " * 50, "a\tb\nc\x1b[31md" * 50, "é" * 500],
)
def test_the_table_fits_the_terminal_in_every_script(text: str) -> None:
    import unicodedata

    line = table(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in line)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in line)
    narrow = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in line)
    assert 60 < len(line) + wide - narrow <= 80
    assert line.endswith("…")


def test_kept_fields_that_clash_with_the_result_are_renamed() -> None:
    row = Row(1, "hello", {"id": "a", "label": "refusal", "language": "en"})
    fields = result_fields(row, "broken", keep=True, file=None)
    assert fields["input_label"] == "refusal"
    assert fields["language"] == "en"
    assert "label" not in fields
