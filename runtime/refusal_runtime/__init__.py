"""Did the assistant refuse? A multilingual refusal classifier on onnxruntime.

Start with `RefusalClassifier().classify(messages)`, which returns a `Verdict`.
"""

from refusal_runtime.classifier import RefusalClassifier
from refusal_runtime.conversation import ConversationInput
from refusal_runtime.errors import (
    BundleError,
    ConversationError,
    HubError,
    ProviderError,
    RefusalRuntimeError,
)
from refusal_runtime.verdict import Verdict
from refusal_runtime.version import __version__

__all__ = [
    "BundleError",
    "ConversationError",
    "ConversationInput",
    "HubError",
    "ProviderError",
    "RefusalClassifier",
    "RefusalRuntimeError",
    "Verdict",
    "__version__",
]
