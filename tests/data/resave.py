"""Made the checkpoints beside this file: random classifiers saved by two transformers versions.

    python resave.py make saved-by-transformers-4     # with transformers 4.57
    python resave.py resave saved-by-transformers-4 saved-by-transformers-5     # with 5.x

The second is a load and a save of the first, model and tokenizer, so both hold the same weights in
each version's own way of writing configuration and tokenizer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ModernBertConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROLE_TOKENS, TOKENIZER_CONFIG, make_tokenizer

LABELS = {
    "id2label": {0: "Non-refusal", 1: "Refusal"},
    "label2id": {"Non-refusal": 0, "Refusal": 1},
}


def make(folder: Path) -> None:
    """Saves a tiny BERT and a tiny ModernBERT with bases that are not the library's defaults."""
    size = 1 + max(token["id"] for token in make_tokenizer()["added_tokens"])
    common = {"vocab_size": size, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 1}
    configs = {
        "bert": BertConfig(
            **common, **LABELS, num_hidden_layers=2, intermediate_size=64,
            max_position_embeddings=128, initializer_range=0.3,
        ),
        "modernbert": ModernBertConfig(
            **common, **LABELS, num_hidden_layers=4, intermediate_size=48, local_attention=16,
            max_position_embeddings=128, initializer_range=0.3, initializer_cutoff_factor=3.0,
            global_rope_theta=80000.0, local_rope_theta=5000.0, global_attn_every_n_layers=2,
            bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2,
            reference_compile=False,
        ),
    }  # fmt: skip
    for name, config in configs.items():
        torch.manual_seed(7)
        AutoModelForSequenceClassification.from_config(config).eval().save_pretrained(folder / name)
        text = json.dumps(make_tokenizer(), ensure_ascii=False)
        (folder / name / "tokenizer.json").write_text(text, "utf-8")
        (folder / name / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), "utf-8")


def resave(source: Path, target: Path) -> None:
    """Loads with the transformers at hand and saves again."""
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        model.eval().save_pretrained(target / folder.name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert set(ROLE_TOKENS) <= set(tokenizer.get_vocab())
        tokenizer.save_pretrained(target / folder.name)
        ids = torch.arange(40)[None] % model.config.vocab_size
        with torch.no_grad():
            print(folder.name, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
        resave(Path(sys.argv[2]), Path(sys.argv[2]))
    else:
        resave(Path(sys.argv[2]), Path(sys.argv[3]))
