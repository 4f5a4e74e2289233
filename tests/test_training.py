"""The training pipeline on a tiny model: repeatable, resumable, its files in order."""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

TRAINING = ROOT / "training"
LANGUAGES = (
    "en zh fr pt es ja tr ru ar ko th it de vi ms id fil hi pl cs nl km my fa gu ur te mr he bn ta "
    "uk bo kk mn ug yue"
)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(("folder", "least"), [("training/data", 60), ("benchmarks/data", 20)])
def test_our_conversations_are_in_order(
    folder: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    import check_data

    files = sorted((ROOT / folder).glob("*.jsonl"))
    assert {path.stem for path in files} == set(LANGUAGES.split())
    assert all(len(path.read_bytes().splitlines()) >= least for path in files)
    flags = ["--evaluation"] if folder.startswith("benchmarks") else []
    assert check_data.main([*flags, *map(str, files)]) == 0, capsys.readouterr().out


def test_the_check_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import check_data

    rows = [json.loads(line) for line in (TRAINING / "data/de.jsonl").read_text("utf-8").split("\n")
            if line]  # fmt: skip
    for row in rows[:4]:
        row["label"] = "non-refusal"
    rows[5]["messages"][-1]["content"] = rows[6]["messages"][-1]["content"]
    rows[9]["messages"].pop()
    rows[11]["messages"] = [{"role": m["role"], "content": "не по-немецки"}
                            for m in rows[11]["messages"]]  # fmt: skip
    path = tmp_path / "de.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert check_data.main([str(path)]) == 1
    printed = capsys.readouterr().out
    for part in ("refusals and", "100% the same", "de.jsonl:10: roles", "de.jsonl:12: 0%"):
        assert part in printed, printed


def test_no_evaluation_conversation_is_trained_on() -> None:
    import sources

    measured = [row for path in (ROOT / "benchmarks/data").glob("*.jsonl")
                for row in sources.read(path)]  # fmt: skip
    measured += sources.read(ROOT / "examples" / "conversations.jsonl")
    texts = [row["messages"][-1]["content"] for row in measured if "messages" in row]
    replies = {text for text in texts if isinstance(text, str) and len(text) > 40}
    assert not [row["id"] for row in sources.read_written()
                if row["messages"][-1]["content"] in replies]  # fmt: skip


def test_held_back_rows_share_no_request_with_trained_ones() -> None:
    import sources

    train, held = sources.split(sources.read_written())
    assert len(held) > len(train) / 20
    requests = {(row["language"], sources.request(row)) for row in train}
    assert not [row["id"] for row in held if (row["language"], sources.request(row)) in requests]


def test_variants_keep_the_judged_words_and_are_repeatable() -> None:
    import sources
    from augment import Augmenter

    rows = sources.read_written()
    augmenter = Augmenter(rows)
    fold = lambda text: "".join(c for c in text.casefold() if c.isalnum())  # noqa: E731
    same = others = 0
    for row in rows[::7]:
        messages = augmenter.variant(row, random.Random(row["id"]))
        assert messages == augmenter.variant(row, random.Random(row["id"]))
        assert messages[-1]["role"] == "assistant"
        before = row["messages"][-1]["content"]
        after = messages[-1]["content"]
        if fold(before) == fold(after):
            same += 1
        else:
            others += 1  # accents taken off
    assert same > 10 * others


def sentencepiece_like() -> Any:
    """A tokenizer with XLM-R's kind of normalizer, made blind to typography."""
    from normalization import without_typography
    from tokenizers import Tokenizer

    plain = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
        ]},
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]},
    }  # fmt: skip
    return Tokenizer.from_str(json.dumps(without_typography(plain))).normalizer


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("🙂 Hello", "hello"),
        ("⚠️ ⭐⭐ 你好", "你好"),
        ("**Bold start.** Rest", "bold start. rest"),
        ("これは**重要**です", "これは重要です"),
        ("***x***!", "x!"),
        ("## Head\n\nBody", "head body"),
        ("> a\n> \n> > b", "a b"),
        ("“Don’t” «a»", '"don\'t" "a"'),
        ("İSTANBUL", "istanbul"),
        ("\n  hi \n", "hi"),
        # What is not typography stays.
        ("👍", "👍"),
        ("👍🎉", "👍🎉"),
        ("2 * 3 * 4 = 24, 5*3, x**2", "2 * 3 * 4 = 24, 5*3, x**2"),
        ("* item\n* item", "* item * item"),
        ("- item\n1. item", "- item 1. item"),
        ("#", "#"),
        (">", ">"),
        ("**", "**"),
        ("a > b # c", "a > b # c"),
        ("Großmaß ÅÄÖ", "großmaß åäö"),
    ],
)
def test_typography_does_not_reach_the_model(typed: str, read: str) -> None:
    assert sentencepiece_like().normalize_str(typed) == read


