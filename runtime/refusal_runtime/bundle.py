"""Reads a model folder: the manifest's contract when there is one, config.json's defaults if not.

A bundle is an ordinary Hugging Face ONNX folder plus `manifest.json`. The manifest is the only
thing that the exporter and the runtime share; its fields are described in docs/bundle.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from refusal_runtime.errors import BundleError

MANIFEST = "manifest.json"
SCHEMA_VERSION = "1.0"
ROLES = ("system", "user", "assistant")

Provider = Literal["cpu", "cuda"]
_T = TypeVar("_T")

# Which precision to take first on each provider: int8 is the fastest on CPUs, where fp16 has no
# kernels of its own; on CUDA fp16 is, and int8 would fall back to slow conversions.
_PREFERENCE: dict[Provider, tuple[str, ...]] = {
    "cpu": ("int8", "fp32", "fp16"),
    "cuda": ("fp16", "fp32", "int8"),
}

# How the ONNX files of other exporters spell their precision (optimum, transformers.js,
# sentence-transformers); anything else is loadable by its own name, never chosen automatically.
_PRECISION_OF_SUFFIX = (
    (re.compile(r"^$|^(fp32|O[123]|optimized)$", re.I), "fp32"),
    (re.compile(r"^(fp16|O4)$", re.I), "fp16"),
    (re.compile(r"^(q?u?int8.*|quantized)$", re.I), "int8"),
)


@dataclass(frozen=True, slots=True)
class Template:
    """How a conversation is written for the model.

    Attributes:
        roles: Text of the token that opens a message, by role (system, user, assistant).
        ellipsis: Token that stands for omitted text, or None if the model knows none.
        newline_after_role: Whether a newline follows each role token and separates messages,
            as in NousResearch/Minos-v1.
    """

    roles: Mapping[str, str]
    ellipsis: str | None
    newline_after_role: bool = False


DEFAULT_TEMPLATE = Template({role: f"<|{role}|>" for role in ROLES}, "<|...|>")


@dataclass(frozen=True, slots=True)
class Graph:
    """One ONNX graph of a bundle.

    Attributes:
        name: What `variant=` selects.
        file: Path relative to the bundle, with forward slashes.
        precision: "fp32", "fp16", "int8", or the exporter's own word for it.
        providers: Execution providers that the graph is meant for.
        opset: Version of the default ONNX operator set, or None if not recorded.
        external_data: Further files that hold the graph's weights.
        report: What the exporter measured (parity, accuracy), as found in the manifest.
    """

    name: str
    file: str
    precision: str
    providers: tuple[str, ...]
    opset: int | None = None
    external_data: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """The graph's file and its external data."""
        return (self.file, *self.external_data)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model folder, understood.

    Attributes:
        folder: Where it is.
        name: Name of the model.
        version: Version of the model, or "" if not recorded.
        source: Where it came from: checkpoint, revision and the like, as recorded.
        labels: Label by class id.
        refusal_id: Which class id means refusal.
        max_length: Most tokens that the model takes, control tokens included.
        template: How conversations are written for it.
        temperature: Divisor of the logits before the softmax (Guo et al. 2017,
            "On Calibration of Modern Neural Networks"); 1 leaves them as they are.
        threshold: Refusal probability from which a verdict counts as a refusal.
        operating_points: Further thresholds by name, chosen at calibration: "high_precision"
            (few false alarms), "high_recall" (few misses).
        profiles: Token budgets by name, measured when the model was made: "default" is what a
            conversation gets unless told otherwise, fewer are faster.
        graphs: The graphs by variant name.
        files: SHA-256 and size in bytes of every file by relative path; empty without a manifest.
        notes: Explanations for `refusal info`: what was assumed in the absence of a manifest.
    """

    folder: Path
    name: str
    version: str
    source: Mapping[str, Any]
    labels: tuple[str, ...]
    refusal_id: int
    max_length: int
    template: Template
    temperature: float
    threshold: float
    graphs: Mapping[str, Graph]
    files: Mapping[str, tuple[str, int]]
    notes: tuple[str, ...] = ()
    operating_points: Mapping[str, float] = field(default_factory=dict)
    profiles: Mapping[str, int] = field(default_factory=dict)

    def choose(self, variant: str, provider: Provider) -> tuple[Graph, str]:
        """Picks the graph to run.

        Args:
            variant: A name in `graphs`, or "auto".
            provider: The execution provider that will run it.

        Returns:
            The graph, and one sentence that says why it was chosen.

        Raises:
            BundleError: There is no such variant, or none that suits the provider.
        """
        return choose_graph(self.graphs, variant, provider, where=str(self.folder))

    def resolve_threshold(self, threshold: float | str | None) -> float:
        """Returns a threshold given as a number, by the name of an operating point, or not at all.

        Raises:
            ValueError: It is no probability, or the bundle has no operating point of that name.
        """
        if threshold is None:
            return self.threshold
        if isinstance(threshold, str):
            return self._named(threshold, self.operating_points, "operating point", "a probability")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold should be a probability from 0 to 1, found {threshold!r}")
        return float(threshold)

    def resolve_budget(self, max_length: int | str | None, *, elides: bool) -> int:
        """Returns a token budget given as a number, by the name of a profile, or not at all.

        Args:
            max_length: What was asked for.
            elides: Whether the middle is left out beyond it. Profiles were measured so; any
                other truncation has all that the model takes for its default.

        Raises:
            ValueError: It is out of range, or the bundle has no profile of that name.
        """
        if max_length is None:
            return self.profiles.get("default", self.max_length) if elides else self.max_length
        if isinstance(max_length, str):
            return self._named(max_length, self.profiles, "profile", "a number of tokens")
        if not 1 <= max_length <= self.max_length:
            raise ValueError(
                f"max_length should be from 1 to {self.max_length}, found {max_length!r}"
            )
        return max_length

    def _named(self, name: str, known: Mapping[str, _T], kind: str, instead: str) -> _T:
        """Looks up what the bundle has a name for."""
        if name not in known:
            names = ", ".join(map(repr, known)) or "none"
            raise ValueError(
                f"{self.name} has no {kind} {name!r} (it has {names}); give {instead} instead"
            )
        return known[name]

    def verify(self, graph: Graph) -> None:
        """Checks size and SHA-256 of every recorded file except the graphs that stay unused.

        Raises:
            BundleError: A file is missing, truncated or corrupted.
        """
        skip = {file for other in self.graphs.values() for file in other.files} - set(graph.files)
        for name, (digest, size) in self.files.items():
            if name not in skip:
                _verify_file(self.folder, name, digest, size)
        for name in graph.files:
            if not (self.folder / name).is_file():
                raise BundleError(f"{self.folder} lacks {name}; fetch or export the model again")


def choose_graph(
    graphs: Mapping[str, Graph], variant: str, provider: Provider, *, where: str
) -> tuple[Graph, str]:
    """Picks a graph by name, or the preferred one for a provider; see `Bundle.choose`."""
    if variant != "auto":
        if variant not in graphs:
            raise BundleError(
                f"{where} has no variant {variant!r}; "
                f"choose from {', '.join(sorted(graphs))} or 'auto'"
            )
        return graphs[variant], f"variant={variant!r} was asked for"
    for precision in _PREFERENCE[provider]:
        for graph in graphs.values():
            if graph.precision == precision and provider in graph.providers:
                return graph, f"{precision} comes first on {provider} among those present"
    raise BundleError(
        f"{where} has no graph meant for {provider} "
        f"(found {', '.join(sorted(graphs)) or 'none'}); name one with variant=..."
    )


def load_bundle(folder: Path) -> Bundle:
    """Reads a model folder; no graph is opened and no checksum of a graph computed yet.

    Raises:
        BundleError: The folder holds no usable model, or its manifest is invalid.
    """
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give a model folder or a Hub id owner/name")
    if (folder / MANIFEST).is_file():
        return _from_manifest(folder, _read_json(folder / MANIFEST))
    return _from_config(folder)


def seal(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a manifest's content, its own `digest` field excepted.

    The content is serialized as JSON with sorted keys and no spaces, so reformatting the file
    does not change its digest.
    """
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def refusal_label(labels: Iterable[str]) -> int | None:
    """Finds the class id whose label means refusal, or None when that cannot be told.

    "Refusal", "refused", "LABEL_REFUSE" qualify; "Non-refusal", "not_refused" do not.
    """
    hits = [
        number
        for number, label in enumerate(labels)
        if "refus" in label.casefold()
        and not re.search(r"(^|[^a-z])(non|not|no)[^a-z]*refus|nonrefus", label.casefold())
    ]
    return hits[0] if len(hits) == 1 else None


