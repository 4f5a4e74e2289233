"""The bundle's contract: what a manifest must say, what damage is refused, what defaults apply."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from refusal_runtime import BundleError, RefusalClassifier
from refusal_runtime.bundle import (
    MANIFEST,
    Graph,
    Provider,
    choose_graph,
    discover_graphs,
    file_digest,
    load_bundle,
    refusal_label,
    seal,
)

REPLY = [{"role": "user", "content": "help"}, {"role": "assistant", "content": "I can not"}]
VARIANTS = {"fp32": "onnx/model.onnx", "int8": "onnx/model_int8.onnx"}
BUNDLE_FILES = (
    "README.md", "config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "onnx/model.onnx", "onnx/model_int8.onnx", "onnx/model_fp16.onnx",
)  # fmt: skip


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def bare(bundle: Path) -> Path:
    """The same without its manifest, as optimum-cli would leave it."""
    (bundle / MANIFEST).unlink()
    return bundle


def read_manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    return content


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with a valid digest, so that only its content is judged."""
    manifest["digest"] = seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def logits(folder: Path, **options: Any) -> tuple[float, ...]:
    return RefusalClassifier(folder, provider="cpu", **options).classify(REPLY).logits


# --- the manifest ---------------------------------------------------------------------------


def test_loaded_bundle_says_what_the_manifest_says(tiny_bundle: Path) -> None:
    manifest, bundle = read_manifest(tiny_bundle), load_bundle(tiny_bundle)
    assert (bundle.folder, bundle.name, bundle.version) == (tiny_bundle, "tiny", "1.0.0")
    assert bundle.source == manifest["source"]
    assert bundle.labels == ("Non-refusal", "Refusal")
    assert bundle.labels[bundle.refusal_id] == manifest["refusal_label"] == "Refusal"
    assert bundle.max_length == manifest["max_length"] == 128
    assert bundle.temperature == manifest["calibration"]["temperature"]
    assert bundle.threshold == manifest["threshold"]
    assert dict(bundle.template.roles) == manifest["template"]["roles"]
    assert bundle.template.ellipsis == "<|...|>"
    assert bundle.template.newline_after_role is False
    assert set(bundle.files) == set(manifest["files"]) == set(BUNDLE_FILES)
    for name, (digest, size) in bundle.files.items():
        assert manifest["files"][name] == {"sha256": digest, "bytes": size}
        assert file_digest(tiny_bundle / name) == digest
    assert set(bundle.graphs) == {"fp32", "int8", "fp16"}
    for name, graph in bundle.graphs.items():
        entry = manifest["graphs"][name]
        assert (graph.name, graph.file, graph.precision) == (name, entry["file"], name)
        assert (list(graph.providers), graph.opset) == (entry["providers"], entry["opset"])
        assert graph.report["parity"] == entry["parity"]
        assert graph.report["accuracy"] == entry["accuracy"]
    assert bundle.notes == ()


def test_reformatting_the_manifest_changes_nothing(bundle: Path) -> None:
    before = load_bundle(bundle)
    text = json.dumps(read_manifest(bundle), indent=7, sort_keys=True, ensure_ascii=True)
    (bundle / MANIFEST).write_text(text, "utf-8")
    assert load_bundle(bundle) == before


def test_the_seal_covers_every_value_but_itself() -> None:
    manifest = {"a": {"b": [1, 2]}, "c": "é", "digest": "x"}
    reordered = {"digest": "y", "c": "é", "a": {"b": [1, 2]}}
    assert seal(manifest) == seal(reordered)
    assert re.fullmatch("[0-9a-f]{64}", seal(manifest))
    for other in ({**manifest, "c": "e"}, {**manifest, "a": {"b": [2, 1]}}, {**manifest, "d": 1}):
        assert seal(other) != seal(manifest)


