"""Makes the fp16 graph for CUDA, with normalizations kept in fp32."""

from __future__ import annotations

import onnx

# Squares of activations, summed over 384 of them, leave fp16's range (65504) at values that E5
# models do reach in their outlier channels. The softmax inside the fused attention accumulates
# in fp32 by itself; a softmax outside of one is kept in fp32 like the normalizations.
_KEEP_FP32 = [
    "LayerNormalization",
    "SkipLayerNormalization",
    "SimplifiedLayerNormalization",
    "EmbedLayerNormalization",
    "ReduceMean",
    "Pow",
    "Sqrt",
    "Softmax",
]


def to_half(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy of an fp32 graph that computes in fp16; inputs and outputs stay as they are.

    Args:
        graph: A fused graph whose embedding is not fused, so that its table can be fp16.
    """
    from onnxruntime.transformers.onnx_model import OnnxModel

    half = onnx.ModelProto()
    half.CopyFrom(graph)
    model = OnnxModel(half)
    model.convert_float_to_float16(
        keep_io_types=True, op_block_list=_KEEP_FP32, use_symbolic_shape_infer=True
    )
    return model.model
