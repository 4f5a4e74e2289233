"""How near a whole inference comes to what this machine's matrix products can do.

    python benchmarks/limits.py [--model BUNDLE] [--threads N] [--save NAME]

Measures fp32 and int8 matrix products of the model's shapes as onnxruntime graphs of a single
node, then an inference at 128 tokens, and profiles that by operator. The last line of stdout is
the result as JSON. Rates are in GFLOP/s, a multiplication and an addition counting as two, also
for integers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import environment, save
from onnx import TensorProto, helper, numpy_helper

from refusal_runtime import RefusalClassifier, hardware
from refusal_runtime.execution import CpuExecution, session_options

TOKENS = 128
_LENGTHS = (TOKENS, 512)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="bundle or Hub id; default: the embedded model")
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--threads", type=int, default=hardware.resolve_threads(None)[0])
    parser.add_argument("--seconds", type=float, default=0.4, help="least time for each shape")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)
    classifier = RefusalClassifier(options.model, variant=options.variant, provider="cpu")
    result = measure(classifier, options.threads, options.seconds)
    for row in result["products"]:
        print(
            f"{row['precision']} {row['tokens']:>4} x {row['inputs']:>4} x {row['outputs']:>4} "
            f"{row['gflops']:8.1f} GFLOP/s"
        )
    whole = result["inference"]
    print(
        f"inference of {whole['tokens']} tokens: {whole['seconds'] * 1e3:.2f} ms, "
        f"{whole['gflops']:.1f} GFLOP/s, {whole['fraction_of_peak']:.0%} of the "
        f"{whole['precision']} peak; the products alone take {whole['products_share']:.0%}"
    )
    for row in result["operators"]:
        print(f"  {row['operator']:<28} {row['share']:6.1%}  {row['calls']:>4} calls")
    if options.save:
        print(f"saved to {save(options.save, result)}")
    print(json.dumps(result, ensure_ascii=False))


def measure(classifier: RefusalClassifier, threads: int, seconds: float) -> dict[str, Any]:
    """Measures products, inference and operators.

    Args:
        classifier: The model.
        threads: CPU threads.
        seconds: Least time to spend on each measurement.
    """
    bundle = classifier.bundle
    config = json.loads((bundle.folder / "config.json").read_bytes())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    inner = config["intermediate_size"]
    # Q, K and V are one product; a shape that occurs twice would be measured twice.
    shapes = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    tokens = min(TOKENS, bundle.max_length)
    lengths = sorted({tokens, *(n for n in _LENGTHS if n <= bundle.max_length)})
    products = [
        measure_product(precision, length, *shape, threads, seconds)
        for precision in ("fp32", "int8")
        for length in lengths
        for shape in shapes
    ]
    peak = {
        precision: max(row["gflops"] for row in products if row["precision"] == precision)
        for precision in ("fp32", "int8")
    }
    path = bundle.folder / classifier.graph.file
    ids = np.random.default_rng(0).integers(5, config["vocab_size"] - 10, tokens)
    operators = profile(path, ids, threads, seconds)
    integer = any(row["operator"].startswith("MatMulInteger") for row in operators)
    precision = "int8" if integer else "fp32"
    execution = CpuExecution(path, threads)
    taken = median_seconds(lambda: execution.run(ids), 2 * seconds)
    work = 2.0 * tokens * layers * sum(a * b for a, b in shapes)
    alone = layers * sum(
        row["seconds"]
        for row in products
        if row["precision"] == precision and row["tokens"] == tokens
    )
    return {
        "benchmark": "limits",
        "environment": environment(),
        "model": f"{bundle.name} {bundle.version}".strip(),
        "variant": classifier.graph.name,
        "threads": threads,
        "products": products,
        "peak_gflops": peak,
        "inference": {
            "tokens": tokens,
            "precision": precision,
            "seconds": taken,
            "gflops": work / taken / 1e9,
            "fraction_of_peak": work / taken / 1e9 / peak[precision],
            "products_seconds": alone,
            "products_share": alone / taken,
        },
        "operators": operators,
    }


def measure_product(
    precision: str, tokens: int, inputs: int, outputs: int, threads: int, seconds: float
) -> dict[str, Any]:
    """Times (tokens, inputs) times a constant (inputs, outputs), in fp32 or uint8 by int8."""
    rng = np.random.default_rng(0)
    if precision == "fp32":
        kind, result, operator = TensorProto.FLOAT, TensorProto.FLOAT, "MatMul"
        x = rng.standard_normal((tokens, inputs), dtype=np.float32)
        weight = rng.standard_normal((inputs, outputs), dtype=np.float32)
    else:
        kind, result, operator = TensorProto.UINT8, TensorProto.INT32, "MatMulInteger"
        x = rng.integers(0, 256, (tokens, inputs), dtype=np.uint8)
        weight = rng.integers(-64, 65, (inputs, outputs), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, [tokens, inputs])],
        [helper.make_tensor_value_info("y", result, [tokens, outputs])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    session = open_model(model.SerializeToString(), threads)
    taken = median_seconds(lambda: session.run(None, {"x": x}), seconds)
    return {
        "precision": precision,
        "tokens": tokens,
        "inputs": inputs,
        "outputs": outputs,
        "seconds": taken,
        "gflops": 2.0 * tokens * inputs * outputs / taken / 1e9,
    }


def open_model(model: bytes | str, threads: int, *, profile_prefix: str = "") -> Any:
    """Opens a session as the runtime does, with profiling if a prefix for its file is given."""
    options = session_options(threads)
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    ort = hardware.onnxruntime()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def median_seconds(run: Callable[[], object], seconds: float) -> float:
    """Returns the median seconds of a call, after three calls to warm up; at least ten calls."""
    for _ in range(3):
        run()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 10 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def profile(path: Path, ids: Any, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Returns each operator's share of the time of all kernels, largest first, and its calls.

    Args:
        path: The ONNX file.
        ids: Token ids, int64 (tokens,).
        threads: CPU threads.
        seconds: Least time to run.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_model(str(path), threads, profile_prefix=str(Path(folder) / "profile"))
        rows = ids[np.newaxis].astype(np.int64)
        feed = {
            node.name: np.ones_like(rows) if "mask" in node.name else np.zeros_like(rows)
            for node in session.get_inputs()
        }
        feed["input_ids"] = rows
        runs = 0
        end = time.perf_counter() + seconds
        while runs < 10 or time.perf_counter() < end:
            session.run(None, feed)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    taken: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            taken[operator] += event["dur"]
            calls[operator] += 1
    total = sum(taken.values())
    return [
        {"operator": name, "share": taken[name] / total, "calls": calls[name] // runs}
        for name in sorted(taken, key=lambda name: -taken[name])
    ]


if __name__ == "__main__":
    main()
