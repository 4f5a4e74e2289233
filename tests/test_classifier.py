"""The public classifier end to end: invariance, streaming, processes, threads, pipeline shapes."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, edited

from refusal_runtime import (
    ConversationError,
    ProviderError,
    RefusalClassifier,
    RefusalRuntimeError,
    Verdict,
)
from refusal_runtime import execution as execution_module
from refusal_runtime.execution import BatchedExecution, CpuExecution, open_session
from refusal_runtime.hardware import onnxruntime

WORDS = ["sorry", "I", "cannot", "help", "hello", "world", "désolé", "привет", "不", "抱歉", "آسف"]
VARIANTS = ["int8", "fp32"]
Open = Callable[..., RefusalClassifier]


def make_rows(count: int, seed: int = 1) -> list[Any]:
    """Conversations of every shape and of 4 to more than 128 tokens."""
    source = random.Random(seed)
    rows: list[Any] = []
    for number in range(count):
        ask, reply = (
            " ".join(source.choices(WORDS, k=source.choice([1, 3, 9, 30, 90]))) for _ in range(2)
        )
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
        shapes = [messages, {"messages": messages}, f"<|user|>{ask}<|assistant|>{reply}", reply]
        rows.append(shapes[number % 4])
    return rows


@pytest.fixture(scope="session")
def opened(tiny_bundle: Path) -> Open:
    """Opens the tiny bundle, each combination of options once."""

    @cache
    def open_tiny(variant: str = "fp32", **options: Any) -> RefusalClassifier:
        return RefusalClassifier(tiny_bundle, variant=variant, **options)

    return open_tiny


def verdicts(classifier: RefusalClassifier, rows: Any) -> list[Verdict]:
    return list(classifier.stream(rows, on_error="raise"))


# --- classify -------------------------------------------------------------------------------


def test_classify(opened: Open) -> None:
    classifier = opened()
    verdict = classifier.classify("<|user|>hello<|assistant|>sorry no")
    assert verdict.tokens == 7
    assert not verdict.truncated
    assert verdict.label in classifier.bundle.labels
    assert len(verdict.logits) == 2
    odds = np.exp(verdict.logits) / np.exp(verdict.logits).sum()
    assert verdict.refusal_probability == pytest.approx(odds[1], abs=1e-6)
    assert verdict.score == pytest.approx(odds.max(), abs=1e-6)


def test_logits_are_those_of_pytorch(opened: Open, tiny_checkpoint: Path) -> None:
    import torch
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(tiny_checkpoint).eval()
    classifier = opened()
    seen = set()
    for row in make_rows(24):
        verdict = classifier.classify(row)
        ids = classifier._encode(row, None).ids
        with torch.no_grad():
            expected = model(torch.tensor(ids[None])).logits[0].numpy()
        np.testing.assert_allclose(verdict.logits, expected, atol=1e-4)
        seen.add(verdict.logits)
    assert len(seen) > 12, "the tiny model tells texts apart"


def test_every_shape_of_one_conversation_gets_the_same_verdict(opened: Open) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "no"}]
    sharegpt = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "no"}]
    text = "<|user|>hello<|assistant|>no"
    shapes = [messages, {"messages": messages}, {"conversations": sharegpt}, text, {"text": text}]
    assert len({opened().classify(shape).logits for shape in shapes}) == 1


def test_errors_of_a_lone_conversation_have_no_row(opened: Open) -> None:
    with pytest.raises(ConversationError, match=r"^messages\[0\]\.role: unknown role"):
        opened().classify([{"role": "narrator", "content": "x"}])


def test_threshold_and_calibration_of_the_bundle(
    tiny_bundle: Path, tmp_path: Path, opened: Open
) -> None:
    calibration = {"method": "temperature", "temperature": 3.0}
    folder = edited(tiny_bundle, tmp_path / "b", threshold=0.0, calibration=calibration)
    text = "hello sorry no"
    plain = opened().classify(text)
    verdict = RefusalClassifier(folder, variant="fp32").classify(text)
    assert verdict.logits == plain.logits
    margin = (plain.logits[1] - plain.logits[0]) / 3
    assert verdict.refusal_probability == pytest.approx(1 / (1 + np.exp(-margin)))
    assert verdict.is_refusal, "threshold 0"
    strict = RefusalClassifier(folder, variant="fp32", threshold=1)
    assert not strict.classify(text).is_refusal
    assert strict(text)[0]["score"] == verdict.score, "the pipeline's score is calibrated too"
    assert {row["label"]: row["score"] for row in strict(text, top_k=None)}["Refusal"] == (
        pytest.approx(verdict.refusal_probability, abs=1e-12)
    )


def test_operating_points_are_thresholds_by_name(tiny_bundle: Path, tmp_path: Path) -> None:
    points = {"high_precision": 0.9, "high_recall": 0}
    folder = edited(tiny_bundle, tmp_path / "b", operating_points=points)
    for name, threshold in points.items():
        classifier = RefusalClassifier(folder, variant="fp32", threshold=name)
        assert classifier.threshold == threshold
        assert pickle.loads(pickle.dumps(classifier)).threshold == threshold
    with pytest.raises(ValueError, match=r"'best' \(it has 'high_precision', 'high_recall'\)"):
        RefusalClassifier(folder, threshold="best")
    with pytest.raises(ValueError, match="it has none"):
        RefusalClassifier(tiny_bundle, threshold="high_recall")


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan")])
def test_a_threshold_is_a_probability(tiny_bundle: Path, threshold: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        RefusalClassifier(tiny_bundle, threshold=threshold)


def test_max_length_and_truncation(tiny_bundle: Path, opened: Open) -> None:
    text = "<|user|>" + "hello " * 40 + "<|assistant|>" + "sorry " * 40
    full = opened().classify(text)
    assert not full.truncated
    cut = opened(max_length=32).classify(text)
    head = opened(max_length=32, truncation="head").classify(text)
    for verdict in (cut, head):
        assert (verdict.tokens, verdict.truncated) == (32, True)
    assert len({full.logits, cut.logits, head.logits}) == 3
    with pytest.raises(ConversationError, match="tokens exceed the limit of 32"):
        opened(max_length=32, truncation="error").classify(text)
    assert opened().classify(text * 9).tokens == 128


def test_profiles_are_token_budgets_by_name(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = edited(tiny_bundle, tmp_path / "b", profiles={"default": 48, "fast": 32})
    text = "<|user|>" + "hello " * 80 + "<|assistant|>" + "sorry " * 80
    for asked, tokens in ((None, 48), ("default", 48), ("fast", 32), (40, 40), (128, 128)):
        classifier = RefusalClassifier(folder, variant="fp32", max_length=asked)
        assert classifier.max_length == classifier.classify(text).tokens == tokens
        assert pickle.loads(pickle.dumps(classifier)).max_length == tokens
    # They were measured with the middle left out: other truncations keep all the model takes.
    assert RefusalClassifier(folder, truncation="head").max_length == 128
    assert RefusalClassifier(folder, truncation="head", max_length="fast").max_length == 32
    with pytest.raises(ValueError, match=r"no profile 'slow' \(it has 'default', 'fast'\)"):
        RefusalClassifier(folder, max_length="slow")
    with pytest.raises(ValueError, match="it has none"):
        RefusalClassifier(tiny_bundle, max_length="fast")


def test_a_cascade_asks_the_second_model_for_the_doubtful_rest(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    rows: list[Any] = [f"<|user|>hello<|assistant|>{'sorry ' * n}no" for n in range(40)]
    rows[7] = rows[3]
    rows[11] = "  "
    rows[25] = {"messages": []}
    alone = RefusalClassifier(tiny_bundle, variant="fp32")
    # The tiny bundle's int8 graph judges first, so that logits tell who has answered.
    chances = sorted(
        result.refusal_probability
        for result in RefusalClassifier(tiny_bundle).stream(rows)
        if isinstance(result, Verdict)
    )
    low, high = chances[10], chances[25]
    for number, (points, expected) in enumerate(
        {(low, high): 15, (0.0, 1.0): 38, (0.0, 0.0): 0, (low, low): 0}.items()
    ):
        names = dict(zip(("high_recall", "high_precision"), points, strict=True))
        folder = edited(tiny_bundle, tmp_path / str(number), operating_points=names)
        first = RefusalClassifier(folder)
        both = RefusalClassifier(tiny_bundle, variant="fp32", cascade=folder)
        again = pickle.loads(pickle.dumps(both))
        asked = 0
        for row, one, two, three in zip(
            rows, first.stream(rows), both.stream(rows), again.stream(rows), strict=True
        ):
            assert isinstance(two, Verdict) == (row not in (rows[11], rows[25]))
            if isinstance(one, ConversationError):
                assert str(two) == str(one) == str(three)
                continue
            assert isinstance(three, Verdict)
            open_still = points[0] <= one.refusal_probability < points[1]
            wanted = alone.classify(row) if open_still else one
            assert two == three == both.classify(row) == wanted
            assert alone.classify(row).logits != one.logits
            asked += open_still
        assert asked == pytest.approx(expected, abs=2)
    with pytest.raises(ValueError, match="no operating point 'high_recall'"):
        RefusalClassifier(tiny_bundle, cascade=tiny_bundle)


@pytest.mark.parametrize("length", [0, -1, 1, 5, 129])
def test_max_length_out_of_range(tiny_bundle: Path, length: int) -> None:
    with pytest.raises(ValueError, match=rf"max_length should be .*, found {length}$"):
        RefusalClassifier(tiny_bundle, max_length=length)


def test_unknown_options(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="'cpu' or 'cuda', found 'tpu'"):
        RefusalClassifier(tiny_bundle, provider="tpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found 'tail'"):
        RefusalClassifier(tiny_bundle, truncation="tail")  # type: ignore[arg-type]
    with pytest.raises(RefusalRuntimeError, match="no variant 'int3'"):
        RefusalClassifier(tiny_bundle, variant="int3")
    with pytest.raises(TypeError):
        RefusalClassifier(tiny_bundle, "fp32")  # type: ignore[misc]


# --- batch invariance -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_logits_bit_for_bit_whatever_else_is_in_the_call(
    opened: Open, variant: str
) -> None:
    rows = make_rows(500)
    order = list(range(len(rows)))
    random.Random(7).shuffle(order)
    alone = [opened(variant, threads=1).classify(row).logits for row in rows]
    assert len(set(alone)) > 200
    for threads in (1, 2):
        classifier = opened(variant, threads=threads)
        shuffled = verdicts(classifier, [rows[index] for index in order])
        assert [v.logits for v in shuffled] == [alone[index] for index in order]
        assert [classifier.classify(row).logits for row in rows[:100]] == alone[:100]
        # A call of one row is computed by all threads.
        fresh = RefusalClassifier(classifier.bundle.folder, variant=variant, threads=threads)
        assert [verdicts(fresh, [row])[0].logits for row in rows[:20]] == alone[:20]


def test_bad_rows_do_not_change_their_neighbours(opened: Open) -> None:
    rows = make_rows(40)
    mixed = [item for row in rows for item in (row, [], None)]
    results = list(opened("int8").stream(mixed))
    assert results[::3] == verdicts(opened("int8"), rows)


# --- stream ---------------------------------------------------------------------------------


class Source:
    """An endless iterable that counts what is taken from it."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[str]:
        for word in itertools.cycle(WORDS):
            self.taken += 1
            yield word


