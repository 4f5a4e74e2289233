"""Models by Hub id, against a local stand-in for the Hub: cache, revisions, offline, damage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from refusal_runtime.bundle import seal

NAME = "tester/tiny-refusal"
BARE = "tester/optimum-export"

# huggingface_hub reads its environment when it is imported: each client is a process of its own.
CLIENT = """
import json, sys
from refusal_runtime import RefusalClassifier
from refusal_runtime.errors import RefusalRuntimeError
try:
    classifier = RefusalClassifier(provider="cpu", **json.loads(sys.argv[1]))
    verdict = classifier.classify("<|user|>help<|assistant|>I can not")
except RefusalRuntimeError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
else:
    bundle = classifier.bundle
    print(json.dumps({
        "logits": verdict.logits, "probability": verdict.refusal_probability,
        "name": bundle.name, "version": bundle.version, "folder": str(bundle.folder),
        "graph": classifier.graph.file, "notes": bundle.notes, "verified": len(bundle.files),
    }))
"""


@dataclass
class Hub:
    """What the stand-in serves.

    Attributes:
        repositories: Folder by revision by repository; the last revision is also `main`.
        damage: Changes the bytes of a file, by its path, as they are sent.
        requests: What was asked for: method and path.
    """

    endpoint: str = ""
    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    damage: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    stop: Callable[[], None] = lambda: None

    def fetched(self) -> set[str]:
        """The files whose content was sent."""
        contents = (
            path.split("/resolve/")[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        )
        return {content.partition("/")[2] for content in contents}


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """A request handler that answers like huggingface.co, as far as downloads go."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.reply(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def folder(self, name: str, revision: str) -> Path | None:
            """The snapshot, or None after having answered that there is none."""
            revisions = hub.repositories.get(name)
            if revisions is None:
                self.refuse(401, "RepoNotFound")  # the Hub does not tell absent from private
                return None
            known = {**revisions, "main": list(revisions.values())[-1]}
            known.update({commit_of(folder): folder for folder in revisions.values()})
            if revision not in known:
                self.refuse(404, "RevisionNotFound")
            return known.get(revision)

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if path.startswith("/api/models/"):
                owner, short, kind, revision, *_ = [*path.split("/")[3:], "revision", "main"]
                folder = self.folder(f"{owner}/{short}", revision)
                if folder is not None and kind == "tree":
                    self.tree(folder)
                elif folder is not None:
                    self.info(f"{owner}/{short}", folder)
            else:
                owner, short, _, revision, name = path.lstrip("/").split("/", 4)
                folder = self.folder(f"{owner}/{short}", revision)
                if folder is not None:
                    self.file(folder, name)

        def info(self, name: str, folder: Path) -> None:
            siblings = [{"rfilename": file} for file in files_of(folder)]
            answer = {"id": name, "modelId": name, "sha": commit_of(folder), "private": False,
                      "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
            self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

        def tree(self, folder: Path) -> None:
            entries = [
                {"type": "file", "path": file, "size": len(self.content(folder, file)),
                 "oid": etag_of(folder / file)}
                for file in files_of(folder)
            ]  # fmt: skip
            self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")

        def content(self, folder: Path, name: str) -> bytes:
            return hub.damage.get(name, bytes)((folder / name).read_bytes())

        def file(self, folder: Path, name: str) -> None:
            if not (folder / name).is_file():
                self.refuse(404, "EntryNotFound")
                return
            self.reply(
                200,
                self.content(folder, name),
                ETag=f'"{etag_of(folder / name)}"',
                X_Repo_Commit=commit_of(folder),
                Accept_Ranges="none",
            )

    return Handler


def files_of(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths]


def etag_of(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tiny_bundle: Path, tmp_path: Path) -> Iterator[Hub]:
    """A running stand-in with a bundle of two versions and an export without a manifest."""
    served = tmp_path / "served"
    for version, temperature in (("1.0.0", 1.0), ("2.0.0", 3.0)):
        folder = shutil.copytree(tiny_bundle, served / version)
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        manifest.update(version=version, calibration={"temperature": temperature})
        manifest["digest"] = seal(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    bare = shutil.copytree(tiny_bundle, served / "bare")
    (bare / "manifest.json").unlink()
    (bare / "onnx/model_int8.onnx").rename(bare / "onnx/model_quantized.onnx")
    with serving({NAME: {"v1": served / "1.0.0", "v2": served / "2.0.0"}, BARE: {"v1": bare}}) as h:
        yield h


class serving:  # noqa: N801 - used like a function
    """Runs a stand-in on a free port of the loopback interface."""

    def __init__(self, repositories: dict[str, dict[str, Path]]) -> None:
        self.hub = Hub(repositories=repositories)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(self.hub))
        self.hub.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.hub.stop = self.stop
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> Hub:
        self.thread.start()
        return self.hub

    def __exit__(self, *_: object) -> None:
        if self.server.socket.fileno() >= 0:
            self.stop()
        self.thread.join()


def ask(
    hub: Hub,
    cache: Path,
    model: str,
    *,
    python: str = sys.executable,
    env: Any = (),
    **options: Any,
) -> dict[str, Any]:
    """Loads and classifies in a fresh process; returns what it printed."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().startswith(("HF_", "HUGGING")) and not key.lower().endswith("_proxy")
    }
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **dict(env),
    }
    run = subprocess.run(
        [python, "-c", CLIENT, json.dumps({"model": model, **options})],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_hub_id_downloads_only_what_the_chosen_variant_needs(hub: Hub, cache: Path) -> None:
    answer = ask(hub, cache, NAME)
    assert (answer["graph"], answer["version"]) == ("onnx/model_int8.onnx", "2.0.0")
    assert answer["folder"].startswith(str(cache))
    assert answer["notes"] == []
    assert {file for file in hub.fetched() if "onnx" in file} == {"onnx/model_int8.onnx"}
    assert {"manifest.json", "config.json", "tokenizer.json"} <= hub.fetched()
    other = ask(hub, cache, NAME, variant="fp32")
    assert other["graph"] == "onnx/model.onnx"
    assert other["logits"] != answer["logits"]
    assert "onnx/model_fp16.onnx" not in hub.fetched()


@pytest.mark.parametrize("spelling", ["v1", "commit"])
def test_revisions_are_pinned(hub: Hub, cache: Path, spelling: str) -> None:
    first, second = (hub.repositories[NAME][name] for name in ("v1", "v2"))
    revision = {"v1": "v1", "commit": commit_of(first)}[spelling]
    old = ask(hub, cache, f"{NAME}@{revision}")
    assert (old["version"], Path(old["folder"]).name) == ("1.0.0", commit_of(first))
    new = ask(hub, cache, NAME)
    assert (new["version"], Path(new["folder"]).name) == ("2.0.0", commit_of(second))
    assert old["logits"] == new["logits"]
    assert old["probability"] != pytest.approx(new["probability"])
    # Having both in the cache confuses nothing.
    assert ask(hub, cache, f"{NAME}@{revision}") == old


def test_the_cache_comes_first(hub: Hub, cache: Path) -> None:
    first = ask(hub, cache, NAME)
    hub.requests.clear()
    assert ask(hub, cache, NAME) == first
    assert hub.requests == []
    hub.stop()
    assert ask(hub, cache, NAME) == first
    assert ask(hub, cache, NAME, local_files_only=True) == first
    assert ask(hub, cache, NAME, env={"HF_HUB_OFFLINE": "1"}) == first
    pinned = f"{NAME}@{commit_of(hub.repositories[NAME]['v2'])}"
    assert ask(hub, cache, pinned, local_files_only=True) == first


def test_a_variant_missing_in_the_cache_is_fetched_or_named(hub: Hub, cache: Path) -> None:
    ask(hub, cache, NAME, variant="int8")
    offline = ask(hub, cache, NAME, variant="fp32", local_files_only=True)
    assert offline["error"] == "HubError"
    assert NAME in offline["message"]
    assert ask(hub, cache, NAME, variant="fp32")["graph"] == "onnx/model.onnx"
    assert "error" not in ask(hub, cache, NAME, variant="fp32", local_files_only=True)


def test_local_files_only_with_an_empty_cache(hub: Hub, cache: Path) -> None:
    answer = ask(hub, cache, NAME, local_files_only=True)
    assert answer["error"] == "HubError"
    assert NAME in answer["message"]
    assert "local_files_only" in answer["message"]
    assert hub.requests == []


def test_offline_mode_with_an_empty_cache(hub: Hub, cache: Path) -> None:
    answer = ask(hub, cache, NAME, env={"HF_HUB_OFFLINE": "1"})
    assert answer["error"] == "HubError"
    assert NAME in answer["message"]
    assert "HF_HUB_OFFLINE" in answer["message"]
    assert hub.requests == []


def test_no_network_and_an_empty_cache(hub: Hub, cache: Path) -> None:
    hub.stop()
    answer = ask(hub, cache, NAME)
    assert answer["error"] == "HubError"
    assert "network" in answer["message"]


@pytest.mark.parametrize(
    "model", ["tester/absent", f"{NAME}@absent", f"{NAME}@{'0' * 40}", "tester/dots..are-invalid"]
)
def test_unknown_repositories_and_revisions(hub: Hub, cache: Path, model: str) -> None:
    answer = ask(hub, cache, model)
    assert answer["error"] == "HubError"
    assert f"{model} cannot be fetched" in answer["message"]


def test_unknown_variant(hub: Hub, cache: Path) -> None:
    answer = ask(hub, cache, NAME, variant="int3")
    assert answer["error"] == "BundleError"
    assert "'int3'; choose from fp16, fp32, int8" in answer["message"]
    assert not any("onnx" in file for file in hub.fetched())


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("onnx/model_int8.onnx", _flip),
        ("onnx/model_int8.onnx", lambda data: data[: len(data) // 2]),
        ("tokenizer.json", _flip),
        ("manifest.json", lambda data: data.replace(b'"threshold": 0.5', b'"threshold": 0.6')),
    ],
    ids=["graph-flipped", "graph-truncated", "tokenizer-flipped", "manifest-changed"],
)
def test_damaged_downloads_are_refused(
    hub: Hub, cache: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    pristine = (hub.repositories[NAME]["v2"] / name).read_bytes()
    assert damage(pristine) != pristine
    hub.damage[name] = damage
    answer = ask(hub, cache, NAME)
    assert answer["error"] == "BundleError"
    assert name in answer["message"]


def test_a_repository_without_manifest(hub: Hub, cache: Path, tiny_bundle: Path) -> None:
    answer = ask(hub, cache, BARE)
    assert (answer["name"], answer["graph"]) == (BARE, "onnx/model_quantized.onnx")
    assert (answer["version"], answer["verified"]) == ("", 0)
    assert any("no manifest.json" in note for note in answer["notes"])
    assert {file for file in hub.fetched() if "onnx" in file} == {"onnx/model_quantized.onnx"}
    assert answer["logits"] == ask(hub, cache, str(tiny_bundle), variant="int8")["logits"]
    hub.stop()
    assert ask(hub, cache, BARE) == answer
    assert ask(hub, cache, BARE, local_files_only=True) == answer


def test_external_data_of_a_repository_without_manifest(hub: Hub, cache: Path) -> None:
    import onnx

    path = hub.repositories[BARE]["v1"] / "onnx" / "model.onnx"
    expected = ask(hub, cache, str(path.parents[1]), variant="fp32")["logits"]
    graph = onnx.load(str(path))
    path.unlink()
    onnx.save_model(graph, str(path), save_as_external_data=True, location="model.onnx_data",
                    size_threshold=0)  # fmt: skip
    assert ask(hub, cache, BARE, variant="fp32")["logits"] == expected
    assert "onnx/model.onnx_data" in hub.fetched()


def test_a_graph_can_be_named_by_its_file_without_a_manifest(hub: Hub, cache: Path) -> None:
    folder = hub.repositories[BARE]["v1"] / "onnx"
    shutil.copyfile(folder / "model_quantized.onnx", folder / "model_int8.onnx")
    local = ask(hub, cache, str(folder.parent), variant="model_quantized")
    assert local["graph"] == "onnx/model_quantized.onnx"
    for _ in range(2):  # from the Hub, then from the cache
        assert ask(hub, cache, BARE, variant="model_quantized").get("graph") == local["graph"]


def test_a_cache_begun_by_another_tool_does_not_hide_the_manifest(hub: Hub, cache: Path) -> None:
    # AutoTokenizer.from_pretrained and the like leave just these files in the snapshot.
    folder = hub.repositories[NAME]["v2"]
    repository = cache / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit_of(folder)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit_of(folder))
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(folder / name, snapshot / name)
    answer = ask(hub, cache, NAME)
    assert (answer["version"], answer["notes"]) == ("2.0.0", [])
    assert answer["verified"] > 0


def test_a_local_folder_beats_a_hub_id_of_the_same_name(
    hub: Hub, cache: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "work" / NAME)
    monkeypatch.chdir(tmp_path / "work")
    answer = ask(hub, cache, NAME)
    assert (answer["folder"], answer["version"]) == (NAME, "1.0.0")
    assert hub.requests == []
    monkeypatch.chdir(tmp_path)
    assert ask(hub, cache, NAME)["version"] == "2.0.0"
