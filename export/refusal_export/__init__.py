"""Turns a PyTorch refusal classifier into optimized, quantized, verified ONNX in one bundle.

`refusal_export.export.export(checkpoint, out, options)` is the command `refusal-export`.
"""

from refusal_export.errors import ExportError
from refusal_runtime.hardware import silence_telemetry

silence_telemetry()

DEFAULT_CHECKPOINT = "agentlans/multilingual-e5-small-refusal-classifier"

__all__ = ["DEFAULT_CHECKPOINT", "ExportError"]
