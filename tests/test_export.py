"""The exporter on tiny checkpoints: equal logits, both transformers saves, ModernBERT, the gate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import DATA, EXAMPLES, make_tokenizer, save_tiny_checkpoint
from safetensors.torch import load_file, save_file

from refusal_export import bundle_writer, cli
from refusal_export.checkpoint import load_checkpoint
from refusal_export.embeddings import exact_int4, quantize_word_embedding
from refusal_export.errors import ExportError
from refusal_export.export import ExportOptions, export
from refusal_export.graph import check_fusions, fuse, fusion_counts, split_skips, trace
from refusal_export.verify import Gate, encode_texts, load_texts, torch_logits
from refusal_export.vocabulary import load_pieces, prune
from refusal_runtime import RefusalClassifier
from refusal_runtime.bundle import load_bundle

CONVERSATIONS = [
    [{"role": "user", "content": "please help"}, {"role": "assistant", "content": "I can not"}],
    [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "yes of course"}],
]


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_checkpoints_saved_by_transformers_4_and_5_export_to_equal_logits(
    kind: str, tmp_path: Path
) -> None:
    # Transformers 5 also rewrites the tokenizer (it drops this one's normalizer), so quantization
    # is calibrated on texts that both split alike.
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text("\n".join(json.dumps({"messages": row}) for row in CONVERSATIONS))
    logits = []
    for version in (4, 5):
        out = tmp_path / str(version)
        options = ExportOptions(variants=("fp32", "int8"), calibration=calibration, force=True)
        manifest = export(DATA / f"saved-by-transformers-{version}" / kind, out, options)
        assert manifest["graphs"]["fp32"]["parity"]["max_logit_difference"] < 1e-3
        for variant in ("fp32", "int8"):
            classifier = RefusalClassifier(out, variant=variant)
            logits.append([classifier.classify(row).logits for row in CONVERSATIONS])
    assert logits[:2] == logits[2:]
    assert manifest["template"]["newline_after_role"] == (kind == "modernbert")


def test_modernbert_keeps_the_rotary_bases_that_transformers_5_saved() -> None:
    folders = [DATA / f"saved-by-transformers-{version}" / "modernbert" for version in (4, 5)]
    settings = [load_checkpoint(folder).model.config for folder in folders]
    for config in settings:
        assert (config.global_rope_theta, config.local_rope_theta) == (80000.0, 5000.0)
        assert config.global_attn_every_n_layers == 2


def test_bundle_agrees_with_pytorch_and_is_a_hugging_face_folder(
    tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    checkpoint = load_checkpoint(tiny_checkpoint)
    classifier = RefusalClassifier(tiny_bundle, variant="fp32")
    ids = encode_texts(checkpoint, load_texts(EXAMPLES))
    reference = torch_logits(checkpoint.model, ids, title="PyTorch")
    rows = [json.loads(line) for line in EXAMPLES.read_text("utf-8").splitlines()]
    found = [verdict.logits for verdict in classifier.stream(rows, on_error="raise")]
    assert np.abs(reference - np.array(found)).max() < 1e-4
    assert np.ptp(reference) > 0.5, "a model that says the same of everything proves nothing"

    peer = ORTModelForSequenceClassification.from_pretrained(
        tiny_bundle, subfolder="onnx", file_name="model.onnx"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_bundle)
    text = "<|user|>please help<|assistant|>I can not"
    output = peer(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
    assert np.abs(output - np.array(classifier.classify(text).logits)).max() < 1e-5


def test_manifest_records_what_was_done(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text("utf-8"))
    fusions = manifest["graphs"]["fp32"]["recipe"]["fusions"]
    assert fusions == {
        "Attention": 2, "BiasGelu": 2, "SkipLayerNormalization": 4, "EmbedLayerNormalization": 1,
    }  # fmt: skip
    parity = manifest["graphs"]["fp32"]["parity"]
    assert {"32", "64", "128"} <= set(parity["by_length"])
    assert manifest["labels"] == {"0": "Non-refusal", "1": "Refusal"}
    assert manifest["refusal_label"] == "Refusal"
    card = (tiny_bundle / "README.md").read_text("utf-8")
    assert f"{parity['max_logit_difference']:.2g}" in card
    assert set(manifest["files"]) == {
        path.relative_to(tiny_bundle).as_posix()
        for path in tiny_bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_fp16_graph_keeps_normalizations_in_fp32_and_halves_the_weights(tiny_bundle: Path) -> None:
    graph = onnx.load(str(tiny_bundle / "onnx" / "model_fp16.onnx")).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    norms = [node for node in graph.node if "LayerNormalization" in node.op_type]
    assert len(norms) == 5
    for node in norms:
        weights = [name for name in node.input if name in kinds]
        assert weights
        assert {kinds[name] for name in weights} == {onnx.TensorProto.FLOAT}
    halves = [tensor for tensor in graph.initializer if len(tensor.dims) == 2
              and tensor.data_type == onnx.TensorProto.FLOAT16]  # fmt: skip
    assert len(halves) >= 8


def test_a_failed_gate_writes_nothing_and_says_why(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(variants=("fp32",), gate=Gate(max_difference=0.0))
    with pytest.raises(ExportError, match=r"fp32: max \|logit difference\| .* is not below 0"):
        export(tiny_checkpoint, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_force_writes_and_records_the_failure(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(variants=("fp32",), gate=Gate(max_difference=0.0), force=True)
    manifest = export(tiny_checkpoint, tmp_path / "out", options)
    assert "not below 0" in manifest["verification_failed"]
    assert "Verification failed" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert RefusalClassifier(tmp_path / "out").classify(CONVERSATIONS[0]).label


def test_only_bundles_are_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ExportError, match="is no bundle"):
        export(tiny_checkpoint, tmp_path, ExportOptions(variants=("fp32",)))
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_missing_fusions_are_an_error(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    traced = trace(checkpoint.model)
    with pytest.raises(ExportError, match="0 of 2 Attention"):
        check_fusions(traced, 2, embedding=True)
    assert fusion_counts(traced) == {}
    assert fusion_counts(fuse(traced, checkpoint.config, embedding=False))["Attention"] == 2


def _copy(source: Path, target: Path, **changes: dict[str, Any]) -> Path:
    """Copies a checkpoint and updates its JSON files, named by their stem."""
    shutil.copytree(source, target)
    for stem, update in changes.items():
        path = target / f"{stem}.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **update}), "utf-8")
    return target


def test_unusable_checkpoints_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither a folder nor a Hub id"):
        load_checkpoint(tmp_path / "absent")
    no_tokenizer = _copy(tiny_checkpoint, tmp_path / "a")
    (no_tokenizer / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"has no tokenizer\.json; save the checkpoint's fast"):
        load_checkpoint(no_tokenizer)
    with pytest.raises(ExportError, match="different checkpoints"):
        load_checkpoint(_copy(tiny_checkpoint, tmp_path / "b", config={"vocab_size": 20}))
    unclear = {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}}
    with pytest.raises(ExportError, match="--refusal-label"):
        load_checkpoint(_copy(tiny_checkpoint, tmp_path / "c", config=unclear))
    assert load_checkpoint(tmp_path / "c", refusal="B").refusal_id == 1
    headless = _copy(tiny_checkpoint, tmp_path / "d")
    weights = load_file(headless / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"lacks weights \(classifier\.weight"):
        load_checkpoint(headless)


def test_swapped_labels_are_read_not_assumed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    swapped = {"id2label": {"0": "Refusal", "1": "Non-refusal"},
               "label2id": {"Refusal": 0, "Non-refusal": 1}}  # fmt: skip
    folder = _copy(tiny_checkpoint, tmp_path / "swapped", config=swapped)
    export(folder, tmp_path / "out", ExportOptions(variants=("fp32",)))
    verdict = RefusalClassifier(tmp_path / "out").classify(CONVERSATIONS[0])
    chance = 1 / (1 + np.exp(verdict.logits[1] - verdict.logits[0]))
    assert verdict.refusal_probability == pytest.approx(chance)


def test_pruning_keeps_the_logits_of_texts_whose_segmentation_is_unchanged(
    tiny_checkpoint: Path,
) -> None:
    original = load_checkpoint(tiny_checkpoint)
    dropped = {"▁please", "▁désolé", "▁hello"}
    pieces = {piece for piece, _ in original.tokenizer["model"]["vocab"]} - dropped
    pruned = prune(original, pieces)
    assert pruned.config["vocab_size"] == original.config["vocab_size"] - 3
    texts = load_texts(EXAMPLES)
    before, after = encode_texts(original, texts), encode_texts(pruned, texts)
    old, new = original.make_tokenizer(), pruned.make_tokenizer()
    same = [
        number
        for number, (a, b) in enumerate(zip(before, after, strict=True))
        if [old.id_to_token(i) for i in a] == [new.id_to_token(i) for i in b]
    ]
    assert len(same) > 20
    logits = [
        torch_logits(checkpoint.model, [ids[number] for number in same], title="")
        for checkpoint, ids in ((original, before), (pruned, after))
    ]
    np.testing.assert_array_equal(*logits)
    spelled = new.encode("please")
    assert "".join(spelled.tokens[1:-1]) == "▁please"
    assert 3 not in spelled.ids
    role = new.encode("<|assistant|>", add_special_tokens=False)
    assert role.tokens == ["<|assistant|>"]


def test_pruning_keeps_control_tokens_and_single_characters(tiny_checkpoint: Path) -> None:
    original = load_checkpoint(tiny_checkpoint)
    pruned = prune(original, [])
    left = [piece for piece, _ in pruned.tokenizer["model"]["vocab"]]
    assert all(len(piece.removeprefix("▁")) <= 1 or piece.startswith("<") for piece in left)
    assert {"<s>", "</s>", "<unk>", "<pad>", "<mask>", "a", "你"} <= set(left)
    assert len(original.tokenizer["model"]["vocab"]) > len(left), "the original was changed"


def test_shipped_list_of_pieces_covers_the_scripts_of_37_languages() -> None:
    pieces = load_pieces("languages37")
    assert 100_000 < len(pieces) < 120_000
    for piece in ("▁the", "▁не", "的", "です", "नहीं", "لا", "ไม่", "ព្រះ", "မြန်မာ", "ગુજરાત", "తెలుగు"):
        assert any(piece in kept for kept in pieces), piece
    with pytest.raises(ExportError, match="no list of pieces"):
        load_pieces("absent")


def _blocks(rows: int, *, seed: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A table that came from 4-bit blocks of 32: integers times fp16 scales, -8 the extreme."""
    random = np.random.default_rng(seed)
    integers = random.integers(-7, 8, (rows, 2, 32))
    integers[..., 5] = -8
    scales = random.normal(size=(rows, 2, 1)).astype(np.float16).astype(np.float32)
    return (integers * scales).astype(np.float32).reshape(rows, 64)