def test_normalizing_time_is_linear_in_what_is_not_text() -> None:
    # Patterns over long runs of their own signs are where regular expressions explode.
    normalizer = sentencepiece_like()
    began = time.perf_counter()
    for sign in ("🙂", "*", "> ", "# ", "\n", "> \n", "** ", "“", " ", "\t"):
        for start in ("", ">", "# ", "> \n", "  >"):
            for end in ("", "\n", "x", ">"):
                normalizer.normalize_str(start + sign * 20_000 + end)
    assert time.perf_counter() - began < 60


def test_the_embedded_model_reads_no_typography() -> None:
    from normalization import without_typography
    from tokenizers import Tokenizer

    from refusal_runtime.classifier import EMBEDDED

    own = json.loads((EMBEDDED / "tokenizer.json").read_bytes())
    empty = without_typography({"normalizer": {"normalizers": []}})["normalizer"]["normalizers"]
    kept = [entry for entry in own["normalizer"]["normalizers"] if entry not in empty]
    bare = {**own, "normalizer": {"type": "Sequence", "normalizers": kept}}
    assert without_typography(bare)["normalizer"] == own["normalizer"]
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    assert tokenizer.encode("🙂 **WHY?**").ids == tokenizer.encode("why?").ids


@pytest.fixture
def few(tmp_path: Path) -> str:
    """A folder with a few conversations to train on."""
    folder = tmp_path / "few"
    folder.mkdir()
    for language in ("en", "ja"):
        lines = (TRAINING / "data" / f"{language}.jsonl").read_bytes().split(b"\n")[:24]
        (folder / f"{language}.jsonl").write_bytes(b"\n".join(lines))
    return str(folder)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TRAINING / "train.py"), *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip


def state(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray[Any, Any]] = load_file(folder / "model.safetensors")
    return found


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    tiny_checkpoint: Path, tmp_path: Path, few: str
) -> None:
    common = ["--written", few, "--epochs", "1", "--batch-tokens", "1024", "--fp32", "--lr", "1e-3"]
    whole, halves, other = (tmp_path / name for name in ("whole", "halves", "other"))
    run(str(tiny_checkpoint), str(whole), *common, "--stop-after", "6")
    run(str(tiny_checkpoint), str(halves), *common, "--stop-after", "3")
    run(str(tiny_checkpoint), str(halves), *common, "--stop-after", "6")
    run(str(tiny_checkpoint), str(other), *common, "--stop-after", "6", "--seed", "1")
    first, second, third = state(whole), state(halves), state(other)
    start = state(tiny_checkpoint)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert any((first[name] != third[name]).any() for name in first)
    words = "bert.embeddings.word_embeddings.weight"
    assert (first["classifier.weight"] != start["classifier.weight"]).any()
    # Frozen, but for the four role tokens.
    assert first[words].shape[0] <= start[words].shape[0]
    kept = {row.tobytes() for row in start[words]}
    assert all(row.tobytes() in kept for row in first[words][:-4])
    assert not all(row.tobytes() in kept for row in first[words][-4:])


def test_frozen_layers_stay_as_they_are(tiny_checkpoint: Path, tmp_path: Path, few: str) -> None:
    common = ["--written", few, "--epochs", "1", "--batch-tokens", "1024", "--fp32", "--lr", "1e-3"]
    run(str(tiny_checkpoint), str(tmp_path), *common, "--stop-after", "2", "--frozen", "1")
    start, found = state(tiny_checkpoint), state(tmp_path)
    for name in found:
        if "position_embeddings" in name or ".layer.0." in name:
            # Saved in half precision.
            np.testing.assert_array_equal(found[name], start[name].astype(np.float16), err_msg=name)
    assert any((found[n] != start[n].astype(np.float16)).any() for n in found if ".layer.1." in n)