def test_values_of_the_manifest_take_effect(bundle: Path) -> None:
    plain = RefusalClassifier(bundle, variant="fp32").classify(REPLY)
    manifest = read_manifest(bundle)
    manifest["labels"] = {"1": "nein", "0": "ja"}
    manifest["refusal_label"] = "ja"
    manifest["calibration"] = {"temperature": 4}
    manifest["threshold"] = 0
    write_manifest(bundle, manifest)
    changed = RefusalClassifier(bundle, variant="fp32").classify(REPLY)
    assert changed.logits == plain.logits
    assert changed.label == {"Non-refusal": "ja", "Refusal": "nein"}[plain.label]
    assert changed.is_refusal
    assert 0.5 < changed.score < plain.score
    chance = changed.score if changed.label == "ja" else 1 - changed.score
    assert changed.refusal_probability == pytest.approx(chance)


def test_a_newer_minor_schema_and_unknown_fields_are_accepted(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, {**manifest, "schema": "1.9", "later": {"addition": 1}})
    assert load_bundle(bundle).name == "tiny"


@pytest.mark.parametrize("schema", ["2.0", "0.9", "10.0", "", "x"])
def test_an_unknown_major_schema_is_refused(bundle: Path, schema: str) -> None:
    write_manifest(bundle, {**read_manifest(bundle), "schema": schema})
    with pytest.raises(BundleError, match=r"manifest\.json: schema version .* upgrade"):
        load_bundle(bundle)


