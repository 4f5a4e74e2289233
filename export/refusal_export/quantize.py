"""Quantizes the linear layers of a BERT-like fp32 graph to int8 that is right on every CPU.

What is done, for x of shape (batch, length, K) float32 and W of shape (K, N) float32:

* Weights: symmetric int8, one scale a column, in [-64, 64]. ``VPMADDUBSW`` (x86 AVX2 without
  VNNI) adds two u8*s8 products in int16: 255*64*2 = 32640 cannot saturate, 255*127*2 would.
  The lost bit is won back by error compensation over the calibration activations: GPTQ,
  Frantar et al. 2022 (arXiv:2210.17323), algorithm 1.
* LayerNorm outputs are equalized, as in SmoothQuant, Xiao et al. 2022 (arXiv:2211.10438), equation
  4: x' = x/s, W' = s*W, s_k = max|x_k|^a / max|W_k|^(1-a). An explicit Mul does it, as a LayerNorm
  output also feeds the residual sum. Then one dynamic uint8 range serves the whole tensor: run
  such a graph one text at a time.
* Other activations: uint8 with a scale for each token. A token is divided by its own max|x| before
  it is rounded to 255 levels in [-1, 1], and the product multiplied by it: the few tokens with
  massive values do not coarsen the others.
* Fused Attention becomes one int8 matmul for Q, K and V, Split and MultiHeadAttention.

Without calibration there is no equalization and no error compensation, and every activation has a
scale for each token. The result needs onnxruntime's com.microsoft CPU kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

__all__ = ["quantize_int8"]

_MICROSOFT = "com.microsoft"
_MIN_OPSET = 18  # ReduceMax takes its axes as an input from here on
_GPTQ_BLOCK = 128  # rows of W rounded between two updates of the rows that follow
_ATTENTION_ATTRIBUTES = frozenset({"num_heads", "mask_filter_value", "scale"})

_Float = npt.NDArray[np.float64]


@dataclasses.dataclass
class _Group:
    """The linear layers that read one tensor, and how that tensor is quantized.

    Attributes:
        source: Name of the float32 tensor (batch, length, K).
        nodes: MatMul and Attention nodes that read it, with constant weights (K, N).
        weights: Their weights, float64 (K, N).
        divisor: s of SmoothQuant, float64 (K,); None without calibration.
    """

    source: str
    nodes: list[onnx.NodeProto]
    weights: list[_Float]
    divisor: _Float | None = None

    def equalized(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Returns x', what the int8 matmul of this group is to stand for, float32 (rows, K)."""
        return x if self.divisor is None else x * (1.0 / self.divisor).astype(np.float32)


def quantize_int8(
    model: onnx.ModelProto,
    *,
    calibration: Sequence[npt.NDArray[np.int64]] = (),
    weight_limit: int = 64,
    alpha: float = 0.5,
    damping: float = 0.01,
    keep_fp32: Collection[str] = (),
) -> onnx.ModelProto:
    """Returns a copy of a model whose constant-weight matmuls run in int8.

    Embeddings, normalizations, the attention's own products and Gemm nodes (a pooler and a
    classifier on one token) stay in fp32. Equal arguments give equal models on one machine.

    Args:
        model: An fp32 graph with its weights inside, opset 18 or later, fused by onnxruntime
            (Attention, SkipLayerNormalization, ...) or not. It is not changed.
        calibration: Token ids, int64 (length,) each, of typical texts; 64 are enough. Each is
            run alone. Without any there is no equalization, correction or compensation.
        weight_limit: Largest |int8| of a weight. More than 64 saturates on AVX2 without VNNI.
        alpha: SmoothQuant's migration strength, 0..1.
        damping: GPTQ's dampening, as a part of the mean diagonal of the Hessian.
        keep_fp32: Names of MatMul or Attention nodes to leave alone.

    Raises:
        ValueError: The opset is too old, or weight_limit is not in 1..127.
    """
    if not 1 <= weight_limit <= 127:
        raise ValueError(f"weight_limit must be in 1..127, not {weight_limit}")
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < _MIN_OPSET:
        raise ValueError(f"the graph has opset {opset}; {_MIN_OPSET} or later is needed")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    groups = _find_groups(result.graph, keep_fp32)
    hessians: dict[str, _Float] = {}
    if calibration and groups:
        session = _calibration_session(result, groups)
        _equalize(session, calibration, groups, alpha)
        hessians = _hessians(session, calibration, groups)
    _rewrite(result.graph, groups, hessians, weight_limit, damping)
    if groups and all(o.domain != _MICROSOFT for o in result.opset_import):
        result.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    return result