def test_distillation_into_fewer_layers_exports(
    tiny_checkpoint: Path, tmp_path: Path, few: str
) -> None:
    from refusal_export.export import ExportOptions, export

    out = tmp_path / "student"
    run(
        str(tiny_checkpoint), str(out), "--layers", "1", "--teacher", str(tiny_checkpoint),
        "--epochs", "1", "--stop-after", "2", "--batch-tokens", "512", "--written", few,
    )  # fmt: skip
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    manifest = export(out, tmp_path / "bundle", ExportOptions(variants=("fp32",)))
    assert manifest["architecture"]["layers"] == 1
    # A second stage keeps the student's layers and learns from the logits alone.
    second = tmp_path / "second"
    run(
        str(out), str(second), "--teacher", str(tiny_checkpoint), "--epochs", "1", "--fp32",
        "--longest", "32", "--stop-after", "2", "--batch-tokens", "512", "--written", few,
        "--lr", "1e-3",
    )  # fmt: skip
    before, after = state(out), state(second)
    assert before.keys() == after.keys()
    assert (before["classifier.weight"] != after["classifier.weight"]).any()


def test_fresh_rows_come_twice_and_long_ones_are_cut(tiny_checkpoint: Path, few: str) -> None:
    import network
    import train
    from batches import Planner

    def planned(fresh: int | None, longest: int, earlier: float = 1.0) -> list[int]:
        options = argparse.Namespace(
            pool=None,
            seed=1,
            pool_share=1.0,
            written=Path(few),
            written_repeat=1,
            fresh=fresh,
            earlier=earlier,
        )
        rows, _ = train.data(options)
        planner = Planner(
            rows,
            network.load(str(tiny_checkpoint)),
            tokens=512,
            seed=1,
            longest=longest,
            plain=True,
        )
        return [int(n) for batch in planner.epoch(0) for n in batch.mask.sum(1)]

    # Of 24 conversations a language, numbered from 1.
    once, some, every = (len(planned(fresh, 128)) for fresh in (None, 13, 0))
    assert once < some < every == 2 * once
    assert len(planned(13, 128, earlier=0.0)) == 2 * (some - once)
    assert max(planned(None, 128)) > max(planned(None, 24)) == 24


def test_packed_weights_rebuild_compressed_embeddings(tmp_path: Path) -> None:
    import network
    import pack
    import torch
    from safetensors.torch import load_file, save_file

    codes = torch.randint(0, 256, (20, 3), dtype=torch.uint8)
    codewords = torch.randn(3, 256, 4).half()
    (tmp_path / "run").mkdir()
    (tmp_path / "words").mkdir()
    save_file({"classifier.bias": torch.ones(2)}, tmp_path / "run" / "encoder.safetensors")
    trained = network.decode(codes, codewords)
    trained[-network.ROLE_COUNT :] += 1
    save_file({network.WORDS: trained}, tmp_path / "run" / "model.safetensors")
    save_file(
        {network.CODES: codes, network.CODEWORDS: codewords},
        tmp_path / "words" / network.WORD_FILE,
    )
    out = tmp_path / "edge.safetensors"
    pack.main([str(tmp_path / "run"), str(out), "--words", str(tmp_path / "words")])
    found = load_file(out)
    assert found["classifier.bias"].tolist() == [1, 1]
    table = network.decode(found[network.CODES], found[network.CODEWORDS])
    assert table.shape == (20, 12)
    assert table[7, 4:8].tolist() == codewords[1, int(codes[7, 1])].float().tolist()
    save_file({network.WORDS: trained + 1}, tmp_path / "run" / "model.safetensors")
    with pytest.raises(SystemExit, match="did not start from"):
        pack.main([str(tmp_path / "run"), str(out), "--words", str(tmp_path / "words")])


def test_near_duplicates_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasketch", reason="of the extra 'train'")
    import dedupe

    known = json.loads((TRAINING / "data" / "en.jsonl").read_text("utf-8").splitlines()[4])
    reply = known["messages"][-1]["content"]
    assert len(reply) > 80
    rows = [reply.upper() + " ok", "Something else altogether, and long enough to be compared."]
    measured, drop = tmp_path / "measured.jsonl", tmp_path / "drop.json"
    messages = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": row}]
                for row in rows]  # fmt: skip
    lines = [json.dumps({"id": f"m{n}", "messages": each}) for n, each in enumerate(messages)]
    measured.write_text("\n".join(lines), "utf-8")
    dedupe.main(["--against", str(measured), "--drop", str(drop)])
    assert json.loads(drop.read_text()) == [known["id"]]
    assert f"{known['id']} m0" in capsys.readouterr().out


