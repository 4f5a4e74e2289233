"""Stores word embeddings in blocks of few bits, exactly where they came from such blocks.

The operator is onnxruntime's GatherBlockQuantized: signed integers times one scale for each
block of 32 values in a row. A base model distributed in 4-bit blocks (as llama.cpp's Q4_0 and
its kin do, where the value of largest magnitude becomes -8) and fine-tuned with its word
embeddings frozen is represented without any loss.

A table made by product quantization (Jegou et al. 2011, "Product Quantization for Nearest Neighbor
Search") with 256 codewords for every four columns, as training/compress.py makes for small models,
takes two bits a value; it becomes two plain Gathers, again without loss.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from refusal_export.errors import ExportError

BLOCK = 32
GROUP = 4  # columns that share a codebook
CODEWORDS = 256
_MOST_TAIL = 64  # a handful of trained rows is a tail; more means that the table is of another kind
_FloatArray = npt.NDArray[np.float32]


def find_word_embedding(graph: onnx.ModelProto) -> tuple[onnx.NodeProto, onnx.TensorProto]:
    """Finds the Gather that looks up `input_ids` and its table."""
    tables = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] == "input_ids":
            return node, tables[node.input[0]]
    raise ExportError("the graph has no plain word embedding to quantize")


def exact_int4(table: _FloatArray) -> tuple[npt.NDArray[np.int8], _FloatArray, int]:
    """Writes a table as 4-bit blocks, as far as that is exact.

    Args:
        table: float32, shape (rows, width), width a multiple of 32.

    Returns:
        Integers from -8 to 7, int8 of the table's shape; float32 scales that fp16 represents, of
        shape (rows, width / 32); and how many leading rows are exact.
    """
    blocks = table.reshape(len(table), -1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)[..., 0]
    scales = (extreme / -8).astype(np.float16).astype(np.float32)
    safe = np.where(scales == 0, 1, scales)[..., None]
    integers = np.clip(np.rint(blocks / safe), -8, 7)
    exact = (integers * scales[..., None] == blocks).all((1, 2))
    leading = len(exact) if exact.all() else int(np.argmin(exact))
    return integers.reshape(table.shape).astype(np.int8), scales, leading


def exact_codebooks(
    table: _FloatArray,
) -> tuple[npt.NDArray[np.uint8], _FloatArray] | None:
    """Writes a table as codes into codebooks, if it came from such.

    Args:
        table: float32, shape (rows, width), width a multiple of 4.

    Returns:
        Codes, uint8 of shape (rows, width / 4), and codewords, float32 of shape (width / 4, 256,
        4), unused ones zero; None if some four columns hold more than 256 different rows.
    """
    rows, width = table.shape
    if width % GROUP:
        return None
    codes = np.zeros((rows, width // GROUP), np.uint8)
    words = np.zeros((width // GROUP, CODEWORDS, GROUP), np.float32)
    for group in range(width // GROUP):
        part = np.ascontiguousarray(table[:, group * GROUP : (group + 1) * GROUP])
        # As opaque bytes, four columns sort as quickly as one.
        opaque = part.view(np.dtype((np.void, GROUP * part.itemsize)))[:, 0]
        different, number = np.unique(opaque, return_inverse=True)
        if len(different) > CODEWORDS:
            return None
        codes[:, group] = number.reshape(-1)
        words[group, : len(different)] = different.view(np.float32).reshape(-1, GROUP)
    return codes, words


def quantize_word_embedding(graph: onnx.ModelProto, *, bits: int | None = None) -> str:
    """Replaces the word embedding of an unfused embedding layer in place.

    Rows at the end that have no exact 4-bit form (role tokens that were trained) stay in a small
    float table of their own.

    Args:
        graph: The graph.
        bits: 4, 8, or None for codebooks or 4 where that is exact and 8 elsewhere.

    Returns:
        What was done, for the manifest.
    """
    node, tensor = find_word_embedding(graph)
    table: _FloatArray = numpy_helper.to_array(tensor).astype(np.float32)
    rows, width = table.shape
    if width % BLOCK:
        return "fp32"
    integers, scales, leading = exact_int4(table)
    rest = rows - leading
    exact = leading > 0 and rest <= _MOST_TAIL
    if bits is None and not exact and rows > CODEWORDS:
        found = exact_codebooks(table)
        if found is not None:
            _look_up_codes(graph, node, tensor, *found)
            return f"{CODEWORDS} codewords for every {GROUP} columns, exact"
    if bits is None:
        bits = 4 if exact else 8
    if not exact or bits == 8:
        rest = 0
    if bits == 8:
        blocks = table.reshape(rows, -1, BLOCK)
        scales = (np.abs(blocks).max(-1) / 127).astype(np.float16).astype(np.float32)
        safe = np.where(scales == 0, 1, scales)[..., None]
        integers = np.clip(np.rint(blocks / safe), -127, 127).reshape(table.shape).astype(np.int8)
    _replace(graph, node, tensor, integers, scales, bits, table[rows - rest :])
    if bits == 8:
        return "int8 blocks of 32"
    if not exact:
        return "int4 blocks of 32, rounded"
    return "int4 blocks of 32, exact" + (f", last {rest} rows fp32" if rest else "")


def _look_up_codes(
    graph: onnx.ModelProto,
    node: onnx.NodeProto,
    tensor: onnx.TensorProto,
    codes: npt.NDArray[np.uint8],
    words: _FloatArray,
) -> None:
    """Puts a lookup of codes and one of their codewords for a Gather."""
    groups = len(words)
    width = groups * GROUP
    name, output = f"{tensor.name}_codes", node.output[0]
    constants = [
        numpy_helper.from_array(codes, name),
        # All codebooks in one table: a code counts from where its own codebook begins.
        numpy_helper.from_array(np.arange(groups, dtype=np.int32) * CODEWORDS, f"{name}_start"),
        numpy_helper.from_array(words.reshape(-1, GROUP), f"{name}_words"),
        numpy_helper.from_array(np.array([0, 0, width], np.int64), f"{name}_shape"),
    ]
    nodes = [
        helper.make_node("Gather", [name, node.input[1]], [f"{output}_codes"]),
        helper.make_node("Cast", [f"{output}_codes"], [f"{output}_int"], to=TensorProto.INT32),
        helper.make_node("Add", [f"{output}_int", f"{name}_start"], [f"{output}_index"]),
        helper.make_node("Gather", [f"{name}_words", f"{output}_index"], [f"{output}_parts"]),
        helper.make_node("Reshape", [f"{output}_parts", f"{name}_shape"], [output]),
    ]
    _put(graph, node, tensor, nodes, constants)


def _look_up_tail(
    name: str, node: onnx.NodeProto, tail: _FloatArray, rows: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Makes the lookup of a small float table for the last rows; earlier ids read zeros."""
    small = np.concatenate([np.zeros((1, tail.shape[1]), np.float32), tail])
    names = [f"{name}_{part}" for part in ("tail", "offset", "zero")]
    output = node.output[0]
    return [
        helper.make_node("Sub", [node.input[1], names[1]], [f"{output}_shifted"]),
        helper.make_node("Max", [f"{output}_shifted", names[2]], [f"{output}_row"]),
        helper.make_node("Gather", [names[0], f"{output}_row"], [f"{output}_tail"]),
    ], [
        numpy_helper.from_array(small, names[0]),
        numpy_helper.from_array(np.array(rows - len(tail) - 1, np.int64), names[1]),
        numpy_helper.from_array(np.array(0, np.int64), names[2]),
    ]


