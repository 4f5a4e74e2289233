"""The command `refusal`: classify files, explain the model, examine the machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from refusal_runtime import hardware
from refusal_runtime.classifier import RefusalClassifier
from refusal_runtime.errors import ConversationError, RefusalRuntimeError
from refusal_runtime.rows import (
    STDIN,
    ArrayWriter,
    CsvWriter,
    InputError,
    Row,
    Writer,
    read_rows,
    result_fields,
)
from refusal_runtime.table import TableWriter
from refusal_runtime.verdict import Verdict
from refusal_runtime.version import __version__

OK, ROWS_FAILED, USAGE, NO_MODEL, REFUSAL_FOUND, INTERRUPTED = 0, 1, 2, 3, 4, 130

_WRITERS: dict[str, Callable[[IO[str]], Writer]] = {
    "table": TableWriter,
    "jsonl": Writer,
    "json": ArrayWriter,
    "csv": CsvWriter,
}

_CLASSIFY_HELP = """\
examples:
  refusal classify conversations.jsonl                     verdicts as JSON Lines on stdout
  refusal classify data.jsonl --format table               something to read
  refusal classify a.jsonl b.csv -o verdicts.jsonl --keep  with the input's own fields
  my-pipeline | refusal classify --fail-on-refusal         in a pipe
  refusal classify --text '<|user|>Hi<|assistant|>Hello!'  one string

input rows:
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  {"text": "<|user|>...<|assistant|>..."}      or a bare list of messages

exit status:
  0  every row was judged
  1  some rows could not be judged; each has its error in the output, the count is on stderr
  2  wrong usage, or an input or output file that cannot be opened
  3  the model could not be loaded
  4  a refusal was found, with --fail-on-refusal (and no row failed)
  130  interrupted; the lines written so far are complete
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to say, not even at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except RefusalRuntimeError as error:
        return _complain(error, NO_MODEL)
    except (InputError, ValueError) as error:
        return _complain(error, USAGE)
    return status


