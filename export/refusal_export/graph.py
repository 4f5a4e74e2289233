"""Makes the fp32 ONNX graph of a checkpoint, then fuses it and checks that it was fused."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from refusal_export.errors import ExportError

# The newest operator set that both PyTorch's exporter and onnxruntime's fusions handle.
OPSET = 20
_BERT_LIKE = {"bert"}


def trace(model: Any) -> onnx.ModelProto:
    """Exports a model to fp32 ONNX with dynamic batch and sequence axes, through optimum.

    The export runs on a copy of the tracer's own making; the caller's model stays as it is.
    """
    from optimum.exporters.onnx import onnx_export_from_model

    with tempfile.TemporaryDirectory() as folder, _quiet():
        onnx_export_from_model(
            model, folder, opset=OPSET, task="text-classification", do_validation=False,
            no_post_process=True,
        )  # fmt: skip
        return onnx.load(str(Path(folder) / "model.onnx"))


def fuse(graph: onnx.ModelProto, config: dict[str, Any], *, embedding: bool) -> onnx.ModelProto:
    """Applies onnxruntime's transformer fusions.

    Args:
        graph: A traced graph.
        config: The checkpoint's config.json.
        embedding: Whether to fuse the embedding too, which needs its weights in full precision.

    Raises:
        ExportError: A BERT graph was not fused completely, the usual way to lose speed unnoticed.
    """
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    options.enable_embed_layer_norm = embedding
    # ModernBERT's rotary attention has no fusion of BERT's shape; sizes of 0 mean: find out.
    bert = config.get("model_type") in _BERT_LIKE
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source = Path(folder) / "model.onnx"
        onnx.save(graph, str(source))
        fused = optimizer.optimize_model(
            str(source),
            "bert",
            num_heads=config["num_attention_heads"] if bert else 0,
            hidden_size=config["hidden_size"] if bert else 0,
            opt_level=0,
            optimization_options=options,
        ).model
    if not any(entry.domain == "com.microsoft" for entry in fused.opset_import):
        fused.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    if bert:
        check_fusions(fused, config["num_hidden_layers"], embedding=embedding)
    return fused


def check_fusions(graph: onnx.ModelProto, layers: int, *, embedding: bool) -> None:
    """Checks that every layer of a BERT was fused.

    Raises:
        ExportError: Says which operators are missing.
    """
    # Without a fused embedding, its own normalization is one that skips nothing or one addition.
    wanted = {"Attention": layers, "BiasGelu": layers, "SkipLayerNormalization": 2 * layers}
    if embedding:
        wanted["EmbedLayerNormalization"] = 1
    found = Counter(node.op_type for node in graph.graph.node)
    missing = [f"{found[op]} of {count} {op}" for op, count in wanted.items() if found[op] < count]
    if missing:
        raise ExportError(
            f"the graph was not fused completely ({', '.join(missing)}); this combination of "
            "torch, transformers and onnxruntime writes operators that the fusions do not know"
        )


def split_skips(graph: onnx.ModelProto) -> int:
    """Writes every SkipLayerNormalization as its additions and a LayerNormalization, in place.

    For CPU graphs: onnxruntime's kernel of the fused operator (1.32) sums a row value by value
    and takes three times as long as the three plain operators, whose loops are vectorized. The
    second addition is a Sum, because onnxruntime fuses Add and LayerNormalization again at load.
    The figures are in benchmarks/NOTES.md. Nodes whose sum is used elsewhere too are left alone.

    Returns:
        How many were written apart.
    """
    nodes: list[onnx.NodeProto] = []
    split = 0
    for node in graph.graph.node:
        if node.op_type != "SkipLayerNormalization" or any(node.output[1:]):
            nodes.append(node)
            continue
        split += 1
        name = node.output[0]
        value, skip, gamma, beta, bias = [*node.input, "", ""][:5]
        if bias:
            nodes.append(onnx.helper.make_node("Add", [value, bias], [f"{name}_biased"]))
            value = f"{name}_biased"
        nodes.append(onnx.helper.make_node("Sum", [value, skip], [f"{name}_sum"]))
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-12)
        inputs = [f"{name}_sum", gamma, *([beta] if beta else [])]
        nodes.append(
            onnx.helper.make_node(
                "LayerNormalization", inputs, [name], node.name, axis=-1, epsilon=epsilon
            )
        )
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return split


def fusion_counts(graph: onnx.ModelProto) -> dict[str, int]:
    """Counts the fused operators of a graph, for its manifest."""
    names = ("Attention", "BiasGelu", "SkipLayerNormalization", "EmbedLayerNormalization")
    found = Counter(node.op_type for node in graph.graph.node)
    return {name: found[name] for name in names if found[name]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tracer's warnings: what matters is checked on the graph and its logits."""
    loggers = [logging.getLogger(name) for name in ("optimum", "transformers", "onnxruntime")]
    loggers += [logging.getLogger("onnxruntime.transformers"), logging.getLogger("fusion_base")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