def test_stream_is_lazy_with_a_bounded_read_ahead(opened: Open) -> None:
    classifier, source = opened(), Source()
    stream = classifier.stream(source)
    assert source.taken == 0
    bound = 2 * classifier._execution.window
    for seen, verdict in enumerate(itertools.islice(stream, 300), 1):
        assert isinstance(verdict, Verdict)
        assert seen <= source.taken <= seen + bound
    taken = source.taken
    stream.close()  # type: ignore[attr-defined]
    assert source.taken == taken
    assert classifier.classify("hello").tokens == 3, "usable after an abandoned stream"


def test_stream_keeps_the_order_over_many_windows(opened: Open) -> None:
    classifier = opened(threads=2)
    rows = make_rows(2 * classifier._execution.window + 7)
    assert verdicts(classifier, iter(rows)) == [classifier.classify(row) for row in rows]


def test_repeated_conversations_are_computed_once(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = opened(threads=2)
    rows = [*make_rows(30), *make_rows(30), *make_rows(30) * 5]
    wanted = [classifier.classify(row) for row in rows]
    lengths: list[int] = []
    submit = classifier._execution.submit
    monkeypatch.setattr(
        classifier._execution, "submit", lambda batch: lengths.append(len(batch)) or submit(batch)
    )
    assert verdicts(classifier, rows) == wanted
    assert sum(lengths) == len({verdict.logits for verdict in wanted}) <= 30
    # What is remembered is bounded: beyond that a repetition is computed again.
    monkeypatch.setattr("refusal_runtime.classifier._REMEMBERED", 5)
    lengths.clear()
    assert verdicts(classifier, rows) == wanted
    assert 30 < sum(lengths) < len(rows)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128])
