"""Finds a model by name: a local folder, else the Hugging Face cache, else a download.

`huggingface_hub` comes with `tokenizers`; it is imported only when a Hub id is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from refusal_runtime.bundle import (
    MANIFEST,
    Bundle,
    Graph,
    Provider,
    choose_graph,
    discover_graphs,
    load_bundle,
)
from refusal_runtime.errors import BundleError, HubError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")
_SMALL_FILES = (MANIFEST, "*.json")


def locate(
    model: str | Path, *, variant: str, provider: Provider, local_files_only: bool
) -> tuple[Bundle, Graph, str]:
    """Finds a model, downloads what its chosen graph needs, and verifies it.

    Args:
        model: A folder, or a Hub id `owner/name[@revision]`.
        variant: A variant of the bundle, or "auto".
        provider: The execution provider that will run the graph.
        local_files_only: Whether to do without the network.

    Returns:
        The bundle, its chosen graph, and why that was chosen.

    Raises:
        HubError: The model is on no local path and cannot be had from the Hub.
        BundleError: It was found and is unusable.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() or isinstance(model, Path) or not HUB_ID.match(model):
        if not folder.exists():
            raise BundleError(
                f"there is no folder {str(model)!r}, and it is no Hub id owner/name[@revision]"
            )
        bundle = load_bundle(folder)
        graph, reason = bundle.choose(variant, provider)
    else:
        repository, _, revision = model.partition("@")
        hub = _Repository(repository, revision or None, local_files_only)
        bundle, graph, reason = hub.bundle(variant, provider)
    bundle.verify(graph)
    return bundle, graph, reason


class _Repository:
    """One model repository of the Hub at one revision, cache first."""

    def __init__(self, name: str, revision: str | None, local_files_only: bool) -> None:
        self.name = name
        self.revision = revision
        self.local_files_only = local_files_only

    def bundle(self, variant: str, provider: Provider) -> tuple[Bundle, Graph, str]:
        folder = self.cached() or self.download(_SMALL_FILES)
        # The cache may hold what some other tool fetched: enough of it only with a description.
        described = (folder / MANIFEST).is_file() or any(folder.rglob("*.onnx"))
        needed = ("config.json", "tokenizer.json")
        if not described or not all((folder / name).is_file() for name in needed):
            folder = self.download(_SMALL_FILES)
        # The snapshot's folder is named by its commit: from here on all files are of one revision.
        self.revision = folder.name
        if (folder / MANIFEST).is_file():
            return self.described(folder, variant, provider)
        return self.undescribed(folder, variant, provider)

    def described(
        self, folder: Path, variant: str, provider: Provider
    ) -> tuple[Bundle, Graph, str]:
        """Completes a snapshot whose manifest says which files its chosen graph needs."""
        bundle = load_bundle(folder)
        graph, reason = bundle.choose(variant, provider)
        of_graphs = {file for other in bundle.graphs.values() for file in other.files}
        wanted = set(graph.files) | (set(bundle.files) - of_graphs)
        if not all((folder / name).is_file() for name in wanted):
            bundle = load_bundle(self.download(sorted(wanted)))
        return bundle, graph, reason

    def undescribed(
        self, folder: Path, variant: str, provider: Provider
    ) -> tuple[Bundle, Graph, str]:
        """Completes a snapshot without a manifest by choosing among the repository's graphs."""
        present = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.onnx"))]
        try:
            choice = choose_graph(discover_graphs(present), variant, provider, where=self.name)
        except BundleError:
            listed = discover_graphs(self.list_graphs())
            choice = choose_graph(listed, variant, provider, where=self.name)
            graph = choice[0]
            folder = self.download((graph.file, f"{graph.file}_data*", f"{graph.file}.data*"))
        bundle = load_bundle(folder)
        # Named as the repository names it, whatever else of it is present.
        graphs = {**bundle.graphs, choice[0].name: choice[0]}
        return replace(bundle, name=self.name, graphs=graphs), *choice

    def cached(self) -> Path | None:
        """Returns the cached snapshot's folder, complete or not."""
        from huggingface_hub import try_to_load_from_cache

        try:
            for name in (MANIFEST, "config.json", "tokenizer.json"):
                path = try_to_load_from_cache(self.name, name, revision=self.revision)
                if isinstance(path, str):
                    return Path(path).parent
        except ValueError as error:  # not a valid repository name
            raise self.failure(error) from error
        return None

    def download(self, patterns: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        if self.local_files_only:
            raise HubError(
                f"{self.name} is not completely in the local cache and local_files_only is set; "
                "run once without it, or give a folder"
            )
        try:
            return Path(
                snapshot_download(self.name, revision=self.revision, allow_patterns=list(patterns))
            )
        except Exception as error:  # network, authorization, missing repository or revision
            raise self.failure(error) from error

    def list_graphs(self) -> list[str]:
        from huggingface_hub import HfApi

        if self.local_files_only:
            raise HubError(
                f"{self.name} has no suitable graph in the local cache and local_files_only is "
                "set; run once without it, or give a folder"
            )
        try:
            files = HfApi().list_repo_files(self.name, revision=self.revision)
        except Exception as error:
            raise self.failure(error) from error
        graphs = [file for file in files if file.endswith(".onnx")]
        return sorted(graphs, key=lambda file: (not file.startswith("onnx/"), file))

    def failure(self, error: Exception) -> HubError:
        at = f"@{self.revision}" if self.revision else ""
        first = (str(error).strip().splitlines() or [""])[0][:200]
        return HubError(
            f"{self.name}{at} cannot be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {first}); check the name, the revision, the network and "
            "HF_HUB_OFFLINE, or give a folder"
        )
