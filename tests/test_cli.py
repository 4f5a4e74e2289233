"""The command `refusal` as its users meet it: a process, its streams and its exit status."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from conftest import EXAMPLES, edited

from refusal_runtime import RefusalClassifier, __version__
from refusal_runtime.classifier import EMBEDDED

COMMAND = [sys.executable, "-m", "refusal_runtime"]
MESSAGES = [{"role": "user", "content": "help"}, {"role": "assistant", "content": "I can not"}]
RESULT = ["id", "label", "score", "refusal_probability", "tokens", "truncated"]
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
    "COLUMNS": "100",
    "HF_HUB_OFFLINE": "1",
}


def run(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin, capture_output=True, env=ENVIRONMENT, timeout=100,
    )  # fmt: skip


Classify = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def classify(tiny_bundle: Path) -> Classify:
    """Runs `refusal classify` with the tiny bundle and checks the exit status."""

    def call(
        *arguments: str | Path, stdin: bytes = b"", status: int = 0
    ) -> subprocess.CompletedProcess[bytes]:
        done = run("classify", "--model", tiny_bundle, *arguments, stdin=stdin)
        assert done.returncode == status, done.stderr.decode()
        if status == 0:
            assert done.stderr == b""
        return done

    return call


def to_lines(values: Sequence[Any]) -> bytes:
    return b"".join(
        (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n"
        for value in values
    )


def from_lines(data: bytes) -> list[dict[str, Any]]:
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.decode("utf-8").split("\n")[:-1]]


# --- what comes out -------------------------------------------------------------------------


def test_one_line_for_each_line_in_order_with_the_library_s_verdicts(
    classify: Classify, tiny_bundle: Path
) -> None:
    rows = [json.loads(line) for line in EXAMPLES.read_text("utf-8").splitlines()]
    answers = from_lines(classify(EXAMPLES).stdout)
    assert len(answers) == len(rows) > 20
    verdicts = RefusalClassifier(tiny_bundle).stream(rows, on_error="raise")
    for row, verdict, answer in zip(rows, verdicts, answers, strict=True):
        assert answer == {
            "id": row.get("id"), "label": verdict.label, "score": verdict.score,
            "refusal_probability": verdict.refusal_probability, "tokens": verdict.tokens,
            "truncated": verdict.truncated,
        }  # fmt: skip
        assert list(answer) == RESULT


def test_every_row_shape_gives_the_same_verdict(classify: Classify) -> None:
    sharegpt = [{"from": "human", "value": "help"}, {"from": "gpt", "value": "I can not"}]
    rows = [
        {"id": "a", "messages": MESSAGES},
        {"id": "b", "conversations": sharegpt},
        {"id": "c", "text": "<|user|>help<|assistant|>I can not"},
        MESSAGES,
    ]
    answers = from_lines(classify(stdin=to_lines(rows)).stdout)
    assert [answer.pop("id") for answer in answers] == ["a", "b", "c", None]
    assert all(answer == answers[0] for answer in answers)
    assert from_lines(classify("-", stdin=to_lines(rows)).stdout)[0]["id"] == "a"


def test_text(classify: Classify) -> None:
    (answer,) = from_lines(classify("--text", "<|user|>help<|assistant|>I can not").stdout)
    (other,) = from_lines(classify(stdin=to_lines([MESSAGES])).stdout)
    assert answer == other
    (answer,) = from_lines(classify("--text", "", status=1).stdout)
    assert "empty" in answer["error"]


@pytest.mark.parametrize("kind", ["json", "json.gz", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_every_input_format(classify: Classify, tmp_path: Path, kind: str) -> None:
    rows = [{"id": str(number), "text": f"{'help ' * number}please"} for number in range(1, 6)]
    expected = from_lines(classify(stdin=to_lines(rows)).stdout)
    path = tmp_path / f"input.{kind}"
    base = kind.removesuffix(".gz")
    if base == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = {"json": json.dumps(rows, indent=1).encode(), "jsonl": to_lines(rows)}.get(base)
        if data is None:
            text = io.StringIO()
            writer = csv.DictWriter(text, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
            data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    assert from_lines(classify(path).stdout) == expected


def test_several_files_are_named_in_the_output(classify: Classify, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(to_lines([{"text": "help"}]))
    second.write_bytes(to_lines([b"{", {"text": "yes"}]))
    answers = from_lines(classify(first, second, status=1).stdout)
    assert [answer["file"] for answer in answers] == [str(first), str(second), str(second)]
    assert answers[1]["line"] == 1
    assert "error" in answers[1]


def test_keep_carries_the_input_s_fields(classify: Classify) -> None:
    row = {"id": 7, "messages": MESSAGES, "source": "s", "nested": {"é": [1]}}
    kept, broken = from_lines(
        classify("--keep", stdin=to_lines([row, {**row, "messages": []}]), status=1).stdout
    )
    assert {key: kept[key] for key in row} == row
    assert set(kept) == {*row, *RESULT}
    assert {key: broken[key] for key in row} == {**row, "messages": []}
    assert broken["line"] == 2


def test_every_output_format_says_the_same(classify: Classify) -> None:
    rows = to_lines([{"id": "x", "text": "help"}, b"{", {"text": "désolé, 抱歉"}])
    expected = from_lines(classify("--format", "jsonl", stdin=rows, status=1).stdout)
    assert json.loads(classify("--format", "json", stdin=rows, status=1).stdout) == expected
    text = classify("--format", "csv", stdin=rows, status=1).stdout.decode()
    for record, answer in zip(csv.DictReader(io.StringIO(text)), expected, strict=True):
        for key, value in answer.items():
            assert record[key] == ("" if value is None else str(value))
    table = classify("--format", "table", stdin=rows, status=1).stdout.decode().splitlines()
    assert len(table) == 5
    for line, answer in zip(table[2:], expected, strict=True):
        assert answer.get("label", "ERROR") in line
    assert table[-1].endswith("désolé, 抱歉")


@pytest.mark.parametrize(
    ("form", "expected"),
    [("jsonl", b""), ("json", b"[]\n"), ("csv", b""), ("table", None)],
)
def test_empty_input(classify: Classify, form: str, expected: bytes | None) -> None:
    out = classify("--format", form).stdout
    assert out == expected if expected is not None else out.startswith(b"id ")


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "table"])
def test_output_file(classify: Classify, tmp_path: Path, form: str) -> None:
    rows = to_lines([{"id": "né\ud800", "text": "help"}, {"id": "b", "text": "désolé"}])
    printed = classify("--format", form, stdin=rows).stdout
    out = tmp_path / "out"
    out.write_text("old content " * 1000)
    assert classify("--format", form, "-o", out, stdin=rows).stdout == b""
    assert out.read_bytes() == printed


def test_an_output_that_is_an_input_is_refused(classify: Classify, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = to_lines([{"text": "help"}])
    path.write_bytes(content)
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    for name in ("a.jsonl", "link", "hard"):
        done = classify(path, "-o", tmp_path / name, status=2)
        assert b"is also an input" in done.stderr
        assert path.read_bytes() == content


def test_options_reach_the_classifier(classify: Classify) -> None:
    rows = to_lines([{"text": " ".join(["help"] * 100)}])
    (whole,) = from_lines(classify(stdin=rows).stdout)
    (cut,) = from_lines(classify("--max-length", "20", stdin=rows).stdout)
    assert (whole["tokens"], cut["tokens"], cut["truncated"]) == (102, 20, True)
    (error,) = from_lines(
        classify("--max-length", "20", "--truncation", "error", stdin=rows, status=1).stdout
    )
    assert "20" in error["error"]
    (fp32,) = from_lines(classify("--variant", "fp32", "--threads", "1", stdin=rows).stdout)
    assert fp32["score"] != whole["score"]


def test_a_profile_can_be_named(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = edited(tiny_bundle, tmp_path / "b", profiles={"default": 48, "fast": 32})
    rows = to_lines([{"text": " ".join(["help"] * 100)}])
    found = []
    for asked in ((), ("--max-length", "fast"), ("--max-length", "128")):
        done = run("classify", "--model", folder, *asked, stdin=rows)
        found += [answer["tokens"] for answer in from_lines(done.stdout)]
    assert found == [48, 32, 102]
    wrong = run("classify", "--model", folder, "--max-length", "quick", stdin=rows)
    assert (wrong.returncode, b"it has 'default', 'fast'" in wrong.stderr) == (2, True)
    assert b"32 tokens" in run("info", "--model", folder).stdout


# --- exit status ----------------------------------------------------------------------------


def test_fail_on_refusal_goes_by_the_threshold(classify: Classify) -> None:
    rows = to_lines([{"text": "help"}, {"text": "désolé"}])
    chances = [answer["refusal_probability"] for answer in from_lines(classify(stdin=rows).stdout)]
    highest = max(chances)
    assert 0 < highest < 1
    below, above = str(highest - 1e-6), str(highest + 1e-6)
    classify("--threshold", below, stdin=rows)
    done = classify("--threshold", below, "--fail-on-refusal", stdin=rows, status=4)
    assert len(from_lines(done.stdout)) == 2
    classify("--threshold", above, "--fail-on-refusal", stdin=rows)
    # Rows that failed outrank refusals: nobody should take the run for complete.
    classify("--threshold", "0", "--fail-on-refusal", stdin=rows + b"{\n", status=1)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unknown",),
        ("classify", "--unknown"),
        ("classify", "--format", "xml"),
        ("classify", "--threads", "0"),
        ("classify", "--threads", "two"),
        ("classify", "--threshold", "1.5"),
        ("classify", "--threshold", "nan"),
        ("classify", "--threshold", "high_hopes"),
        ("classify", "--max-length", "100000"),
        ("classify", "--max-length", "0"),
        ("classify", "--max-length", "3"),
        ("classify", "--text", "a", "b.jsonl"),
        ("classify", "absent.jsonl"),
        ("classify", "."),
        ("classify", "-o", "absent/out.jsonl"),
    ],
    ids=" ".join,
)
def test_usage_errors(tiny_bundle: Path, arguments: tuple[str, ...]) -> None:
    model = ("--model", str(tiny_bundle)) if arguments[:1] == ("classify",) else ()
    done = run(*arguments, *model, stdin=to_lines([{"text": "help"}]))
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"refusal" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_missing_input_leaves_an_older_output_alone(classify: Classify, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    classify(tmp_path / "absent.jsonl", "-o", out, status=2)
    assert out.read_text() == "precious\n"


def test_a_truncated_gz_keeps_its_complete_lines(classify: Classify, tmp_path: Path) -> None:
    packed = gzip.compress(to_lines([{"id": n, "text": f"{n} {n**9}"} for n in range(2000)]))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    done = classify(path, status=2)
    assert b"cut.jsonl.gz cannot be read" in done.stderr
    answers = from_lines(done.stdout)
    assert [answer["id"] for answer in answers] == list(range(len(answers)))
    assert 100 < len(answers) < 2000


@pytest.mark.parametrize("command", ["classify", "info"])
def test_models_that_cannot_be_loaded(tiny_bundle: Path, tmp_path: Path, command: str) -> None:
    flipped = Path(shutil.copytree(tiny_bundle, tmp_path / "flipped"))
    graph = flipped / "onnx" / "model_int8.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    for arguments, problem in (
        (("--model", tmp_path / "absent"), "there is no folder"),
        (("--model", tmp_path), "not a model folder"),
        (("--model", flipped), "corrupted"),
        (("--model", tiny_bundle, "--variant", "int3"), "no variant 'int3'"),
        (("--model", "owner/name", "--local-files-only"), "local cache"),
        (("--model", "owner/name"), "HF_HUB_OFFLINE"),
    ):
        done = run(command, *arguments)
        assert (done.returncode, done.stdout) == (3, b"")
        assert done.stderr.startswith(b"refusal: ")
        assert problem in done.stderr.decode()
        assert len(done.stderr.splitlines()) == 1


# --- many rows ------------------------------------------------------------------------------

_GOOD = {"messages": MESSAGES, "padding": "x" * 3000}
BROKEN: list[tuple[bytes, str]] = [
    (b'{"text": "cut', "not valid JSON"),
    (b"", "empty line"),
    (b"   ", "empty line"),
    (b'{"text": "\xff"}', "not valid JSON"),
    (b"5", "found a number"),
    (b"null", "null"),
    (b'{"text": 5}', "text: found a number"),
    (b'{"messages": "hi"}', "messages: found"),
    (b'{"prompt": "hi"}', "keys: 'prompt'"),
    (b'{"messages": []}', "no messages"),
    (b'{"messages": [{"role": "user", "content": "hi"}]}', "no assistant message"),
    (b'{"messages": [{"role": "assistant", "content": ""}]}', "messages[0].content"),
    (b'{"messages": [{"role": "assistant", "content": null}]}', "content is null"),
    (b'{"messages": [{"role": "wizard", "content": "a"}]}', "unknown role 'wizard'"),
    (b'{"messages": [7]}', "messages[0]: found a number"),
    (b'{"text": "a\\ud800b"}', "lone surrogate U+D800 at position 1"),
    (b'{"text": "\xed\xa0\x80"}', "lone surrogate"),
    (b'{"text": "a\\u0000b"}', "NUL character at position 1"),
    (b'{"text": "a\0b"}', "not valid JSON"),
    (b"[" * 50_000 + b"]" * 50_000, "nested too deeply"),
    (b'[{"role": "assistant"', "not valid JSON"),
    (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
]


def write_rows(path: Path, count: int) -> dict[int, str]:
    """Writes rows of which 1 % are broken, the first among them; returns their problems."""
    problems = {}
    with path.open("wb") as out:
        for number in range(count):
            if number % 100:
                out.write(to_lines([{"id": number, **_GOOD}]))
            else:
                line, problem = BROKEN[number // 100 % len(BROKEN)]
                problems[number] = problem
                out.write(line + b"\n")
    return problems


# The peak is read inside the process: what its parent used before exec does not count.
PEAK = """
import sys
from refusal_runtime.cli import main
status = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
sys.exit(status)
"""


def test_10_000_rows_with_broken_ones_in_flat_memory(tiny_bundle: Path, tmp_path: Path) -> None:
    peaks = []
    for count in (1_000, 10_000):
        source, out = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.out"
        problems = write_rows(source, count)
        assert len(problems) == count // 100
        done = subprocess.run(
            [sys.executable, "-c", PEAK, "classify", "--model", tiny_bundle, source, "-o", out],
            capture_output=True, text=True, env=ENVIRONMENT, timeout=100,
        )  # fmt: skip
        complaint, *peak = done.stderr.splitlines()
        assert complaint == f"refusal: {len(problems)} row(s) could not be judged"
        assert done.returncode == 1
        peaks += [int(value) / 1024 for value in peak]
        answers = from_lines(out.read_bytes())
        assert len(answers) == count
        for number, answer in enumerate(answers):
            if number in problems:
                assert answer["line"] == number + 1
                assert problems[number] in answer["error"]
                assert "label" not in answer
            else:
                assert answer["id"] == number
                assert answer["label"] in ("Refusal", "Non-refusal")
    if Path("/proc/self/status").exists():
        small, large = peaks
        # The rows alone are 30 MB; the windows read ahead are below 1 MB.
        assert large - small < 8, f"{small:.0f} MB for 1,000 rows, {large:.0f} MB for 10,000"


class Session:
    """A running `refusal classify` that is fed rows for as long as it takes them.

    Attributes:
        sent: How many rows went in.
    """

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "classify", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
        )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.stderr: IO[bytes] = self.process.stderr
        self.sent = 0
        self._enough = threading.Event()
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._feeder.start()

    def _feed(self) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            while not self._enough.is_set():
                self.stdin.write(to_lines([{"id": self.sent, **_GOOD}]))
                self.sent += 1
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.stdin.close()

    def finish(self) -> int:
        self._enough.set()
        status = self.process.wait(timeout=60)
        self._feeder.join(timeout=60)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.finish()
        for stream in (self.stdout, self.stderr):
            stream.close()


@contextlib.contextmanager
def session(*arguments: str | Path) -> Iterator[Session]:
    running = Session(*arguments)
    try:
        yield running
    finally:
        running.close()


def test_an_endless_stream_is_answered_as_it_comes(tiny_bundle: Path) -> None:
    with session("--model", tiny_bundle) as running:
        answers = []
        for _ in range(2000):
            answers.append(json.loads(running.stdout.readline()))
            assert running.process.poll() is None
        assert [answer["id"] for answer in answers] == list(range(2000))
        before = running.sent
        # Nobody reads the output any more: the input is not read on without end either.
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.5)
            if running.sent == before:
                break
            before = running.sent
        else:
            pytest.fail("the input is swallowed although the output goes nowhere")
        assert running.sent < 2000 + 5000
        remaining: list[bytes] = []
        reader = threading.Thread(target=lambda: remaining.extend(running.stdout))
        reader.start()
        assert running.finish() == 0
        reader.join(timeout=60)
        assert len(answers) + len(remaining) == running.sent


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_ctrl_c_leaves_complete_lines(tiny_bundle: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    with session("--model", tiny_bundle, "--format", form, "-o", out) as running:
        deadline = time.monotonic() + 60
        while not (out.exists() and out.stat().st_size > 20_000):
            assert time.monotonic() < deadline
            assert running.process.poll() is None
            time.sleep(0.01)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(timeout=30) == 130
        assert running.stderr.read() == b""
    data = out.read_text("utf-8")
    assert data.endswith("\n")
    if form == "json":
        ids = [str(answer["id"]) for answer in json.loads(data)]
    elif form == "csv":
        ids = [record["id"] for record in csv.DictReader(io.StringIO(data))]
        assert all(len(line.split(",")) == 8 for line in data.splitlines())
    else:
        ids = [str(answer["id"]) for answer in from_lines(data.encode())]
    assert ids == [str(number) for number in range(len(ids))]
    assert len(ids) > 100


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_while_waiting_for_input(tiny_bundle: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "classify", "--model", tiny_bundle],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    with process:
        assert process.stdin
        assert process.stdout
        sent = 0
        while not select.select([process.stdout], [], [], 0.1)[0]:  # until it is at work
            rows = [{"id": number, "text": "help"} for number in range(sent, sent + 64)]
            process.stdin.write(to_lines(rows))
            process.stdin.flush()
            sent += 64
            assert sent < 20_000
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, complaints = process.communicate(timeout=30)
        assert (process.returncode, complaints) == (130, b"")
    ids = [answer["id"] for answer in from_lines(out)]
    assert ids == list(range(len(ids)))
    assert 0 < len(ids) <= sent


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "table"])
def test_a_closed_pipe_is_no_error(tiny_bundle: Path, form: str) -> None:
    with session("--model", tiny_bundle, "--format", form) as running:
        assert running.stdout.readline()
        running.stdout.close()
        assert running.process.wait(timeout=30) == 0
        assert running.stderr.read() == b""


# --- the other commands ---------------------------------------------------------------------


def test_info_explains_the_bundle_and_the_choice(tiny_bundle: Path) -> None:
    done = run("info", "--model", tiny_bundle)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    for told in ("tiny 1.0.0", str(tiny_bundle), "0 Non-refusal, 1 Refusal", "128 tokens",
                 "<|assistant|>", "<|...|>", "variant fp32", "variant int8", "variant fp16",
                 "onnx/model_int8.onnx", "parity", "accuracy", "opset"):  # fmt: skip
        assert told in text
    chosen = next(line for line in text.splitlines() if line.startswith("chosen"))
    assert "int8: int8 comes first on cpu" in chosen
    threads = next(line for line in text.splitlines() if line.startswith("threads"))
    assert "(" in threads
    other = run("info", "--model", tiny_bundle, "--variant", "fp32", "--threads", "1").stdout
    assert b"was asked for" in other
    assert b"threads argument" in other


def test_info_explains_a_folder_without_manifest_without_warnings(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bare"))
    (folder / "manifest.json").unlink()
    done = run("info", "--model", folder)
    assert (done.returncode, done.stderr) == (0, b"")
    notes = [line for line in done.stdout.decode().splitlines() if line.startswith("note")]
    assert any("no manifest.json: defaults were taken from config.json" in note for note in notes)


def test_doctor_reports_machine_versions_and_model() -> None:
    if not EMBEDDED.is_dir():
        pytest.skip("this tree has no embedded model")
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, b"")
    report = dict(line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    assert report["refusal-runtime"] == __version__
    for package in ("numpy", "tokenizers", "onnxruntime"):
        assert report[package][0].isdigit()
    assert "CPUExecutionProvider" in report["providers"]
    assert b"loads and classifies" in done.stdout
    for told in (b"instructions", b"affinity", b"cgroup quota", b"threads"):
        assert told in done.stdout


def test_the_embedded_model_is_the_default() -> None:
    if not EMBEDDED.is_dir():
        pytest.skip("this tree has no embedded model")
    done = run("classify", "--format", "table", EXAMPLES)
    assert done.returncode == 0, done.stderr
    rows = len(EXAMPLES.read_text("utf-8").splitlines())
    assert len(done.stdout.decode().splitlines()) == rows + 2


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"refusal-runtime {__version__}\n".encode())


@pytest.mark.parametrize("command", ["classify", "info", "doctor"])
def test_help_has_examples(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    text = done.stdout.decode()
    assert "example" in text
    assert f"refusal {command}" in text.partition("example")[2]


def test_help_names_the_commands_and_the_exit_status() -> None:
    assert all(name in run("--help").stdout for name in (b"classify", b"info", b"doctor"))
    text = run("classify", "--help").stdout.decode()
    listed = [line.split()[0] for line in text.partition("exit status:")[2].splitlines() if line]
    assert listed == ["0", "1", "2", "3", "4", "130"]