def test_stream_gives_one_result_for_each_row(opened: Open, count: int) -> None:
    results = list(opened().stream("hello" for _ in range(count)))
    assert results == [opened().classify("hello")] * count


def test_errors_stand_in_the_place_of_their_rows(opened: Open) -> None:
    rows: list[Any] = make_rows(150)
    bad = {0: None, 63: "", 64: [], 65: {"messages": 4}, 149: "<|user|>hello"}
    for at, value in bad.items():
        rows[at] = value
    results = list(opened().stream(rows))
    assert len(results) == len(rows)
    errors = {at: r for at, r in enumerate(results) if isinstance(r, ConversationError)}
    assert list(errors) == list(bad)
    for at, error in errors.items():
        assert error.row == at
        assert str(error).startswith(f"row {at}, ")


def test_on_error_raise_comes_after_everything_before(opened: Open) -> None:
    rows: list[Any] = [*make_rows(70), None, *make_rows(70)]
    stream = opened().stream(rows, on_error="raise")
    before = list(itertools.islice(stream, 70))
    assert before == [opened().classify(row) for row in rows[:70]]
    with pytest.raises(ConversationError, match=r"^row 70, messages: found null; give a list"):
        next(stream)
    assert list(stream) == []


def test_an_unknown_on_error_is_refused(opened: Open) -> None:
    with pytest.raises(ValueError, match="'yield' or 'raise', found 'skip'"):
        list(opened().stream([], on_error="skip"))  # type: ignore[call-overload]