def test_four_bit_blocks_are_found_exact() -> None:
    table = _blocks(50)
    table[7] = 0
    integers, scales, leading = exact_int4(table)
    assert leading == 50
    back = integers.reshape(50, 2, 32) * scales[..., None]
    np.testing.assert_array_equal(back.reshape(50, 64), table)
    table[40, 3] *= 1.01
    assert exact_int4(table)[2] == 40


def _embedding_graph(table: np.ndarray[Any, np.dtype[np.float32]]) -> onnx.ModelProto:
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["out"], name="lookup")],
        "embedding",
        [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["b", "s", 64])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


@pytest.mark.parametrize("tail", [0, 4])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_quantized_embedding_looks_up_the_same_rows(tail: int, bits: int | None) -> None:
    import onnxruntime

    table = _blocks(90)
    random = np.random.default_rng(3).normal(size=(tail, 64)).astype(np.float32)
    table = np.concatenate([table, random]).astype(np.float32)
    model = _embedding_graph(table)
    how = quantize_word_embedding(model, bits=bits)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    ids = np.arange(len(table), dtype=np.int64)[None]
    found = session.run(None, {"input_ids": ids})[0][0]
    if bits == 8:
        assert how == "int8 blocks of 32"
        assert np.abs(found - table).max() < np.abs(table).max() / 127
    else:
        assert how.startswith("int4 blocks of 32, exact")
        assert ("last 4 rows fp32" in how) == bool(tail)
        np.testing.assert_array_equal(found, table)