def _complain(error: Exception, status: int) -> int:
    print(f"refusal: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refusal", description="Did the assistant refuse? A multilingual refusal classifier."
    )
    parser.add_argument("--version", action="version", version=f"refusal-runtime {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("model")
    group.add_argument("--model", help="folder or Hub id owner/name[@revision]; else the embedded")
    group.add_argument("--variant", default="auto", help="int8, fp32, fp16 or auto (the default)")
    group.add_argument("--provider", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument("--threads", type=int, help="CPU threads; else as many as may be used")
    group.add_argument("--local-files-only", action="store_true", help="never use the network")

    classify = commands.add_parser(
        "classify",
        parents=[model],
        help="judge conversations",
        description="Judges the last assistant message of each conversation.",
        epilog=_CLASSIFY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    classify.add_argument(
        "files", nargs="*", metavar="FILE",
        help="JSON Lines, a JSON array or .csv, each possibly .gz, or .parquet; none or -: stdin",
    )  # fmt: skip
    classify.add_argument("--text", help="judge this one string instead of files")
    classify.add_argument(
        "--format", choices=tuple(_WRITERS), default="jsonl", help="of the output"
    )
    classify.add_argument("-o", "--output", metavar="FILE", help="write there instead of stdout")
    classify.add_argument(
        "--keep",
        action="store_true",
        help="keep the input's own fields (named input_... where they clash with the result's)",
    )
    classify.add_argument(
        "--threshold", type=_threshold,
        help="refusal probability that counts, 0 to 1, or high_precision or high_recall",
    )  # fmt: skip
    classify.add_argument(
        "--max-length", type=_max_length,
        help="token budget of a conversation, or the name of a profile, such as fast or thorough",
    )  # fmt: skip
    classify.add_argument(
        "--cascade", metavar="MODEL", help="a faster bundle that judges first, what is clear alone"
    )
    classify.add_argument("--truncation", default="middle", choices=("middle", "head", "error"))
    classify.add_argument("--fail-on-refusal", action="store_true", help="exit with 4 if any")
    classify.set_defaults(run=_classify)

    info = commands.add_parser(
        "info",
        parents=[model],
        help="explain the model",
        epilog="example: refusal info --model DIR",
    )
    info.set_defaults(run=_info)
    doctor = commands.add_parser(
        "doctor", help="examine this machine", epilog="example: refusal doctor"
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _threshold(text: str) -> float | str:
    """Reads a number, or leaves the name of an operating point as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def _max_length(text: str) -> int | str:
    """Reads a number of tokens, or leaves the name of a profile as it is."""
    try:
        return int(text)
    except ValueError:
        return text


def _load(options: argparse.Namespace, **more: Any) -> RefusalClassifier:
    return RefusalClassifier(
        options.model,
        variant=options.variant,
        provider=options.provider,
        threads=options.threads,
        local_files_only=options.local_files_only,
        **more,
    )


def _classify(options: argparse.Namespace) -> int:
    if options.text is not None and options.files:
        raise InputError("give either --text or files, not both")
    names = options.files or [STDIN]
    for name in names:
        if name != STDIN and not Path(name).exists():
            raise InputError(f"{name} does not exist")
    if options.output and any(_same_file(options.output, name) for name in names):
        raise InputError(f"--output {options.output} is also an input")
    classifier = _load(
        options,
        threshold=options.threshold,
        max_length=options.max_length,
        truncation=options.truncation,
        cascade=options.cascade,
    )
    source = _rows(names) if options.text is None else iter([(None, Row(1, options.text))])
    with contextlib.ExitStack() as stack:
        out = _open_output(options.output, stack)
        interrupts = stack.enter_context(_Interrupts())
        progress = stack.enter_context(_Progress(out))
        writer = _WRITERS[options.format](out)
        # Even an interrupted array is closed, and lines in the buffer are written out.
        stack.callback(out.flush)
        stack.callback(writer.close)
        failed = refused = 0
        for file, row, result in _judge(classifier, source):
            failed += not isinstance(result, Verdict)
            refused += isinstance(result, Verdict) and result.is_refusal
            fields = result_fields(row, result, keep=options.keep, file=file)
            with interrupts.held():
                writer.write(row, fields)
                out.flush()  # the next row may be long in coming
            progress.step()
    if failed:
        print(f"refusal: {failed} row(s) could not be judged", file=sys.stderr)
        return ROWS_FAILED
    return REFUSAL_FOUND if refused and options.fail_on_refusal else OK


def _same_file(output: str, name: str) -> bool:
    pair = (Path(output), Path(name))
    return name != STDIN and all(path.exists() for path in pair) and pair[0].samefile(pair[1])


def _rows(names: Sequence[str]) -> Iterator[tuple[str | None, Row]]:
    """Reads all inputs in turn; the file is named only where there are several."""
    for name in names:
        for row in read_rows(name):
            yield (name if len(names) > 1 else None), row


def _judge(
    classifier: RefusalClassifier, source: Iterator[tuple[str | None, Row]]
) -> Iterator[tuple[str | None, Row, Verdict | ConversationError | str]]:
    """Pairs every row with its verdict or error, reading ahead only as far as the classifier."""
    waiting: deque[tuple[str | None, Row]] = deque()

    def conversations() -> Iterator[Any]:
        for file, row in source:
            waiting.append((file, row))
            # An unreadable row is no conversation at all; the classifier answers with an error
            # in its place, which keeps the order.
            yield row.value if row.error is None else ""

    for result in classifier.stream(conversations()):
        file, row = waiting.popleft()
        yield file, row, result if row.error is None else row.error


def _open_output(name: str | None, stack: contextlib.ExitStack) -> IO[str]:
    if name is None:
        return sys.stdout
    try:
        return stack.enter_context(
            open(name, "w", encoding="utf-8", errors="backslashreplace", newline="")
        )
    except OSError as error:
        raise InputError(f"{name} cannot be written: {error}") from error


class _Interrupts:
    """Delays Ctrl-C while a row is being written, so that only complete lines are left."""

    def __enter__(self) -> _Interrupts:
        self._holding = self._pending = False
        try:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not in the main thread: Ctrl-C does not arrive here
            self._previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self._holding:
            raise KeyboardInterrupt
        self._pending = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            raise KeyboardInterrupt


class _Progress:
    """Counts rows on stderr when it is a terminal and the output goes elsewhere."""

    def __init__(self, out: IO[str]) -> None:
        self._visible = sys.stderr.isatty() and not out.isatty()

    def __enter__(self) -> _Progress:
        self._start = self._shown = time.monotonic()
        self._rows = 0
        return self

    def step(self) -> None:
        self._rows += 1
        now = time.monotonic()
        if self._visible and now - self._shown > 0.2:
            self._shown = now
            rate = self._rows / (now - self._start)
            sys.stderr.write(f"\r{self._rows:,} rows, {rate:,.1f}/s ")
            sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._visible:
            sys.stderr.write("\n")


def _info(options: argparse.Namespace) -> int:
    classifier = _load(options)
    bundle = classifier.bundle
    rows = [
        ("model", f"{bundle.name} {bundle.version}".strip()),
        ("folder", str(bundle.folder)),
        *(("source", f"{key}: {value}") for key, value in bundle.source.items()),
        ("labels", ", ".join(f"{number} {label}" for number, label in enumerate(bundle.labels))),
        ("refusal label", bundle.labels[bundle.refusal_id]),
        ("max length", f"{bundle.max_length} tokens"),
        *((f"profile {name}", f"{tokens} tokens") for name, tokens in bundle.profiles.items()),
        ("role tokens", " ".join(bundle.template.roles.values())),
        ("ellipsis", bundle.template.ellipsis or "none"),
        ("threshold", f"{bundle.threshold:g}"),
        *(
            (name.replace("_", " "), f"from {value:g}")
            for name, value in bundle.operating_points.items()
        ),
        ("temperature", f"{bundle.temperature:g}"),
    ]
    for graph in bundle.graphs.values():
        size = sum((bundle.folder / file).stat().st_size for file in graph.files
                   if (bundle.folder / file).is_file())  # fmt: skip
        rows.append(
            (
                f"variant {graph.name}",
                f"{graph.file}, {size / 1e6:.1f} MB, for {', '.join(graph.providers)}"
                + (f", opset {graph.opset}" if graph.opset else ""),
            )
        )
        for title, report in graph.report.items():
            shown = ", ".join(f"{k} {v}" for k, v in _scalars(report))
            rows.append((f"  {title}", shown))
    rows.append(("chosen", f"{classifier.graph.name}: {classifier.graph_reason}"))
    rows.append(("provider", classifier.provider))
    rows.append(("threads", f"{classifier.threads} ({classifier.threads_reason})"))
    rows.extend(("note", note) for note in bundle.notes)
    if classifier.forgeable:
        rows.append(("note", "role tokens are ordinary text here: a message can imitate them"))
    _print_pairs(rows)
    return OK


def _scalars(report: Any) -> Iterator[tuple[str, Any]]:
    """The plain numbers and words of a report; its nested tables are for the model card."""
    if isinstance(report, dict):
        for key, value in report.items():
            if isinstance(value, float):
                yield key, f"{value:.4g}"
            elif isinstance(value, (str, int)):
                yield key, value


def _doctor(_options: argparse.Namespace) -> int:
    quota = hardware.cgroup_quota()
    threads, reason = hardware.resolve_threads(None)
    rows = [
        ("refusal-runtime", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("processor", hardware.cpu_name()),
        ("instructions", ", ".join(hardware.cpu_flags()) or "unknown"),
        ("affinity", f"{hardware.affinity_count()} of {os.cpu_count()} CPUs"),
        ("cgroup quota", "none" if quota is None else f"{quota:g} CPUs"),
        ("threads", f"{threads} ({reason})"),
    ]
    for package in ("numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu", "huggingface_hub"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    status = OK
    try:
        providers = hardware.onnxruntime().get_available_providers()
        rows.append(("providers", ", ".join(providers)))
        _load(argparse.Namespace(model=None, variant="auto", provider="cpu", threads=None,
                                 local_files_only=True)).classify("Sorry, no.")  # fmt: skip
        rows.append(("embedded model", "loads and classifies"))
    except RefusalRuntimeError as error:
        rows.append(("problem", str(error)))
        status = NO_MODEL
    _print_pairs(rows)
    return status


def _print_pairs(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