@pytest.mark.parametrize("count", [0, 1, 64, 70, 200])
def test_a_failing_iterable_yields_everything_before(opened: Open, count: int) -> None:
    rows = make_rows(count)

    def source() -> Iterator[Any]:
        yield from rows
        raise OSError("the disk is gone")

    stream = opened().stream(source())
    seen = [next(stream) for _ in range(count)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert seen == [opened().classify(row) for row in rows]


def test_two_streams_of_one_classifier_can_be_interleaved(opened: Open) -> None:
    one, two = make_rows(90, seed=2), make_rows(90, seed=3)
    pairs = list(zip(opened().stream(one), opened().stream(two), strict=True))
    assert [pair[0] for pair in pairs] == verdicts(opened(), one)
    assert [pair[1] for pair in pairs] == verdicts(opened(), two)


# --- the shapes of a transformers pipeline --------------------------------------------------

TEXT = "<|user|>hello<|assistant|>sorry I cannot help"
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (TEXT, {}),
    "text, top_k=1": (TEXT, {"top_k": 1}),
    "text, top_k=None": (TEXT, {"top_k": None}),
    "text, top_k=2": (TEXT, {"top_k": 2}),
    "text, top_k=9": (TEXT, {"top_k": 9}),
    "list of one": ([TEXT], {}),
    "list": ([TEXT, "hello", "désolé"], {}),
    "list, top_k=1": ([TEXT, "hello"], {"top_k": 1}),
    "list, top_k=None": ([TEXT, "hello"], {"top_k": None}),
    "list of one, top_k=None": ([TEXT], {"top_k": None}),
    "empty list": ([], {}),
    "mapping": ({"text": TEXT}, {}),
    "mapping, top_k=None": ({"text": TEXT}, {"top_k": None}),
    "list of mappings": ([{"text": TEXT}, {"text": "hello"}], {}),
}


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> Any:
    from transformers import pipeline

    return pipeline("text-classification", model=str(tiny_checkpoint), device="cpu")