def _find_groups(graph: onnx.GraphProto, keep_fp32: Collection[str]) -> dict[str, _Group]:
    """Returns the quantizable linear layers by the name of their input, in graph order."""
    fed = {i.name for i in graph.input}
    constants = {i.name: i for i in graph.initializer if i.name not in fed}
    groups: dict[str, _Group] = {}
    for node in graph.node:
        is_matmul = node.op_type == "MatMul" and node.domain in ("", "ai.onnx")
        if node.name in keep_fp32 or not (is_matmul or _is_plain_attention(node, constants)):
            continue
        weight = constants.get(node.input[1])
        if weight is None or len(weight.dims) != 2 or weight.data_type != onnx.TensorProto.FLOAT:
            continue
        group = groups.setdefault(node.input[0], _Group(node.input[0], [], []))
        group.nodes.append(node)
        group.weights.append(numpy_helper.to_array(weight).astype(np.float64))
    return groups


def _is_plain_attention(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node is a fused Attention that MultiHeadAttention can stand in for."""
    if node.op_type != "Attention" or node.domain != _MICROSOFT:
        return False
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    extra = {k for k, v in attributes.items() if v and k not in _ATTENTION_ATTRIBUTES}
    bias = constants.get(node.input[2]) if len(node.input) > 2 else None
    return not extra and bias is not None and not any(node.input[4:]) and len(node.output) == 1


def _calibration_session(
    model: onnx.ModelProto, groups: Mapping[str, _Group]
) -> onnxruntime.InferenceSession:
    """Returns a session of the fp32 model that also puts out the inputs of the groups."""
    graph = model.graph
    kept = len(graph.output)
    present = {o.name for o in graph.output}
    graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in groups
        if name not in present
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # sums in one order: equal models on every run
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    del graph.output[kept:]
    return session


def _activations(
    session: onnxruntime.InferenceSession,
    calibration: Sequence[npt.NDArray[np.int64]],
    groups: Mapping[str, _Group],
) -> Iterator[tuple[_Group, npt.NDArray[np.float32]]]:
    """Yields every group with its input, float32 (rows, K), for every calibration text."""
    for ids in calibration:
        feeds: dict[str, npt.NDArray[Any]] = {}
        for wanted in session.get_inputs():
            if "mask" in wanted.name:
                values = np.ones(len(ids), np.int64)
            elif "position" in wanted.name:
                values = np.arange(len(ids))
            else:
                values = np.zeros(len(ids), np.int64) if "type" in wanted.name else ids
            dtype = np.int32 if wanted.type == "tensor(int32)" else np.int64
            feeds[wanted.name] = values[None].astype(dtype)
        for group, x in zip(groups.values(), session.run(list(groups), feeds), strict=True):
            yield group, x.reshape(-1, x.shape[-1])


def _equalize(
    session: onnxruntime.InferenceSession,
    calibration: Sequence[npt.NDArray[np.int64]],
    groups: Mapping[str, _Group],
    alpha: float,
) -> None:
    """Sets divisors from the activations, and moves them into the weights.

    Only inputs that are narrower than their outputs, which is what LayerNorms feed, have outlier
    channels in every token alike; elsewhere scaling the tokens is enough.
    """
    reaches: dict[str, npt.NDArray[np.float32]] = {}
    for group, x in _activations(session, calibration, groups):
        reach = np.abs(x).max(axis=0)
        reaches[group.source] = np.maximum(reaches.get(group.source, reach), reach)
    for name, group in groups.items():
        inputs, outputs = group.weights[0].shape
        if inputs >= outputs:
            continue
        reach = np.maximum(reaches[name].astype(np.float64), 1e-6)
        rows = np.maximum(np.abs(np.concatenate(group.weights, axis=1)).max(axis=1), 1e-6)
        divisor = reach**alpha / rows ** (1.0 - alpha)
        group.divisor = divisor / np.exp(np.log(divisor).mean())
        group.weights = [weight * group.divisor[:, None] for weight in group.weights]


def _hessians(
    session: onnxruntime.InferenceSession,
    calibration: Sequence[npt.NDArray[np.int64]],
    groups: Mapping[str, _Group],
) -> dict[str, _Float]:
    """Returns X'X of every group's transformed input by its name, float64 (K, K)."""
    sums: dict[str, _Float] = {}
    for group, x in _activations(session, calibration, groups):
        seen = group.equalized(x)
        total = sums.setdefault(group.source, np.zeros((seen.shape[1],) * 2))
        total += seen.T @ seen
    return sums


def _round_weight(
    weight: _Float, limit: int, hessian: _Float | None, damping: float
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Returns int8 (K, N) and float32 column scales (N,) that stand for a weight (K, N).

    With a Hessian every rounding error of a row is made up for in the rows after it (GPTQ, with
    the upper Cholesky factor U of the inverse: H^-1 = U'U).
    """
    scale = (np.maximum(np.abs(weight).max(axis=0), 1e-12) / limit).astype(np.float32)
    if hessian is None:
        return np.clip(np.rint(weight / scale), -limit, limit).astype(np.int8), scale
    size = weight.shape[0]
    shift = damping * np.diag(hessian).mean() or 1.0
    inverse = np.linalg.inv(hessian + shift * np.eye(size))
    upper = np.linalg.cholesky((inverse + inverse.T) / 2.0).T
    rest = weight.copy()
    rounded = np.empty(weight.shape, np.int8)
    for start in range(0, size, _GPTQ_BLOCK):
        stop = min(start + _GPTQ_BLOCK, size)
        errors = np.empty((stop - start, weight.shape[1]))
        for k in range(start, stop):
            level = np.clip(np.rint(rest[k] / scale), -limit, limit)
            rounded[k] = level.astype(np.int8)
            errors[k - start] = (rest[k] - level * scale) / upper[k, k]
            rest[k + 1 : stop] -= upper[k, k + 1 : stop, None] * errors[k - start]
        rest[stop:] -= upper[start:stop, stop:].T @ errors
    return rounded, scale


class _Writer:
    """Collects the nodes and constants of the new graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, values: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """Adds a constant and returns its name."""
        array = np.ascontiguousarray(np.asarray(values, dtype)).reshape(np.shape(values))
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def op(self, kind: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        """Adds a node, named after its first output, and returns that output's name."""
        ours = kind in ("MatMulIntegerToFloat", "MultiHeadAttention")
        self.nodes.append(
            helper.make_node(
                kind,
                inputs,
                outputs,
                name=outputs[0] + "_node",
                domain=_MICROSOFT if ours else None,
                **attributes,
            )
        )
        return outputs[0]


def _rewrite(
    graph: onnx.GraphProto,
    groups: Mapping[str, _Group],
    hessians: Mapping[str, _Float],
    limit: int,
    damping: float,
) -> None:
    """Puts the int8 nodes in place of the groups' nodes and drops unused fp32 weights."""
    writer = _Writer()
    owner = {n.output[0]: (g, i) for g in groups.values() for i, n in enumerate(g.nodes)}
    sources: dict[str, tuple[str, str, str, str]] = {}
    for node in list(graph.node):
        found = owner.get(node.output[0]) if node.output else None
        if found is None:
            writer.nodes.append(node)
            continue
        group, index = found
        hessian = hessians.get(group.source)
        weight, scale = _round_weight(group.weights[index], limit, hessian, damping)
        if group.source not in sources:
            sources[group.source] = _write_source(writer, group)
        _write_linear(writer, group, index, sources[group.source], weight, scale)
    used = {name for node in writer.nodes for name in node.input}
    used.update(o.name for o in graph.output)
    kept = [i for i in graph.initializer if i.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(writer.nodes)
    graph.initializer.extend([*kept, *writer.constants.values()])


def _write_source(writer: _Writer, group: _Group) -> tuple[str, str, str, str]:
    """Quantizes a group's input.

    Returns:
        Names of the uint8 levels (batch, length, K), their scale and zero point, and the fp32
        token maxima (batch, length, 1) to multiply the product by, "" where one range serves all.
    """
    name = group.source
    even = name
    if group.divisor is not None:
        factor = writer.constant(f"{name}_int8_factor", 1.0 / group.divisor, np.float32)
        even = writer.op("Mul", [name, factor], f"{name}_int8_even")
        outputs = (f"{name}_int8", f"{name}_int8_scale", f"{name}_int8_zero")
        writer.op("DynamicQuantizeLinear", [even], *outputs)
        return *outputs, ""
    size = writer.op("Abs", [name], f"{name}_int8_size")
    axes = writer.constant("row_int8_axes", [-1], np.int64)
    top = writer.op("ReduceMax", [size, axes], f"{name}_int8_top", keepdims=1)
    tiny = writer.constant("row_int8_tiny", 1e-12, np.float32)
    safe = writer.op("Max", [top, tiny], f"{name}_int8_row")
    # As a matrix, because QuantizeLinear takes a scale for each index of one axis: that spares a
    # division of the whole tensor.
    width = group.weights[0].shape[0]
    rows = writer.constant(f"row_int8_{width}", [-1, width], np.int64)
    flat = writer.op("Reshape", [name, rows], f"{name}_int8_flat")
    scale = writer.constant("row_int8_scale", 1.0 / 127.0, np.float32)
    step = writer.op("Mul", [safe, scale], f"{name}_int8_step")
    line = writer.constant("row_int8_line", [-1], np.int64)
    steps = writer.op("Reshape", [step, line], f"{name}_int8_steps")
    count = writer.op("Shape", [steps], f"{name}_int8_count")
    middle = helper.make_tensor("middle", onnx.TensorProto.UINT8, [1], [128])
    zeros = writer.op("ConstantOfShape", [count], f"{name}_int8_zeros", value=middle)
    levels = writer.op("QuantizeLinear", [flat, steps, zeros], f"{name}_int8_levels", axis=0)
    shape = writer.op("Shape", [name], f"{name}_int8_shape")
    zero = writer.constant("row_int8_zero", 128, np.uint8)
    return writer.op("Reshape", [levels, shape], f"{name}_int8"), scale, zero, safe


def _write_linear(
    writer: _Writer,
    group: _Group,
    index: int,
    source: Sequence[str],
    weight: npt.NDArray[np.int8],
    scale: npt.NDArray[np.float32],
) -> None:
    """Writes one MatMul or Attention of a group over the quantized input."""
    node = group.nodes[index]
    name = node.output[0]
    attention = node.op_type == "Attention"
    levels, step, zero, top = source
    inputs = [
        levels,
        writer.constant(f"{name}_int8_weight", weight, np.int8),
        step,
        writer.constant(f"{name}_int8_weight_scale", scale, np.float32),
        zero,
        writer.constant(f"{name}_int8_weight_zero", np.zeros_like(scale), np.int8),
    ]
    product = f"{name}_int8_product" if attention else name
    if top:
        matmul = writer.op("MatMulIntegerToFloat", inputs, f"{name}_int8_matmul")
        writer.op("Mul", [matmul, top], product)
    else:
        writer.op("MatMulIntegerToFloat", inputs, product)
    if attention:
        third = weight.shape[1] // 3
        sizes = writer.constant(f"{name}_int8_sizes", [third] * 3, np.int64)
        parts = [f"{name}_int8_{part}" for part in ("query", "key", "value")]
        writer.op("Split", [product, sizes], *parts, axis=-1)
        rest = [node.input[2], *([node.input[3]] if len(node.input) > 3 else [])]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kept = {k: v for k, v in attributes.items() if k in _ATTENTION_ATTRIBUTES}
        writer.op("MultiHeadAttention", [*parts, *rest], name, **kept)