def _verify_file(folder: Path, name: str, digest: str, size: int) -> None:
    path = folder / name
    # A Hub cache would serve the same blob again, so it is that which has to go.
    again = f"delete {path.resolve()} and fetch the model again, or export it again"
    try:
        found = path.stat().st_size
        if found != size:
            raise BundleError(f"{path} has {found} bytes instead of {size}: truncated? {again}")
        if file_digest(path) != digest:
            raise BundleError(f"{path} is corrupted: its SHA-256 is not the recorded one; {again}")
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); {again}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


class _Fields:
    """Typed access to a JSON object, with errors that name the file and the field."""

    def __init__(self, path: Path, value: Any, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        if not isinstance(value, dict):
            raise self.error(prefix.rstrip(".") or "the file", "an object", value)
        self.value = value

    def error(self, name: str, wanted: str, found: Any) -> BundleError:
        return BundleError(
            f"{self.path}: {name} should be {wanted}, found {found!r:.80}; export the model again"
        )

    def get(self, name: str, kind: type[_T], wanted: str) -> _T:
        found = self.value.get(name)
        if kind is float and type(found) is int:
            found = float(found)
        if not isinstance(found, kind) or (kind is not bool and isinstance(found, bool)):
            raise self.error(self.prefix + name, wanted, found)
        return found

    def strings(self, name: str, default: list[str] | None = None) -> tuple[str, ...]:
        found = self.value.get(name, default)
        if not isinstance(found, list) or not all(isinstance(x, str) and x for x in found):
            raise self.error(self.prefix + name, "a list of strings", found)
        return tuple(found)

    def token(self, name: str) -> str:
        found = self.value.get(name)
        if not isinstance(found, str) or not found:
            raise self.error(self.prefix + name, "a token", found)
        return found

    def within(self, name: str) -> _Fields:
        return _Fields(self.path, self.value.get(name), f"{self.prefix}{name}.")

    def file(self, name: str, found: Any) -> str:
        """Accepts a relative path that stays inside the bundle."""
        if isinstance(found, str) and found and "\\" not in found and ":" not in found:
            path = PurePosixPath(found)
            if not path.is_absolute() and ".." not in path.parts:
                return found
        raise self.error(self.prefix + name, "a relative path inside the bundle", found)


def _from_manifest(folder: Path, manifest: dict[str, Any]) -> Bundle:
    top = _Fields(folder / MANIFEST, manifest)
    schema = top.get("schema", str, "a version such as '1.0'")
    if schema.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise BundleError(
            f"{top.path}: schema version {schema} is unknown, this release reads "
            f"{SCHEMA_VERSION.split('.')[0]}.x; upgrade refusal-runtime"
        )
    if top.get("digest", str, "a SHA-256") != seal(manifest):
        raise BundleError(
            f"{top.path} is corrupted: its content does not match its digest; "
            "fetch or export the model again"
        )
    files = {}
    for name, record in top.within("files").value.items():
        entry = _Fields(top.path, record, f"files[{name!r}].")
        size = entry.get("bytes", int, "a size in bytes")
        files[top.file("files", name)] = (entry.get("sha256", str, "a SHA-256"), size)
    graphs = {}
    for name, record in top.within("graphs").value.items():
        entry = _Fields(top.path, record, f"graphs[{name!r}].")
        graph = Graph(
            name,
            entry.file("file", record.get("file")),
            entry.get("precision", str, "a precision such as 'int8'"),
            entry.strings("providers"),
            entry.get("opset", int, "an opset number"),
            tuple(entry.file("external_data", x) for x in entry.strings("external_data", [])),
            {key: record[key] for key in ("parity", "accuracy", "recipe") if key in record},
        )
        for file in graph.files:
            if file not in files:
                raise BundleError(f"{top.path}: {file} has no checksum; export the model again")
        graphs[name] = graph
    if not graphs:
        raise BundleError(f"{top.path}: no graphs; export the model again")
    for needed in ("config.json", "tokenizer.json"):
        if needed not in files:
            raise BundleError(f"{top.path}: {needed} has no checksum; export the model again")
    labels = _labels(top, manifest.get("labels"))
    refusal = top.get("refusal_label", str, "one of the labels")
    if refusal not in labels:
        raise top.error("refusal_label", f"one of {', '.join(labels)}", refusal)
    shape = top.within("template")
    roles = shape.within("roles")
    calibration = top.within("calibration")
    temperature = calibration.get("temperature", float, "a number above 0")
    threshold = top.get("threshold", float, "a probability")
    max_length = top.get("max_length", int, "a number of tokens")
    if not 0 < temperature < float("inf"):
        raise top.error("calibration.temperature", "a number above 0", temperature)
    if not 0 <= threshold <= 1:
        raise top.error("threshold", "a probability from 0 to 1", threshold)
    points = {}
    if "operating_points" in manifest:
        within = top.within("operating_points")
        for point in within.value:
            points[point] = within.get(point, float, "a probability")
            if not 0 <= points[point] <= 1:
                raise within.error(
                    within.prefix + point, "a probability from 0 to 1", points[point]
                )
    if max_length < 1:
        raise top.error("max_length", "a positive number of tokens", max_length)
    profiles = {}
    if "profiles" in manifest:
        within = top.within("profiles")
        for profile in within.value:
            profiles[profile] = within.get(profile, int, "a number of tokens")
            if not 1 <= profiles[profile] <= max_length:
                wanted = f"a number of tokens from 1 to {max_length}"
                raise within.error(within.prefix + profile, wanted, profiles[profile])
    return Bundle(
        folder=folder,
        name=top.get("name", str, "a name"),
        version=top.get("version", str, "a version"),
        source=top.within("source").value,
        labels=labels,
        refusal_id=labels.index(refusal),
        max_length=max_length,
        template=Template(
            {role: roles.token(role) for role in ROLES},
            None if shape.value.get("ellipsis") is None else shape.token("ellipsis"),
            shape.get("newline_after_role", bool, "true or false"),
        ),
        temperature=temperature,
        threshold=threshold,
        graphs=graphs,
        files=files,
        operating_points=points,
        profiles=profiles,
    )


def _labels(top: _Fields, found: Any) -> tuple[str, ...]:
    """Reads `{"0": "Non-refusal", "1": "Refusal"}`, in the order of the ids."""
    if isinstance(found, dict) and len(found) > 1:
        labels = [found.get(str(number)) for number in range(len(found))]
        if all(isinstance(label, str) for label in labels) and len(set(labels)) == len(labels):
            return tuple(str(label) for label in labels)
    raise top.error("labels", "two or more different labels keyed '0', '1', ...", found)


def _from_config(folder: Path) -> Bundle:
    """Reads a folder without a manifest, as optimum-cli or a Hub repository provides it."""
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise BundleError(
                f"{folder} has neither {MANIFEST} nor {needed}: not a model folder; "
                "give a bundle made by refusal-export or a folder with an ONNX export"
            )
    top = _Fields(folder / "config.json", _read_json(folder / "config.json"))
    labels = _labels(top, top.value.get("id2label"))
    refusal = refusal_label(labels)
    if refusal is None:
        raise BundleError(
            f"{top.path}: cannot tell which of the labels {', '.join(labels)} means refusal; "
            "export the checkpoint with refusal-export --refusal-label"
        )
    graphs = discover_graphs(
        path.relative_to(folder).as_posix()
        for place in (folder / "onnx", folder)
        for path in sorted(place.glob("*.onnx"))
    )
    if not graphs:
        raise BundleError(
            f"{folder} holds no ONNX graph; export the checkpoint with refusal-export"
        )
    newline = top.value.get("model_type") == "modernbert"
    max_length = length_limit(top.value)
    return Bundle(
        folder=folder,
        name=folder.name,
        version="",
        source={},
        labels=labels,
        refusal_id=refusal,
        max_length=max_length,
        template=Template(DEFAULT_TEMPLATE.roles, DEFAULT_TEMPLATE.ellipsis, newline),
        temperature=1.0,
        threshold=0.5,
        graphs=graphs,
        files={},
        notes=(
            f"no {MANIFEST}: defaults were taken from config.json",
            "checksums are unknown, so files are not verified",
            f"labels {', '.join(labels)}; {labels[refusal]!r} is taken to mean refusal",
            f"at most {max_length} tokens; no calibration, threshold 0.5",
            f"role tokens {' '.join(DEFAULT_TEMPLATE.roles.values())}, "
            + ("each followed by a newline" if newline else "no newline after them"),
        ),
    )


def discover_graphs(files: Iterable[str]) -> dict[str, Graph]:
    """Names the graphs of a folder without a manifest by their file names.

    `model.onnx` is fp32, `model_int8.onnx`, `model_quantized.onnx` and
    `model_qint8_avx512.onnx` are int8; the first file of a precision takes its name, later ones
    keep the name of their file.

    Args:
        files: Relative paths, in order of preference.
    """
    graphs: dict[str, Graph] = {}
    for file in files:
        stem = PurePosixPath(file).stem
        suffix = re.sub(r"^model[_-]?", "", stem)
        precision = next((p for form, p in _PRECISION_OF_SUFFIX if form.match(suffix)), suffix)
        name = precision if precision not in graphs else stem
        providers = {"int8": ("cpu",), "fp16": ("cuda",)}.get(precision, ("cpu", "cuda"))
        graphs.setdefault(name, Graph(name, file, precision, providers))
    return graphs


def length_limit(config: Mapping[str, Any]) -> int:
    """Returns how many tokens a checkpoint takes, from its config.json.

    RoBERTa-like models (position ids start after the padding id) lose two positions.
    """
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 8:
        return 512
    roberta = config.get("model_type") in {"roberta", "xlm-roberta", "camembert"}
    return positions - 2 if roberta else positions