def rounded(answer: Any) -> Any:
    """The same shapes, with scores that compare to 1e-4."""
    if isinstance(answer, list):
        return [rounded(item) for item in answer]
    assert type(answer) is dict
    assert type(answer["score"]) is float
    return answer | {"score": pytest.approx(answer["score"], abs=1e-4)}


@pytest.mark.parametrize(("inputs", "options"), CALLS.values(), ids=list(CALLS))
def test_call_answers_as_the_pipeline_does(
    opened: Open, pipeline: Any, inputs: Any, options: dict[str, Any]
) -> None:
    expected = pipeline(inputs, **options)
    assert opened()(inputs, **options) == rounded(expected)
    assert type(opened()(inputs, **options)) is type(expected)


def test_call_takes_messages_too(opened: Open) -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "sorry I cannot help"},
    ]
    assert opened()(messages) == opened()(TEXT)
    assert opened()([messages, TEXT, {"messages": messages}]) == opened()([TEXT] * 3)


def test_call_raises_for_a_bad_row(opened: Open) -> None:
    with pytest.raises(ConversationError, match=r"^row 1, text: the text is empty"):
        opened()(["hello", ""])
    for top_k in (0, -1):
        with pytest.raises(ValueError, match="top_k"):
            opened()("hello", top_k=top_k)


# --- processes and threads ------------------------------------------------------------------


def script(code: str, *arguments: str | Path, timeout: float = 60) -> str:
    """Runs Python code in a fresh interpreter that sees only the runtime folder."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_heavy_is_imported(tiny_bundle: Path) -> None:
    code = """
import sys
from refusal_runtime import RefusalClassifier
classifier = RefusalClassifier(sys.argv[1])
classifier.classify("hello")
list(classifier.stream(["hello", "no"]))
classifier("hello", top_k=None)
print(sorted({name.partition(".")[0] for name in sys.modules}))
"""
    modules = set(eval(script(code, tiny_bundle)))
    assert {"numpy", "tokenizers", "onnxruntime", "refusal_runtime"} <= modules
    assert not modules & {"torch", "transformers", "huggingface_hub", "optimum", "onnx"}


def test_a_pickled_copy_answers_the_same(tiny_bundle: Path) -> None:
    classifier = RefusalClassifier(
        tiny_bundle, variant="fp32", threads=2, threshold=0.125, max_length=20, truncation="head"
    )
    rows = make_rows(20)
    before = verdicts(classifier, rows)
    state = pickle.dumps(classifier)
    assert len(state) < 2000, "the path and the options, not the session"
    copy = pickle.loads(state)
    assert verdicts(copy, rows) == before
    assert repr(copy) == repr(classifier)
    assert (copy.threshold, copy.max_length, copy.threads) == (0.125, 20, 2)


def test_a_pickled_copy_finds_its_bundle_from_elsewhere(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_bundle.parent)
    state = pickle.dumps(RefusalClassifier(tiny_bundle.name, variant="fp32"))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(state).classify("hello").tokens == 3


FORK = """
import gc, multiprocessing, os, signal, sys, time
from refusal_runtime import RefusalClassifier

rows = ["hello", "sorry I cannot help", "no " * 40] * 30
classifier = RefusalClassifier(sys.argv[1], variant=sys.argv[2], threads=2)
unused = RefusalClassifier(sys.argv[1], variant=sys.argv[2], threads=2)


def answers(_=None):
    one = [classifier.classify(row).logits for row in rows[:3]]
    return one, [verdict.logits for verdict in classifier.stream(rows)]


expected = answers()
half = classifier.stream(rows)  # a stream under way is the parent's
next(half)
child = os.fork()
if child == 0:
    try:
        assert answers() == expected
        assert answers() == expected
        assert unused.classify(rows[0]).logits == expected[0][0]
        del classifier, unused
        gc.collect()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    if sys.argv[3] == "at once":
        os._exit(0)
    sys.exit(0)  # through Python's own clean-up and that of the libraries
deadline = time.monotonic() + 20
while not (status := os.waitpid(child, os.WNOHANG))[0]:
    time.sleep(0.02)
    if time.monotonic() > deadline:
        os.kill(child, signal.SIGKILL)
        sys.exit("the child hangs")
assert os.waitstatus_to_exitcode(status[1]) == 0, status
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(answers, range(4)) == [expected] * 4
assert len(list(half)) == len(rows) - 1
assert answers() == expected
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("leaving", ["at once", "normally"])
def test_usable_after_a_fork(tiny_bundle: Path, variant: str, leaving: str) -> None:
    # multiprocessing's children leave at once, a server's workers (gunicorn's, say) normally.
    assert script(FORK, tiny_bundle, variant, leaving) == "fine\n"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_thread_safety(tiny_bundle: Path, opened: Open, variant: str, threads: int) -> None:
    rows = make_rows(80)
    expected = [opened(variant, threads=1).classify(row).logits for row in rows]
    classifier = RefusalClassifier(tiny_bundle, variant=variant, threads=threads)
    start = threading.Barrier(6)

    def classify_all(_: int) -> list[tuple[float, ...]]:
        start.wait()
        return [classifier.classify(row).logits for row in rows]

    def stream_all(_: int) -> list[tuple[float, ...]]:
        start.wait()
        return [verdict.logits for verdict in verdicts(classifier, rows)]

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(work, 0) for work in (classify_all, stream_all) * 3]
        for future in futures:
            assert future.result(timeout=60) == expected


