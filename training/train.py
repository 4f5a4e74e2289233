"""Fine-tunes a refusal classifier, or distills one into fewer layers.

    python training/train.py START OUT --pool pool.jsonl.gz [--dev dev.jsonl.gz]
    python training/train.py TEACHER OUT --layers 0,2,4,6,8,11 --teacher TEACHER --pool ...
    python training/train.py STUDENT OUT --teacher TEACHER --pool ...

START is a checkpoint: a folder or a Hub id.  Everything that can be repeated is: the same
arguments give the same run, and a run that was stopped goes on from OUT/state.pt, which is written
every few minutes.  Without --pool the project's own conversations alone are trained on.

Loss: cross entropy with label smoothing; with a teacher also the KL divergence of its softened
logits (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network") and, where --layers says
which of its layers a student begins with, the mean square error of hidden states between matched
layers (Jiao et al. 2020, "TinyBERT"), on the same tokens.  A student that has been through that
goes on from the logits alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import network
import sources
import torch
from batches import Batch, Planner
from transformers import BertForSequenceClassification

from refusal_export.checkpoint import Checkpoint

_SAVE_SECONDS = 180.0
_SOFTNESS = 2.0  # temperature of the teacher's logits
_WARM_UP = 0.06  # share of the steps
_SMOOTHING = 0.05  # labels of the pool are a machine's


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, saves, measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("start", help="checkpoint to start from, a folder or Hub id")
    parser.add_argument("out", type=Path, help="where the trained checkpoint goes")
    parser.add_argument("--pool", type=Path, help="public conversations, .jsonl or .jsonl.gz")
    parser.add_argument("--pool-share", type=float, default=1.0, help="of sources.POOL_SAMPLE")
    parser.add_argument("--drop", type=Path, help="ids to leave out of the pool, from dedupe.py")
    parser.add_argument("--written", type=Path, default=sources.WRITTEN, help="our own text")
    parser.add_argument("--written-repeat", type=int, default=1, help="0 leaves ours out")
    parser.add_argument("--dev", type=Path, help="labelled conversations to measure on")
    parser.add_argument("--dev-limit", type=int, default=600)
    parser.add_argument("--fresh", type=int, help="our text from this number on comes twice")
    parser.add_argument("--earlier", type=float, default=1.0, help="share of our text before that")
    parser.add_argument("--frozen", type=int, default=0, help="first layers that stay as they are")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a conversation")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--decay", type=float, default=0.01, help="weight decay")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--layers", help="which layers of START to keep, as 0,2,4")
    parser.add_argument("--teacher", help="checkpoint to distill from, a folder or Hub id")
    parser.add_argument("--lora", type=int, help="rank of LoRA adapters instead of full tuning")
    parser.add_argument("--plain", action="store_true", help="no augmentation")
    parser.add_argument("--response-only", action="store_true")
    parser.add_argument("--max-steps", type=int, help="plan so many steps, for comparisons")
    parser.add_argument("--stop-after", type=int, help="stop there; the same call again goes on")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fp32", action="store_true", help="for processors without bfloat16")
    options = parser.parse_args(arguments)
    start = network.load(options.start)
    layers = [int(number) for number in options.layers.split(",")] if options.layers else None
    model = network.trainable(start, layers=layers, dropout=options.dropout)
    if options.frozen:
        for part in (model.bert.embeddings, *model.bert.encoder.layer[: options.frozen]):
            part.requires_grad_(False)
    tuned = adapt(model, options.lora) if options.lora else model
    teacher = network.trainable(network.load(options.teacher)).eval() if options.teacher else None
    rows, held = data(options)
    planner = Planner(
        rows,
        start,
        tokens=options.batch_tokens,
        seed=options.seed,
        longest=options.longest,
        plain=options.plain,
        response_only=options.response_only,
    )
    print(f"{len(rows):,} conversations, {len(held):,} held back", flush=True)
    fit(tuned, teacher, layers, planner, options)
    if options.lora:
        tuned.merge_and_unload()
    network.save(model, start, options.out)
    dev = sources.read(options.dev) if options.dev else []
    result = {
        name: evaluate(
            model, start, some, bf16=not options.fp32, response_only=options.response_only
        )
        for name, some in (
            ("held_back", held),
            ("dev", dev[:: max(1, len(dev) // options.dev_limit)]),
        )
    }
    record = {
        "arguments": {key: str(value) for key, value in vars(options).items() if value is not None},
        "conversations": len(rows),
        "results": result,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (options.out / "training.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(record, ensure_ascii=False))


def data(options: argparse.Namespace) -> tuple[list[sources.Row], list[sources.Row]]:
    """Returns the rows to train on and our own rows that are held back."""
    rows: list[sources.Row] = []
    if options.pool:
        dropped = set(json.loads(options.drop.read_bytes())) if options.drop else set()
        pool = [row for row in sources.read(options.pool) if row["id"] not in dropped]
        pool = sources.sample_pool(pool, seed=options.seed, share=options.pool_share)
        rows, _ = sources.split(pool)
    written, held = sources.split(sources.read_written(options.written))
    rng = random.Random(options.seed)
    for row in written:
        fresh = options.fresh is not None and int(row["id"].rsplit("-", 1)[1]) >= options.fresh
        if fresh or rng.random() < options.earlier:
            rows.append({**row, "repeat": options.written_repeat * (1 + fresh)})
    return rows, held


def adapt(model: BertForSequenceClassification, rank: int) -> Any:
    """Wraps the model in LoRA adapters on every linear layer of the encoder."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["query", "key", "value", "dense"],
            modules_to_save=["classifier"],
        ),
    )