def test_calibration_of_scores_reaches_the_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    points = {"high_precision": 0.9, "high_recall": 0.2}
    found = {"expected_calibration_error": 0.1}
    report = {"temperature": 1.7, "rows": 5, "before": found, "after": found, "points": {
        "default": {"threshold": 0.5, "precision": 0.98, "recall": 0.97}}}  # fmt: skip
    scores.write_text(json.dumps({**report, "operating_points": points}), "utf-8")
    options = ExportOptions(variants=("fp32",), scores=scores)
    manifest = export(tiny_checkpoint, tmp_path / "bundle", options)
    assert manifest["calibration"] == {"method": "temperature", **report}
    assert manifest["operating_points"] == points
    assert "temperature of 1.7" in (tmp_path / "bundle" / "README.md").read_text("utf-8")
    for wrong in ("[]", '{"temperature": 0}', "{}", '{"temperature": 1, "operating_points": [2]}'):
        scores.write_text(wrong, "utf-8")
        with pytest.raises(ExportError, match="temperature"):
            export(tiny_checkpoint, tmp_path / "other", options)
    assert not (tmp_path / "other").exists()


def test_profiles_reach_the_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(variants=("fp32",), profiles={"default": 64, "fast": 48})
    manifest = export(tiny_checkpoint, tmp_path / "bundle", options)
    assert manifest["profiles"] == load_bundle(tmp_path / "bundle").profiles
    assert manifest["profiles"] == {"default": 64, "fast": 48}
    for tokens, message in ((999, "has 999 tokens, the checkpoint takes 128"), (3, "found 3")):
        with pytest.raises(ExportError, match=f"profile fast.*{message}"):
            export(tiny_checkpoint, tmp_path / "other", replace(options, profiles={"fast": tokens}))
    assert "48 (fast)" in (tmp_path / "bundle" / "README.md").read_text("utf-8")