def test_callers_at_once_get_a_thread_each(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    execution = CpuExecution(opened().bundle.folder / opened().graph.file, 2)
    ids = np.array([0, 5, 6, 7, 2], np.int64)
    inside, leave = threading.Event(), threading.Event()
    open_one, compute, asked = execution._session, execution._compute, list[int]()

    def session(threads: int) -> Any:
        asked.append(threads)
        return open_one(threads)

    def slowly(opened_session: Any, ids: Any) -> Any:
        if not inside.is_set():
            inside.set()
            assert leave.wait(60)
        return compute(opened_session, ids)

    monkeypatch.setattr(execution, "_session", session)
    monkeypatch.setattr(execution, "_compute", slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(execution.run, ids)
        assert inside.wait(60)
        second = execution.run(ids)
        leave.set()
        assert first.result(timeout=60).tolist() == second.tolist()
    assert execution.run(ids).tolist() == second.tolist()
    assert asked == [2, 1, 2]


def test_threads_spin_within_a_run_only(opened: Open) -> None:
    # How long onnxruntime's threads spin is too short to measure reliably.
    path = opened().bundle.folder / opened().graph.file
    options = open_session(path, ["CPUExecutionProvider"], 2).get_session_options()
    entries = {
        name: options.get_session_config_entry(f"session.{name}")
        for name in ("intra_op.allow_spinning", "force_spinning_stop", "inter_op.allow_spinning")
    }
    assert list(entries.values()) == ["1", "1", "0"]
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


# --- CUDA, as far as a machine without it can tell ------------------------------------------


def has_cuda() -> bool:
    return "CUDAExecutionProvider" in onnxruntime().get_available_providers()


@pytest.mark.skipif(has_cuda(), reason="this onnxruntime has CUDA")
def test_cuda_without_cuda_is_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(ProviderError, match=r"no CUDA support.*refusal-runtime\[gpu\]"):
        RefusalClassifier(tiny_bundle, provider="cuda")


@pytest.fixture
def broken_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that offers CUDA and then silently falls back to the CPU."""
    ort = onnxruntime()

    def open_on_cpu(path: str, options: Any, providers: Sequence[str]) -> Any:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    pretended = SimpleNamespace(
        SessionOptions=ort.SessionOptions,
        ExecutionMode=ort.ExecutionMode,
        InferenceSession=open_on_cpu,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(execution_module, "onnxruntime", lambda: pretended)


@pytest.mark.usefixtures("broken_cuda")
def test_asking_for_cuda_and_getting_the_cpu_is_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider"):
        RefusalClassifier(tiny_bundle, provider="cuda")


@pytest.mark.usefixtures("broken_cuda")
def test_auto_takes_the_cpu_where_cuda_does_not_work(tiny_bundle: Path) -> None:
    classifier = RefusalClassifier(tiny_bundle)
    assert (classifier.provider, classifier.graph.name) == ("cpu", "int8")
    assert classifier.classify("hello").tokens == 3


# --- padded batches -------------------------------------------------------------------------


def random_batch(lengths: Sequence[int], seed: int = 5) -> list[np.ndarray[Any, Any]]:
    source = np.random.default_rng(seed)
    return [source.integers(4, 200, length) for length in lengths]


@pytest.mark.parametrize(("variant", "tolerance"), [("fp32", 1e-4), ("fp16", 0.1)])
def test_padding_is_masked(opened: Open, variant: str, tolerance: float) -> None:
    path = opened(variant).bundle.folder / opened(variant).graph.file
    exact = CpuExecution(opened().bundle.folder / opened().graph.file, 1)
    batch = random_batch([3, 31, 32, 33, 4, 128, 97, 5, 64, 1])
    expected = [exact.run(ids) for ids in batch]
    assert np.ptp(expected, axis=0).min() > 4 * tolerance, "the rows differ more than is allowed"
    for pad_id in (1, 77):
        padded = BatchedExecution(path, ["CPUExecutionProvider"], 1, pad_id)
        found = [future.result() for future in padded.submit(batch)]
        np.testing.assert_allclose(found, expected, atol=tolerance)
        assert found[0].dtype == np.float32
        np.testing.assert_allclose(padded.run(batch[1]), expected[1], atol=tolerance)


class Spy(BatchedExecution):
    """Records the lengths of each batch that is run."""

    def __init__(self, path: Path) -> None:
        self.batches: list[list[int]] = []
        self.failing = False
        super().__init__(path, ["CPUExecutionProvider"], 1, 1)

    def _run(self, batch: list[np.ndarray[Any, Any]]) -> Any:
        self.batches.append([len(ids) for ids in batch])
        if self.failing:
            raise MemoryError("too much")
        return super()._run(batch)


@pytest.fixture
def spy(opened: Open) -> Spy:
    return Spy(opened().bundle.folder / opened().graph.file)


def test_batches_are_length_buckets_within_the_token_budget(
    spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module, "_TOKEN_BUDGET", 256)
    lengths = [int(n) for n in np.random.default_rng(3).integers(1, 129, 60)]
    batch = random_batch(lengths)
    results = [future.result() for future in spy.submit(batch)]
    assert sorted(itertools.chain(*spy.batches)) == sorted(lengths), "each row once"
    widths = []
    for rows in spy.batches:
        padded = {-(-length // 32) * 32 for length in rows}
        assert len(padded) == 1, "one bucket to a batch"
        widths.append(padded.pop())
        assert len(rows) * widths[-1] <= 256
    assert widths == sorted(widths, reverse=True), "longest first"
    # No bucket is split more than the budget asks for.
    for width in set(widths):
        rows = sum(-(-length // 32) * 32 == width for length in lengths)
        assert widths.count(width) == -(-rows // (256 // width))
    for ids, logits in zip(batch, results, strict=True):
        np.testing.assert_allclose(logits, spy.run(ids), atol=1e-4)


def test_a_row_beyond_the_token_budget_runs_alone(
    spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module, "_TOKEN_BUDGET", 64)
    for future in spy.submit(random_batch([100, 100, 20])):
        assert future.result().shape == (2,)
    assert spy.batches == [[100], [100], [20]]


def test_a_failing_batch_fails_all_of_its_rows_and_no_later_ones(spy: Spy) -> None:
    spy.failing = True
    for future in spy.submit(random_batch([5, 6])):
        with pytest.raises(MemoryError, match="too much"):
            future.result(timeout=30)
    spy.failing = False
    assert spy.run(random_batch([5])[0]).shape == (2,)


def test_cancelled_rows_are_not_computed(spy: Spy) -> None:
    gate = threading.Event()
    spy._worker.submit(gate.wait)
    futures = spy.submit(random_batch([5, 6, 7, 40]))
    assert futures[0].cancel()
    assert futures[3].cancel()
    gate.set()
    assert all(future.result(timeout=30).shape == (2,) for future in futures[1:3])
    assert spy.batches == [[7, 6]]


@pytest.fixture
def cpu_as_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """provider="cuda" runs its padded batches on the CPU."""
    monkeypatch.setattr(execution_module, "_CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(onnxruntime(), "preload_dlls", lambda: None, raising=False)


@pytest.mark.usefixtures("cpu_as_cuda")
def test_stream_through_padded_batches(tiny_bundle: Path, opened: Open) -> None:
    classifier = RefusalClassifier(tiny_bundle, provider="cuda", variant="fp32")
    rows: list[Any] = make_rows(200)
    rows[50] = None
    results = list(classifier.stream(rows))
    expected = list(opened().stream(rows))
    assert isinstance(results.pop(50), ConversationError)
    expected.pop(50)
    for found, wanted in zip(results, expected, strict=True):
        assert isinstance(found, Verdict)
        assert isinstance(wanted, Verdict)
        np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)
        assert (found.tokens, found.truncated) == (wanted.tokens, wanted.truncated)


@pytest.mark.usefixtures("cpu_as_cuda")
def test_padding_stays_within_the_positions_that_the_model_has(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    import onnx

    # The same model with 100 positions: the next multiple of a bucket's width is beyond them.
    model = onnx.load(tiny_bundle / "onnx" / "model.onnx")
    tables = [item for item in model.graph.initializer if list(item.dims) == [128, 32]]
    assert len(tables) == 1, "the position embeddings"
    values = onnx.numpy_helper.to_array(tables[0])[:100]
    tables[0].CopyFrom(onnx.numpy_helper.from_array(values, tables[0].name))
    (tmp_path / "onnx").mkdir()
    onnx.save(model, tmp_path / "onnx" / "model.onnx")
    config = json.loads((tiny_checkpoint / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = 100
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    shutil.copy(tiny_bundle / "tokenizer.json", tmp_path)
    text = "sorry " * 120
    exact = RefusalClassifier(tmp_path, variant="fp32", provider="cpu").classify(text)
    assert exact.tokens == 100
    padded = RefusalClassifier(tmp_path, variant="fp32", provider="cuda").classify(text)
    np.testing.assert_allclose(padded.logits, exact.logits, atol=1e-4)


def test_auto_runs_a_graph_for_the_cpu_on_the_cpu(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def record(path: Path, provider: str, threads: int, **_: Any) -> None:
        opened.append(f"{provider} {path.name}")

    monkeypatch.setattr("refusal_runtime.classifier.candidates", lambda provider: ["cuda", "cpu"])
    monkeypatch.setattr("refusal_runtime.classifier.open_graph", record)
    assert RefusalClassifier(tiny_bundle, variant="int8").provider == "cpu"
    assert RefusalClassifier(tiny_bundle).provider == "cuda"
    assert opened == ["cpu model_int8.onnx", "cuda model_fp16.onnx"]