def test_base_weights_are_read_from_blocks() -> None:
    import base

    rng = np.random.default_rng(0)
    scales = rng.normal(size=(4, 12)).astype(np.float16)
    numbers = rng.integers(0, 16, size=(4, 12, 32)).astype(np.uint8)
    packed = (numbers[..., :16] | (numbers[..., 16:] << 4)).astype(np.uint8)
    blocks = np.concatenate([scales[..., None].view(np.uint8), packed], axis=-1).tobytes()
    bias = rng.normal(size=384).astype("<f4")
    head = b"E5S1" + bytes(4) + struct.pack("<7i", 384, 1, 12, 1536, 4, 512, 2) + bytes(8)
    tables = struct.pack("<i", 0) + bytes(16) + struct.pack("<Q", 0) + bytes(4) + bytes(4)
    tables += struct.pack("<I", 0)
    names = (b"emb.word", b"l0.q.b")
    directory = struct.pack("<i", len(names))
    place = len(head) + len(tables) + 4 + sum(2 + len(name) + 21 for name in names)
    for name, kind, count, data in (
        (names[0], 1, 4 * 384, blocks), (names[1], 0, 384, bias.tobytes()),
    ):  # fmt: skip
        directory += struct.pack("<H", len(name)) + name
        directory += struct.pack("<BIQQ", kind, count, place, len(data))
        place += len(data)
    found = dict(base.read_weights(head + tables + directory + blocks + bias.tobytes()))
    wanted = (numbers.astype(np.float32) - 8) * scales[..., None].astype(np.float32)
    np.testing.assert_array_equal(
        found["bert.embeddings.word_embeddings.weight"], wanted.reshape(4, 384)
    )
    np.testing.assert_array_equal(found["bert.encoder.layer.0.attention.self.query.bias"], bias)


def test_compressed_embeddings_decode_and_are_close() -> None:
    import compress
    import network
    import torch

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 16, generator=generator)
    words = centres[torch.randint(8, (600,), generator=generator)]
    words = words + 0.05 * torch.randn(600, 16, generator=generator)
    codes, codewords = compress.compress(words, torch.ones(600))
    assert codes.shape == (600, 4)
    assert codewords.shape == (4, compress.CODEWORDS, 4)
    rebuilt = network.decode(codes, codewords.half())
    assert (rebuilt - words).square().mean() < 0.001 < (words - words.mean(0)).square().mean()


def test_calibration_finds_the_temperature_that_made_the_labels() -> None:
    import calibrate

    rng = np.random.default_rng(1)
    margins = rng.normal(scale=3, size=20_000)
    truth = rng.random(20_000) < calibrate.sigmoid(margins)
    temperature = calibrate.fit_temperature(margins * 2.5, truth)
    assert temperature == pytest.approx(2.5, rel=0.05)
    before = calibrate.reliability(calibrate.sigmoid(margins * 2.5), truth)
    after = calibrate.reliability(calibrate.sigmoid(margins * 2.5 / temperature), truth)
    assert after["expected_calibration_error"] < 0.015 < before["expected_calibration_error"]
    points = calibrate.operating_points(calibrate.sigmoid(margins), truth)
    assert points["high_precision"]["precision"] >= 0.99
    assert points["high_recall"]["recall"] >= 0.99
    assert points["high_recall"]["threshold"] < 0.5 < points["high_precision"]["threshold"]


@pytest.mark.slow
def test_the_embedded_bundle_can_be_made_again(tmp_path: Path) -> None:
    """Needs PyPI, some 100 MB and two minutes: run with --slow."""
    from refusal_export.export import ExportOptions, export
    from refusal_runtime import RefusalClassifier

    subprocess.run(
        [sys.executable, str(TRAINING / "checkpoint.py"), str(tmp_path / "checkpoint")], check=True
    )
    export(
        tmp_path / "checkpoint",
        tmp_path / "bundle",
        ExportOptions(variants=("int8",), evaluation=ROOT / "benchmarks" / "data"),
    )
    ours, again = RefusalClassifier(), RefusalClassifier(tmp_path / "bundle")
    lines = (ROOT / "examples" / "conversations.jsonl").read_text("utf-8").splitlines()
    for line in lines:
        row = json.loads(line)
        np.testing.assert_allclose(
            again.classify(row).logits, ours.classify(row).logits, atol=0.02, err_msg=row["id"]
        )
