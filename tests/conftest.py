"""Shared fixtures: a tiny BERT with a tokenizer of XLM-R's kind, exported once per session."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import pytest

from refusal_runtime.bundle import seal

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "data"
# Development data that is not part of the repository; tests that need it skip without it.
SHARED = ROOT.parent / "shared" / "data"
EXAMPLES = ROOT / "examples" / "conversations.jsonl"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|...|>"]
VOCABULARY = (
    "the a I you can not cannot sorry help with that is of course here an answer no yes to hello "
    "world how make what question please ne peux pas désolé aide bonjour не могу помочь привет "
    "извините नहीं माफ मदद 不 能 可以 帮助 抱歉 你好 できません すみません لا أستطيع آسف مرحبا"
)
WORDS = VOCABULARY.split()


def make_tokenizer() -> dict[str, Any]:
    """A tokenizer.json like XLM-R's: Unigram with control pieces, NFKC, Metaspace, role tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing

    characters = sorted(set(string.printable.strip() + "".join(WORDS) + "▁éñ。，！？"))
    pieces: list[tuple[str, float]] = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", -4.0 - 0.01 * rank) for rank, word in enumerate(WORDS)]
    seen = {piece for piece, _ in pieces}
    pieces += [(character, -9.0) for character in characters if character not in seen]
    pieces.append(("<mask>", 0.0))
    tokenizer = Tokenizer(Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="always")
    control = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *ROLE_TOKENS]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )  # fmt: skip
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


TOKENIZER_CONFIG = {
    "tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 128, "bos_token": "<s>",
    "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>", "additional_special_tokens": ROLE_TOKENS,
}  # fmt: skip


def save_tiny_checkpoint(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """Saves a random tiny BERT classifier whose logits differ visibly between texts."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = make_tokenizer()
    size = 1 + max(token["id"] for token in tokenizer["added_tokens"])
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128, type_vocab_size=2, pad_token_id=1,
        initializer_range=0.3, id2label={0: "Non-refusal", 1: "Refusal"},
        label2id={"Non-refusal": 0, "Refusal": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny PyTorch checkpoint."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint exported with all variants; do not write into it, copy it."""
    from refusal_export.export import ExportOptions, export

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    # A random model's labels sit near the border: its quantized graphs need not agree.
    export(tiny_checkpoint, out, ExportOptions(name="tiny", force=True))
    return out


@pytest.fixture(scope="session")
def example_rows() -> list[dict[str, Any]]:
    """The rows of examples/conversations.jsonl."""
    return [json.loads(line) for line in EXAMPLES.read_text("utf-8").splitlines()]


@pytest.fixture(scope="session")
def dev_rows() -> list[dict[str, Any]]:
    """The development set, which lives outside the repository."""
    import gzip

    path = SHARED / "dev.jsonl.gz"
    if not path.is_file():
        pytest.skip("needs the development data, which is not part of the repository")
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def edited(bundle: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a bundle with other values in its manifest."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8")) | changes
    manifest["digest"] = seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder
