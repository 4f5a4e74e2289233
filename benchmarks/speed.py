"""Times texts to verdicts against the transformers pipeline on the same checkpoint and texts.

    python benchmarks/speed.py CHECKPOINT DATA.jsonl [--rows 48] [--rounds 5] [--save NAME]

Each engine runs in a process of its own; rounds are interleaved, so that a drift of the machine
meets all engines alike, and medians are compared as ratios. Tokenization is included. The last
line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import environment, read_rows, save

from refusal_runtime import hardware

ENGINES = {
    "refusal-runtime": "embedded bundle, int8, each conversation at its exact length",
    "pipeline-1": "transformers pipeline, PyTorch fp32, one by one",
    "pipeline-16": "transformers pipeline, PyTorch fp32, batches of 16 as they come",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all engines in turns, or one of them as a worker."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="the PyTorch checkpoint behind the bundle")
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="bundle to time; default: the embedded one")
    parser.add_argument("--rows", type=int, default=48, help="mixed-length conversations a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=hardware.resolve_threads(None)[0])
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows = read_rows(options.data)
    # Every n-th row: the lengths of the whole set, without the order of its sources.
    rows = rows[:: max(1, len(rows) // options.rows)][: options.rows]
    texts = ["".join(f"<|{m['role']}|>{m['content']}" for m in row["messages"]) for row in rows]
    if options.engine:
        work(prepare(options), texts)
        return
    result: dict[str, Any] = {
        "benchmark": "speed",
        "environment": environment(),
        "data": options.data.name,
        "rows": len(rows),
        "rounds": options.rounds,
        "threads": options.threads,
        "engines": compare(options),
    }
    ours = result["engines"]["refusal-runtime"]["median_seconds"]
    for name, engine in result["engines"].items():
        engine["conversations_per_second"] = len(rows) / engine["median_seconds"]
        engine["times_slower"] = engine["median_seconds"] / ours
        print(
            f"{name:<16} {engine['conversations_per_second']:6.1f} conversations/s  "
            f"{engine['times_slower']:5.2f} x our time  "
            f"first verdict after {engine['load_seconds']:.2f} s  "
            f"{engine['peak_memory_mib']:,.0f} MiB"
        )
    if options.save:
        print(f"saved to {save(options.save, result)}")
    print(json.dumps(result, ensure_ascii=False))


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Starts a process for each engine and lets them take turns."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    processes, first = {}, {}
    for name in ENGINES:
        start = time.perf_counter()
        processes[name] = subprocess.Popen(
            [*command, "--engine", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        answer(processes[name])
        first[name] = time.perf_counter() - start
        ask(processes[name], "round")  # warm before the next one starts
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(options.rounds):
        for name, process in processes.items():
            seconds[name].append(ask(process, "round")["seconds"])
    engines = {}
    for name, process in processes.items():
        engines[name] = {
            "configuration": ENGINES[name],
            "median_seconds": statistics.median(seconds[name]),
            "seconds": seconds[name],
            "load_seconds": first[name],  # from the start of the process to its first verdict
            **ask(process, "end"),
        }
        process.wait()
    return engines


def ask(process: subprocess.Popen[str], request: str) -> dict[str, Any]:
    """Sends a request to a worker and returns its answer."""
    assert process.stdin
    process.stdin.write(request + "\n")
    process.stdin.flush()
    return answer(process)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Reads one answer of a worker."""
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"an engine ended with status {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def prepare(options: argparse.Namespace) -> Callable[[list[str]], object]:
    """Loads one engine; returns what turns texts into verdicts."""
    if options.engine == "refusal-runtime":
        from refusal_runtime import RefusalClassifier

        classifier = RefusalClassifier(options.model, provider="cpu", threads=options.threads)
        return lambda texts: list(classifier.stream(texts, on_error="raise"))
    import torch
    from transformers import logging, pipeline

    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    pipe = pipeline("text-classification", model=options.checkpoint, device="cpu")
    batch = int(options.engine.rpartition("-")[2])
    limit = pipe.model.config.max_position_embeddings
    return lambda texts: pipe(texts, batch_size=batch, truncation=True, max_length=limit)


def work(run: Callable[[list[str]], object], texts: list[str]) -> None:
    """Answers the parent's requests until it says end."""
    run(texts[:1])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        start = time.perf_counter()
        run(texts)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    print(json.dumps({"peak_memory_mib": peak_memory()}))


def peak_memory() -> float:
    """Peak resident memory of this process in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