_DELETE = object()
_WRONG: list[tuple[tuple[str, ...], Any, str]] = [
    (("schema",), 1, "schema"),
    (("schema",), _DELETE, "schema"),
    (("name",), 3, "name"),
    (("name",), _DELETE, "name"),
    (("version",), None, "version"),
    (("source",), "a checkpoint", "source"),
    (("labels",), ["Non-refusal", "Refusal"], "labels"),
    (("labels",), {"0": "Refusal"}, "labels"),
    (("labels",), {"0": "Non-refusal", "2": "Refusal"}, "labels"),
    (("labels",), {"0": "Refusal", "1": "Refusal"}, "labels"),
    (("labels",), {"0": "Non-refusal", "1": 1}, "labels"),
    (("labels",), _DELETE, "labels"),
    (("refusal_label",), "Denial", "refusal_label"),
    (("refusal_label",), 1, "refusal_label"),
    (("max_length",), 0, "max_length"),
    (("max_length",), "128", "max_length"),
    (("max_length",), True, "max_length"),
    (("max_length",), 12.5, "max_length"),
    (("threshold",), 1.5, "threshold"),
    (("threshold",), -0.1, "threshold"),
    (("threshold",), float("nan"), "threshold"),
    (("threshold",), "0.5", "threshold"),
    (("threshold",), True, "threshold"),
    (("operating_points",), None, "operating_points"),
    (("operating_points",), {"high_recall": 1.5}, "operating_points.high_recall"),
    (("operating_points",), {"high_recall": "low"}, "operating_points.high_recall"),
    (("profiles",), 256, "profiles"),
    (("profiles",), {"fast": 0}, "profiles.fast"),
    (("profiles",), {"fast": 129}, "profiles.fast"),
    (("profiles",), {"fast": "64"}, "profiles.fast"),
    (("calibration",), None, "calibration"),
    (("calibration", "temperature"), 0, "calibration.temperature"),
    (("calibration", "temperature"), float("inf"), "calibration.temperature"),
    (("calibration", "temperature"), None, "calibration.temperature"),
    (("template",), [], "template"),
    (("template", "roles"), None, "template.roles"),
    (("template", "roles", "user"), _DELETE, "template.roles.user"),
    (("template", "roles", "user"), 7, "template.roles.user"),
    (("template", "roles", "user"), "", "template.roles.user"),
    (("template", "ellipsis"), 5, "template.ellipsis"),
    (("template", "ellipsis"), "", "template.ellipsis"),
    (("template", "newline_after_role"), "no", "template.newline_after_role"),
    (("graphs",), {}, "graphs"),
    (("graphs",), None, "graphs"),
    (("graphs", "fp32"), "onnx/model.onnx", "graphs['fp32']"),
    (("graphs", "fp32", "file"), _DELETE, "graphs['fp32'].file"),
    (("graphs", "fp32", "file"), "../model.onnx", "graphs['fp32'].file"),
    (("graphs", "fp32", "file"), "onnx/../../model.onnx", "graphs['fp32'].file"),
    (("graphs", "fp32", "file"), "/model.onnx", "graphs['fp32'].file"),
    (("graphs", "fp32", "file"), "C:/model.onnx", "graphs['fp32'].file"),
    (("graphs", "fp32", "file"), "onnx\\model.onnx", "graphs['fp32'].file"),
    (("graphs", "fp32", "file"), "", "graphs['fp32'].file"),
    (("graphs", "fp32", "file"), "onnx/unlisted.onnx", "onnx/unlisted.onnx has no checksum"),
    (("graphs", "fp32", "precision"), 32, "graphs['fp32'].precision"),
    (("graphs", "fp32", "providers"), "cpu", "graphs['fp32'].providers"),
    (("graphs", "fp32", "providers"), [1], "graphs['fp32'].providers"),
    (("graphs", "fp32", "opset"), "20", "graphs['fp32'].opset"),
    (("graphs", "fp32", "external_data"), None, "graphs['fp32'].external_data"),
    (("graphs", "fp32", "external_data"), 5, "graphs['fp32'].external_data"),
    (("graphs", "fp32", "external_data"), "config.json", "graphs['fp32'].external_data"),
    (("graphs", "fp32", "external_data"), ["../x"], "graphs['fp32'].external_data"),
    (("graphs", "fp32", "external_data"), ["onnx/w.bin"], "onnx/w.bin has no checksum"),
    (("files",), None, "files"),
    (("files",), ["config.json"], "files"),
    (("files", "config.json"), _DELETE, "config.json has no checksum"),
    (("files", "tokenizer.json"), _DELETE, "tokenizer.json has no checksum"),
    (("files", "config.json"), None, "files['config.json']"),
    (("files", "config.json", "bytes"), "10", "files['config.json'].bytes"),
    (("files", "config.json", "sha256"), 5, "files['config.json'].sha256"),
    (("files", "../outside"), {"sha256": "0" * 64, "bytes": 1}, "files"),
    (("files", "/outside"), {"sha256": "0" * 64, "bytes": 1}, "files"),
]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        pytest.param(*case, id=f"{'.'.join(case[0])}={'-' if case[1] is _DELETE else case[1]}")
        for case in _WRONG
    ],
)
def test_invalid_manifests_are_refused_by_file_and_field(
    bundle: Path, path: tuple[str, ...], value: Any, named: str
) -> None:
    manifest = read_manifest(bundle)
    place = manifest
    for key in path[:-1]:
        place = place[key]
    if value is _DELETE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle)
    assert str(bundle / MANIFEST) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "should hold a JSON object"),
        (b"{}", "schema"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(
    bundle: Path, content: bytes, problem: str
) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=problem) as caught:
        load_bundle(bundle)
    assert MANIFEST in str(caught.value)


# --- damage ---------------------------------------------------------------------------------


def damage_cases() -> list[tuple[str, str]]:
    """Every file of the bundle (but the manifest) with a variant that needs it."""
    owners = {file: variant for variant, file in VARIANTS.items()}
    owners["onnx/model_fp16.onnx"] = "fp16"
    return [(name, owners.get(name, "int8")) for name in BUNDLE_FILES]