def test_large_graphs_keep_their_weights_in_a_file_of_their_own(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(variants=("int8",))
    small = export(tiny_checkpoint, tmp_path / "small", options)
    assert small["graphs"]["int8"]["external_data"] == []
    monkeypatch.setattr(bundle_writer, "_INLINE_BYTES", 0)
    large = export(tiny_checkpoint, tmp_path / "large", options)
    assert large["graphs"]["int8"]["external_data"] == ["onnx/model_int8.onnx_data"]
    graph, data = (tmp_path / "large" / "onnx" / f"model_int8.onnx{end}" for end in ("", "_data"))
    assert graph.stat().st_size < data.stat().st_size
    assert graph.stat().st_mode == data.stat().st_mode
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    assert config["transformers.js_config"] == {
        "use_external_data_format": {"model_int8.onnx": True}
    }
    text = "<|user|>Hello<|assistant|>Sorry, no."
    assert RefusalClassifier(tmp_path / "large").classify(text).logits == (
        RefusalClassifier(tmp_path / "small").classify(text).logits
    )


def test_skips_apart_compute_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    fused = fuse(trace(checkpoint.model), checkpoint.config, embedding=False)
    before = fused.SerializeToString()
    assert split_skips(fused) == 2 * checkpoint.config["num_hidden_layers"]
    onnx.checker.check_model(fused)
    kinds = [node.op_type for node in fused.graph.node]
    assert "SkipLayerNormalization" not in kinds
    # Nor does onnxruntime fuse them again when it opens the graph.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        fused.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    opened = {node.op_type for node in onnx.load(tmp_path / "opened.onnx").graph.node}
    assert "LayerNormalization" in opened
    assert "SkipLayerNormalization" not in opened
    ids = np.arange(5, 25)[None]
    logits = []
    for content in (before, fused.SerializeToString()):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        feeds = {node.name: ids if node.name == "input_ids" else np.ones_like(ids) * (
            "mask" in node.name) for node in session.get_inputs()}  # fmt: skip
        logits.append(session.run(None, feeds)[0])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_embedding_of_few_codewords_becomes_codes() -> None:
    import onnxruntime

    rng = np.random.default_rng(4)
    words = rng.normal(size=(16, 256, 4)).astype(np.float32)
    codes = rng.integers(256, size=(700, 16))
    table = np.concatenate([words[group, codes[:, group]] for group in range(16)], axis=1)
    model = _embedding_graph(table)
    assert quantize_word_embedding(model) == "256 codewords for every 4 columns, exact"
    assert model.ByteSize() < table.nbytes / 2
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    ids = np.arange(700, dtype=np.int64).reshape(2, 350)
    found = session.run(None, {"input_ids": ids})[0]
    np.testing.assert_array_equal(found.reshape(700, 64), table)
    # One codeword more than fits, and the table is none of this kind.
    table[:257, :4] = rng.normal(size=(257, 4))
    assert quantize_word_embedding(_embedding_graph(table)) == "int8 blocks of 32"


def test_embedding_that_came_from_no_blocks_gets_eight_bits() -> None:
    table = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    assert quantize_word_embedding(_embedding_graph(table)) == "int8 blocks of 32"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint", seed=3, layers=1)
    out = tmp_path / "out"
    labelled = tmp_path / "eval.jsonl"
    rows = EXAMPLES.read_text("utf-8").splitlines()[:12]
    labelled.write_text("\n".join(rows), "utf-8")
    arguments = [str(checkpoint), str(out), "--variants", "fp32", "--eval", str(labelled),
                 "--name", "my-model", "--model-version", "2.0.0",
                 "--profiles", "default=64,fast=32"]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "max |logit difference|" in printed
    assert "peak memory" in printed
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert (manifest["name"], manifest["version"]) == ("my-model", "2.0.0")
    assert manifest["profiles"] == {"default": 64, "fast": 32}
    assert manifest["graphs"]["fp32"]["accuracy"]["texts"] == 12
    assert manifest["graphs"]["fp32"]["accuracy"]["by_language"]["en"]["texts"] == 4
    assert cli.main([str(checkpoint), str(out), "--variants", "int4"]) == 1
    assert "variants should be among" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([str(checkpoint), str(out), "--profiles", "fast"])
    assert "--profiles" in capsys.readouterr().err


def test_exported_weights_do_not_share_memory_with_the_checkpoint(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    before = checkpoint.model.state_dict()["classifier.weight"].clone()
    trace(checkpoint.model)
    assert torch.equal(before, checkpoint.model.state_dict()["classifier.weight"])
    assert make_tokenizer()["added_tokens"] == checkpoint.tokenizer["added_tokens"]


def test_a_ruinous_vocabulary_does_not_pass_the_gate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("▁sorry\n", "utf-8")
    options = ExportOptions(variants=("fp32",), vocabulary=str(few), gate=Gate(min_agreement=1.0))
    with pytest.raises(ExportError, match="vocabulary: label agreement"):
        export(tiny_checkpoint, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_texts_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "assistant", "content": "one\u2028two\u0085three"}]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    assert load_texts(path).conversations == [row]