def fit(
    model: Any,
    teacher: BertForSequenceClassification | None,
    layers: list[int] | None,
    planner: Planner,
    options: argparse.Namespace,
) -> None:
    """Runs the epochs that are left, saving the state every few minutes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A shorter memory of squared gradients than Adam's usual 0.999: a run of few hundred steps at
    # these rates has once diverged with it.
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, betas=(0.9, 0.98), weight_decay=options.decay, fused=True
    )
    state_file = options.out / "state.pt"
    options.out.mkdir(parents=True, exist_ok=True)
    step = 0
    if state_file.exists():
        state = torch.load(state_file)
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"resumed at step {step}", flush=True)
    per_epoch: list[int] = []
    position = 0
    total = 0
    saved = shown = began = time.monotonic()
    losses: list[float] = []
    tokens = 0
    for epoch in range(options.epochs):
        batches = planner.epoch(epoch)
        per_epoch.append(len(batches))
        # Epochs differ by a few batches; the schedule is set by the first.
        total = total or min(len(batches) * options.epochs, options.max_steps or 10**9)
        for batch in batches:
            position += 1
            if position <= step or position > min(total, options.stop_after or total):
                continue
            step = position
            rate = options.lr * min(step / (_WARM_UP * total), (total - step + 1) / total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(options.seed * 1_000_003 + step)  # dropout, the same after a resume
            model.train()
            loss = loss_of(model, teacher, layers, batch, bf16=not options.fp32)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            tokens += int(batch.mask.sum())
            now = time.monotonic()
            if now - shown > 20:
                mean = sum(losses[-50:]) / len(losses[-50:])
                speed = tokens / (now - began)
                print(f"step {step}/{total} loss {mean:.4f} {speed:.0f} tokens/s", flush=True)
                shown = now
            if now - saved > _SAVE_SECONDS:
                remember(state_file, parameters, optimizer, step)
                saved = now
    remember(state_file, parameters, optimizer, step)


def remember(
    path: Path, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Writes the state so that a kill at any time leaves a whole one."""
    state = {
        "parameters": [parameter.detach() for parameter in parameters],
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def loss_of(
    model: Any,
    teacher: BertForSequenceClassification | None,
    layers: list[int] | None,
    batch: Batch,
    *,
    bf16: bool,
) -> torch.Tensor:
    """Returns the loss of a batch."""
    functional = torch.nn.functional
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        wanted = teacher is not None and layers is not None
        found = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=wanted)
        if teacher is not None:
            with torch.no_grad():
                guide = teacher(
                    input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=wanted
                )
    logits = found.logits.float()
    hard = functional.cross_entropy(
        logits, batch.labels, label_smoothing=_SMOOTHING, reduction="none"
    )
    loss = (hard * batch.weights).sum() / batch.weights.sum()
    if teacher is None:
        return loss
    soft = functional.kl_div(
        (logits / _SOFTNESS).log_softmax(-1),
        (guide.logits.float() / _SOFTNESS).softmax(-1),
        reduction="batchmean",
    )
    loss = 0.3 * loss + _SOFTNESS**2 * soft
    if layers is None:  # a student that has been aligned before goes on with the logits alone
        return loss
    mask = batch.mask.unsqueeze(-1).float()
    hidden = logits.new_zeros(())
    # A student's layer n stands for the teacher's layers up to the next one kept.
    ends = [*layers[1:], len(guide.hidden_states) - 1]
    for mine, theirs in zip(found.hidden_states[1:], ends, strict=True):
        a, b = mine.float(), guide.hidden_states[theirs].float()
        a = functional.layer_norm(a, a.shape[-1:])
        b = functional.layer_norm(b, b.shape[-1:])
        hidden = hidden + ((a - b).square() * mask).sum() / (mask.sum() * a.shape[-1])
    return loss + hidden / len(ends)


@torch.inference_mode()
def evaluate(
    model: BertForSequenceClassification,
    checkpoint: Checkpoint,
    rows: Iterable[sources.Row],
    *,
    bf16: bool = True,
    response_only: bool = False,
) -> dict[str, Any]:
    """Measures accuracy, overall and by kind or source and language."""
    rows = list(rows)
    if not rows:
        return {}
    logits = judge(model, checkpoint, rows, bf16=bf16, response_only=response_only)
    right = [
        bool(row_logits.argmax() == (row["label"] == "refusal"))
        for row_logits, row in zip(logits, rows, strict=True)
    ]
    groups: dict[str, list[bool]] = defaultdict(list)
    for row, good in zip(rows, right, strict=True):
        groups["all"].append(good)
        groups[row.get("kind") or row["source"]].append(good)
        groups[row["language"]].append(good)
    return {name: [round(sum(g) / len(g), 4), len(g)] for name, g in sorted(groups.items())}


@torch.inference_mode()
def judge(
    model: BertForSequenceClassification,
    checkpoint: Checkpoint,
    rows: Sequence[sources.Row],
    *,
    bf16: bool = True,
    response_only: bool = False,
) -> torch.Tensor:
    """Returns the logits of rows, float32 of shape (rows, labels), in their order."""
    planner = Planner(
        [{**row, "label": "refusal", "weight": number} for number, row in enumerate(rows)],
        checkpoint,
        tokens=4096,
        seed=0,
        plain=True,
        response_only=response_only,
    )
    model.eval()
    logits = torch.zeros(len(rows), model.config.num_labels)
    for batch in planner.epoch(0):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        logits[batch.weights.long()] = found.float()
    return logits


if __name__ == "__main__":
    main()