@pytest.mark.parametrize(("name", "variant"), damage_cases())
def test_one_flipped_byte_is_refused(
    tiny_bundle: Path, bundle: Path, name: str, variant: str
) -> None:
    RefusalClassifier(bundle, variant=variant, provider="cpu")
    size = (bundle / name).stat().st_size
    for position in (0, 1, size // 3, size // 2, size - 1):
        flip(bundle / name, position, bit=position % 8)
        with pytest.raises(BundleError, match="corrupted") as caught:
            RefusalClassifier(bundle, variant=variant, provider="cpu")
        assert str(bundle / name) in str(caught.value)
        shutil.copyfile(tiny_bundle / name, bundle / name)
    RefusalClassifier(bundle, variant=variant, provider="cpu")


def test_a_flipped_byte_anywhere_in_the_manifest_is_refused_or_changes_no_content(
    bundle: Path,
) -> None:
    path = bundle / MANIFEST
    pristine, content = path.read_bytes(), read_manifest(bundle)
    refusals: list[str] = []
    for position in range(0, len(pristine), 3):
        damaged = bytearray(pristine)
        damaged[position] ^= 1 << (position // 3) % 8
        path.write_bytes(damaged)
        try:
            load_bundle(bundle)
        except BundleError as error:
            refusals.append(str(error))
        else:
            assert json.loads(damaged) == content, f"byte {position} changed something unnoticed"
    # White space may change; most of the file is none.
    assert len(refusals) > len(pristine) // 3 * 0.4
    assert all(str(path) in refusal for refusal in refusals)


@pytest.mark.parametrize(("name", "variant"), damage_cases())
def test_truncated_and_missing_files_are_refused(bundle: Path, name: str, variant: str) -> None:
    data = (bundle / name).read_bytes()
    for kept in (data[:-1], data[: len(data) // 2], b"", data + b"\n"):
        (bundle / name).write_bytes(kept)
        with pytest.raises(BundleError, match=f"has {len(kept)} bytes instead of {len(data)}"):
            RefusalClassifier(bundle, variant=variant, provider="cpu")
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=r"cannot be read|lacks") as caught:
        RefusalClassifier(bundle, variant=variant, provider="cpu")
    assert name in str(caught.value)


def test_graphs_that_are_not_used_may_be_absent_or_damaged(bundle: Path) -> None:
    expected = logits(bundle, variant="int8")
    flip(bundle / "onnx/model.onnx", 100)
    (bundle / "onnx/model_fp16.onnx").unlink()
    assert logits(bundle, variant="int8") == expected
    with pytest.raises(BundleError, match="corrupted"):
        RefusalClassifier(bundle, variant="fp32", provider="cpu")


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no folder"):
        RefusalClassifier(tmp_path / "absent")
    with pytest.raises(BundleError, match="there is no folder"):
        RefusalClassifier("no such folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is not a folder"):
        RefusalClassifier(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"neither manifest\.json nor config\.json"):
        RefusalClassifier(tmp_path / "empty")


# --- folders without a manifest -------------------------------------------------------------


def test_a_folder_without_manifest_loads_with_defaults_and_says_so(
    tiny_bundle: Path, bare: Path
) -> None:
    bundle = load_bundle(bare)
    assert (bundle.name, bundle.version, dict(bundle.files)) == (bare.name, "", {})
    assert bundle.labels == ("Non-refusal", "Refusal")
    assert (bundle.refusal_id, bundle.max_length) == (1, 128)
    assert (bundle.temperature, bundle.threshold) == (1.0, 0.5)
    assert bundle.template == load_bundle(tiny_bundle).template
    notes = "\n".join(bundle.notes)
    for told in ("no manifest.json", "config.json", "not verified", "'Refusal'", "128 tokens",
                 "<|assistant|>"):  # fmt: skip
        assert told in notes
    for variant in ("fp32", "int8"):
        assert logits(bare, variant=variant) == logits(tiny_bundle, variant=variant)


def test_optimum_file_names_at_the_top_of_the_folder(tiny_bundle: Path, bare: Path) -> None:
    (bare / "onnx/model.onnx").rename(bare / "model.onnx")
    (bare / "onnx/model_int8.onnx").rename(bare / "model_quantized.onnx")
    shutil.rmtree(bare / "onnx")
    classifier = RefusalClassifier(bare, provider="cpu")
    assert (classifier.graph.name, classifier.graph.file) == ("int8", "model_quantized.onnx")
    assert classifier.classify(REPLY).logits == logits(tiny_bundle, variant="int8")
    assert logits(bare, variant="fp32") == logits(tiny_bundle, variant="fp32")


def test_a_folder_without_manifest_needs_graph_tokenizer_and_clear_labels(bare: Path) -> None:
    edit_json(bare / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1"})
    with pytest.raises(BundleError, match=r"config\.json: cannot tell which .* --refusal-label"):
        load_bundle(bare)
    edit_json(bare / "config.json", id2label=None)
    with pytest.raises(BundleError, match=r"config\.json: labels should be"):
        load_bundle(bare)
    edit_json(bare / "config.json", id2label={"0": "No", "1": "Refusal"})
    assert load_bundle(bare).refusal_id == 1
    shutil.rmtree(bare / "onnx")
    with pytest.raises(BundleError, match="holds no ONNX graph"):
        load_bundle(bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        load_bundle(bare)


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/model.onnx"])
def test_garbage_without_a_manifest_is_one_clear_error(bare: Path, name: str) -> None:
    (bare / name).write_bytes(b"garbage")
    with pytest.raises(BundleError, match=r"tokenizer\.json|model\.onnx") as caught:
        RefusalClassifier(bare, variant="fp32", provider="cpu").classify(REPLY)
    assert name.rpartition("/")[2] in str(caught.value)


def test_labels_are_read_from_id2label_in_swapped_order(bare: Path) -> None:
    before = RefusalClassifier(bare, variant="fp32").classify(REPLY)
    # Keys out of order on purpose: ids count, not the order in the file.
    edit_json(bare / "config.json", id2label={"1": "Non-refusal", "0": "Refusal"})
    classifier = RefusalClassifier(bare, variant="fp32")
    after = classifier.classify(REPLY)
    assert classifier.bundle.labels == ("Refusal", "Non-refusal")
    assert classifier.bundle.refusal_id == 0
    assert after.logits == before.logits
    assert after.label != before.label
    assert after.score == before.score
    assert after.refusal_probability == pytest.approx(1 - before.refusal_probability)
    assert classifier("hello")[0]["label"] == classifier.classify("hello").label


# --- external data --------------------------------------------------------------------------


def externalize(folder: Path) -> None:
    """Moves the weights of the fp32 graph into a file beside it."""
    graph = onnx.load(str(folder / "onnx/model.onnx"))
    (folder / "onnx/model.onnx").unlink()
    onnx.save_model(
        graph,
        str(folder / "onnx/model.onnx"),
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    assert (folder / "onnx/model.onnx_data").stat().st_size > 10_000


def test_external_data_without_a_manifest(tiny_bundle: Path, bare: Path) -> None:
    externalize(bare)
    assert logits(bare, variant="fp32") == logits(tiny_bundle, variant="fp32")
    (bare / "onnx/model.onnx_data").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx"):
        logits(bare, variant="fp32")


def test_external_data_is_verified_like_the_graph(tiny_bundle: Path, bundle: Path) -> None:
    externalize(bundle)
    manifest = read_manifest(bundle)
    manifest["graphs"]["fp32"]["external_data"] = ["onnx/model.onnx_data"]
    for name in ("onnx/model.onnx", "onnx/model.onnx_data"):
        path = bundle / name
        manifest["files"][name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    write_manifest(bundle, manifest)
    assert logits(bundle, variant="fp32") == logits(tiny_bundle, variant="fp32")
    flip(bundle / "onnx/model.onnx_data", 1000)
    with pytest.raises(BundleError, match=r"model\.onnx_data is corrupted"):
        RefusalClassifier(bundle, variant="fp32", provider="cpu")
    # The weights of a graph that is not used are not needed either.
    (bundle / "onnx/model.onnx_data").unlink()
    assert logits(bundle, variant="int8") == logits(tiny_bundle, variant="int8")
    with pytest.raises(BundleError, match=r"model\.onnx_data"):
        RefusalClassifier(bundle, variant="fp32", provider="cpu")


# --- choosing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "refusal"),
    [
        (("Non-refusal", "Refusal"), 1),
        (("Refusal", "Non-refusal"), 0),
        (("LABEL_COMPLY", "LABEL_REFUSE"), 1),
        (("not_refused", "refused"), 1),
        (("NOT REFUSED", "REFUSED"), 1),
        (("no refusal", "a refusal"), 1),
        (("nonrefusal", "refusal"), 1),
        (("no_refusal", "partial", "refusal"), 2),
        (("compliance", "Refusal"), 1),
        (("piano-refusal", "other"), 0),
        (("LABEL_0", "LABEL_1"), None),
        (("soft refusal", "hard refusal"), None),
        (("not refused", "compliance"), None),
        ((), None),
    ],
)
def test_refusal_label(labels: tuple[str, ...], refusal: int | None) -> None:
    assert refusal_label(labels) == refusal


def test_discovered_graphs_are_named_by_precision() -> None:
    files = [
        "onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_q4.onnx",
        "onnx/model_quantized.onnx", "onnx/model_qint8_avx512.onnx", "onnx/model_O2.onnx",
    ]  # fmt: skip
    graphs = discover_graphs(files)
    assert {name: (graph.file, graph.precision) for name, graph in graphs.items()} == {
        "fp32": ("onnx/model.onnx", "fp32"),
        "fp16": ("onnx/model_fp16.onnx", "fp16"),
        "q4": ("onnx/model_q4.onnx", "q4"),
        "int8": ("onnx/model_quantized.onnx", "int8"),
        "model_qint8_avx512": ("onnx/model_qint8_avx512.onnx", "int8"),
        "model_O2": ("onnx/model_O2.onnx", "fp32"),
    }
    assert all(graph.name == name for name, graph in graphs.items())
    assert graphs["int8"].providers == ("cpu",)
    assert graphs["fp16"].providers == ("cuda",)
    assert set(graphs["fp32"].providers) == {"cpu", "cuda"}
    assert discover_graphs([]) == {}


@pytest.mark.parametrize(
    ("file", "precision"),
    [
        ("model.onnx", "fp32"),
        ("model_optimized.onnx", "fp32"),
        ("model_O4.onnx", "fp16"),
        ("model_int8.onnx", "int8"),
        ("model_uint8.onnx", "int8"),
        ("model-int8.onnx", "int8"),
        ("model_qint8_arm64.onnx", "int8"),
        ("model_quint8_avx2.onnx", "int8"),
        ("model_bnb4.onnx", "bnb4"),
    ],
)
def test_precision_is_read_from_the_file_name(file: str, precision: str) -> None:
    assert discover_graphs([file])[precision].file == file


def _graphs(*names: str) -> dict[str, Graph]:
    return discover_graphs(f"model_{name}.onnx" for name in names)


@pytest.mark.parametrize(
    ("names", "provider", "chosen"),
    [
        (("fp32", "int8", "fp16"), "cpu", "int8"),
        (("fp32", "int8", "fp16"), "cuda", "fp16"),
        (("fp32", "fp16"), "cpu", "fp32"),
        (("fp32", "int8"), "cuda", "fp32"),
        (("q4", "fp32"), "cpu", "fp32"),
    ],
)
def test_auto_chooses_by_provider(names: tuple[str, ...], provider: Provider, chosen: str) -> None:
    graph, reason = choose_graph(_graphs(*names), "auto", provider, where="here")
    assert graph.name == chosen
    assert chosen in reason
    assert provider in reason


def test_variants_are_chosen_by_name_or_refused_with_the_choices() -> None:
    graphs = _graphs("fp32", "fp16", "q4")
    graph, reason = choose_graph(graphs, "q4", "cpu", where="here")
    assert graph.name == "q4"
    assert "asked for" in reason
    with pytest.raises(BundleError, match="here has no variant 'int4'; choose from fp16, fp32, q4"):
        choose_graph(graphs, "int4", "cpu", where="here")
    with pytest.raises(BundleError, match=r"no graph meant for cpu \(found fp16\)"):
        choose_graph(_graphs("fp16"), "auto", "cpu", where="here")
    with pytest.raises(BundleError, match=r"no graph meant for cuda \(found none\)"):
        choose_graph({}, "auto", "cuda", where="here")