def _put(
    graph: onnx.ModelProto,
    node: onnx.NodeProto,
    tensor: onnx.TensorProto,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
) -> None:
    """Puts nodes in a node's place and constants in its table's."""
    position = list(graph.graph.node).index(node)
    graph.graph.node.remove(node)
    for offset, new in enumerate(nodes):
        graph.graph.node.insert(position + offset, new)
    graph.graph.initializer.remove(tensor)
    graph.graph.initializer.extend(constants)


def _replace(
    graph: onnx.ModelProto,
    node: onnx.NodeProto,
    tensor: onnx.TensorProto,
    integers: npt.NDArray[np.int8],
    scales: _FloatArray,
    bits: int,
    tail: _FloatArray,
) -> None:
    """Puts GatherBlockQuantized, and a lookup of the float tail if there is one, for a Gather."""
    rows, width = integers.shape
    quantized = f"{tensor.name}_int{bits}"
    output = node.output[0]
    # A tail is looked up in a table of its own and added, so its quantized rows are zero.
    integers[rows - len(tail) :] = 0
    attributes = {}
    if bits == 4:
        packed = (integers[:, 0::2] & 15) | ((integers[:, 1::2] & 15) << 4)
        data = helper.make_tensor(
            quantized, TensorProto.INT4, (rows, width), packed.astype(np.uint8).tobytes(), raw=True
        )
    else:
        # 8-bit data is unsigned with the zero point at 128, the form that the operator takes.
        unsigned = (integers.astype(np.int16) + 128).astype(np.uint8)
        data = numpy_helper.from_array(unsigned, quantized)
        attributes = {"bits": 8}
    # Scales rest in fp16, which holds them exactly; the cast is folded when a session opens.
    half = numpy_helper.from_array(scales.astype(np.float16), f"{quantized}_scale_fp16")
    constants = [data, half]
    inputs = [quantized, node.input[1], f"{quantized}_scale"]
    lookup = f"{output}_quantized" if len(tail) else output
    nodes = [
        helper.make_node("Cast", [half.name], [f"{quantized}_scale"], to=TensorProto.FLOAT),
        helper.make_node(
            "GatherBlockQuantized", inputs, [lookup], name=f"{node.name}_quantized",
            domain="com.microsoft", gather_axis=0, quantize_axis=1, block_size=BLOCK, **attributes,
        ),
    ]  # fmt: skip
    if len(tail):
        # Ids before the tail read row 0 of the small table, which is zero: the sum is exact.
        chosen, parts = _look_up_tail(quantized, node, tail, rows)
        constants += parts
        nodes += [*chosen, helper.make_node("Add", [lookup, f"{output}_tail"], [output])]
    _put(graph, node, tensor, nodes, constants)
