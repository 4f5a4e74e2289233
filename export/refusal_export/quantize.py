"""Temporary plain dynamic int8."""
from __future__ import annotations
import tempfile
from collections.abc import Sequence
from pathlib import Path
import numpy as np
import onnx
def quantize_int8(model: onnx.ModelProto, *, calibration: Sequence[np.ndarray] = ()) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    with tempfile.TemporaryDirectory() as d:
        quantize_dynamic(model, Path(d) / "q.onnx", op_types_to_quantize=["MatMul", "Attention"], per_channel=True, reduce_range=True, weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
        return onnx.load(str(Path(d) / "q.onnx"))
