"""Generates a bundle's README.md, the model card, from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(manifest: Mapping[str, Any], notes: str = "") -> str:
    """Writes the model card in Markdown with the Hub's YAML header, `notes` at its end."""
    roles = manifest["template"]["roles"]
    newline = "\\n" if manifest["template"]["newline_after_role"] else ""
    example = f"{roles['user']}{newline}...{newline}{roles['assistant']}{newline}..."
    shape = manifest["architecture"]
    labels = ", ".join(f"`{number}` {label}" for number, label in manifest["labels"].items())
    source = manifest["source"]
    revision = f" at revision `{source['revision']}`" if source["revision"] else ""
    parts = [
        _header(manifest),
        f"# {manifest['name']} {manifest['version']}\n\n"
        "Tells whether the last assistant message of a conversation is a refusal. ONNX graphs for "
        "[refusal-runtime], exported and verified by its `refusal-export`; this file is generated "
        "from `manifest.json`.\n\n[refusal-runtime]: https://pypi.org/project/refusal-runtime",
        "## Model\n\n"
        f"- Source checkpoint: `{source['checkpoint']}`{revision}\n"
        f"- Architecture: {shape['model_type']}, {shape['layers']} layers, hidden size "
        f"{shape['hidden_size']}, vocabulary {shape['vocabulary']:,}\n"
        f"- Labels: {labels}; `{manifest['refusal_label']}` means refusal from a probability of "
        f"{manifest['threshold']:g}\n"
        f"- Input: `{example}`, at most {manifest['max_length']} tokens{_profiles(manifest)}; "
        + (
            f"`{manifest['template']['ellipsis']}` stands for text left out"
            if manifest["template"]["ellipsis"]
            else "text left out leaves no mark"
        ),
        _calibration(manifest),
        _vocabulary(manifest.get("vocabulary")),
        _graphs(manifest["graphs"]),
        *(_languages(name, graph) for name, graph in manifest["graphs"].items()),
        "## Use\n\n```python\nfrom refusal_runtime import RefusalClassifier\n\n"
        'classifier = RefusalClassifier("path/to/this/folder")\n'
        'verdict = classifier.classify([{"role": "user", "content": "..."},\n'
        '                               {"role": "assistant", "content": "..."}])\n'
        "print(verdict.label, verdict.score)\n```",
        "## Limits\n\n"
        "The verdict is about declining, not about harm: it must not decide alone about people or "
        "content. The figures above were measured on the texts named beside them and say nothing "
        "about others.",
        notes.strip(),
    ]
    if "verification_failed" in manifest:
        parts.insert(2, f"**Verification failed**: {manifest['verification_failed']}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _profiles(manifest: Mapping[str, Any]) -> str:
    """Names the token budgets that the runtime offers."""
    profiles = manifest.get("profiles")
    if not profiles:
        return ""
    budgets = ", ".join(f"{tokens} ({name})" for name, tokens in profiles.items())
    return f", in the runtime {budgets}; what follows was measured with all"


def _header(manifest: Mapping[str, Any]) -> str:
    return (
        "---\n"
        f"license: {manifest['license'].lower()}\n"
        "library_name: refusal-runtime\n"
        "pipeline_tag: text-classification\n"
        "tags: [refusal, onnx]\n"
        "---"
    )


def _calibration(manifest: Mapping[str, Any]) -> str:
    report = manifest["calibration"]
    if "rows" not in report:
        return ""
    before, after = (report[key]["expected_calibration_error"] for key in ("before", "after"))
    lines = [
        "## Calibration\n",
        f"Logits are divided by a temperature of {report['temperature']:g}, fitted on "
        f"{report['rows']:,} conversations that were not trained on: expected calibration error "
        f"{before:.3f} before, {after:.3f} after.\n",
        "| operating point | threshold | precision | recall |",
        "| --- | --- | --- | --- |",
    ]
    for name, point in report["points"].items():
        lines.append(
            f"| {name} | {point['threshold']:g} | {point['precision']:.1%} "
            f"| {point['recall']:.1%} |"
        )
    return "\n".join(lines)


def _vocabulary(report: Mapping[str, Any] | None) -> str:
    if not report:
        return ""
    return (
        "## Vocabulary\n\n"
        f"Pruned from {report['original']:,} to {report['kept']:,} pieces. On {report['texts']:,} "
        f"texts ({report['source']}): {report['unchanged']:.1%} are segmented as before and so "
        f"have the same logits; {report['label_agreement']:.2%} have the checkpoint's label; "
        f"{report['more_tokens']:+.2%} tokens."
        + (
            f" Accuracy in PyTorch {report['accuracy']:.2%}, unpruned "
            f"{report['accuracy_before']:.2%}."
            if "accuracy" in report
            else ""
        )
    )


def _graphs(graphs: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "## Graphs\n",
        "Parity is against the PyTorch checkpoint on the same token ids.\n",
        "| variant | file | for | opset | label agreement | max logit difference | mean | accuracy "
        "| PyTorch's on the same ids | how |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, graph in graphs.items():
        parity, accuracy = graph["parity"], graph["accuracy"]
        lines.append(
            f"| {name} | `{graph['file']}` | {', '.join(graph['providers'])} | {graph['opset']} "
            f"| {parity['label_agreement']:.2%} of {parity['texts']:,} ({parity['source']}) "
            f"| {parity['max_logit_difference']:.2g} | {parity['mean_logit_difference']:.2g} "
            + (
                f"| {accuracy['accuracy']:.2%} of {accuracy['texts']:,} "
                f"| {accuracy['checkpoint_accuracy']:.2%} "
                if accuracy
                else "| not measured | not measured "
            )
            + f"| {'; '.join(f'{key}: {value}' for key, value in graph['recipe'].items())} |"
        )
    return "\n".join(lines)


def _languages(name: str, graph: Mapping[str, Any]) -> str:
    table = graph["accuracy"].get("by_language") if graph["accuracy"] else None
    if not table:
        return ""
    rows = [
        f"| {language} | {row['texts']:,} | {row['accuracy']:.1%} |"
        for language, row in table.items()
    ]
    return "\n".join(
        [
            f"## Accuracy of {name} by language\n",
            f"On {graph['accuracy']['source']}.\n",
            "| language | texts | accuracy |",
            "| --- | --- | --- |",
            *rows,
        ]
    )
