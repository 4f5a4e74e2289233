"""The built wheel: what is in it, and that it works in clean environments with nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT
from test_hub import NAME, ask, commit_of, serving

from refusal_runtime import RefusalClassifier, __version__
from refusal_runtime.classifier import EMBEDDED

WHEELHOUSE = ROOT / ".wheelhouse"
PACKAGES = {"refusal_runtime": ROOT / "runtime", "refusal_export": ROOT / "export"}
TEXT = "<|user|>help<|assistant|>I can not"


def clean(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The environment without what could lead to this repository or to a network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "HF_"))}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(environment or {})}


def call(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, cwd=cwd, env=clean(), timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built once from this tree without the network."""
    out = tmp_path_factory.mktemp("wheel")
    done = call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index",
                "--no-build-isolation", "--wheel-dir", out, ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def make_venv(folder: Path, wheel: Path, *dependencies: str) -> Path:
    """A virtual environment with the wheel alone, or with dependencies from the wheelhouse."""
    if not WHEELHOUSE.is_dir():
        pytest.skip("needs the dependencies' wheels in .wheelhouse, which `make test` creates")
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    # pip from here installs into it: no copy of pip is needed there.
    done = call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet",
                "--no-index", "--find-links", WHEELHOUSE, *dependencies or [wheel])  # fmt: skip
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment with `refusal-runtime[cpu]`."""
    return make_venv(tmp_path_factory.mktemp("venv") / "cpu", wheel, f"{wheel}[cpu]")


# --- content --------------------------------------------------------------------------------


def test_the_wheel_holds_exactly_the_two_packages(content: dict[str, bytes]) -> None:
    tops = {name.split("/")[0] for name in content}
    assert tops == {*PACKAGES, f"refusal_runtime-{__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_packages(content: dict[str, bytes]) -> None:
    for package, place in PACKAGES.items():
        files = {
            path.relative_to(place).as_posix()
            for path in (place / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert f"{package}/py.typed" in files
        assert any("/vocabularies/" in name for name in files) == (package == "refusal_export")
        if package == "refusal_export":
            files.add("refusal_export/examples.jsonl")
        assert {name for name in content if name.startswith(f"{package}/")} == files
        for name in files - {"refusal_export/examples.jsonl"}:
            assert content[name] == (place / name).read_bytes()
    assert content["refusal_export/examples.jsonl"] == EXAMPLES.read_bytes()


def test_the_wheel_holds_the_embedded_model(content: dict[str, bytes]) -> None:
    if not EMBEDDED.is_dir():
        pytest.skip("this tree has no embedded model")
    manifest = json.loads(content["refusal_runtime/model/manifest.json"])
    for name, record in manifest["files"].items():
        assert len(content[f"refusal_runtime/model/{name}"]) == record["bytes"]
    sizes = [len(data) for name, data in content.items() if "/model/" in name]
    assert max(sizes) <= 50e6
    assert sum(sizes) <= 64e6


def test_the_metadata_names_dependencies_extras_and_commands(content: dict[str, bytes]) -> None:
    info = f"refusal_runtime-{__version__}.dist-info"
    metadata = content[f"{info}/METADATA"].decode()
    lines = metadata.partition("\n\n")[0].splitlines()
    assert "Name: refusal-runtime" in lines
    assert "Requires-Python: >=3.11" in lines
    required = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line]
    base = {line.split(">=")[0] for line in required if "extra ==" not in line}
    assert base == {"numpy", "tokenizers"}
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if "Provides-Extra" in line}
    assert extras == {"cpu", "gpu", "export", "bench", "bench-peers", "train", "dev"}
    assert any("onnxruntime>=" in line and "extra == 'cpu'" in line for line in required)
    assert any("onnxruntime-gpu>=" in line and "extra == 'gpu'" in line for line in required)
    scripts = content[f"{info}/entry_points.txt"].decode()
    assert "refusal = refusal_runtime.cli:main" in scripts
    assert "refusal-export = refusal_export.cli:main" in scripts
    licenses = {name.rpartition("/")[2] for name in content if f"{info}/licenses/" in name}
    assert licenses == {"LICENSE", "NOTICE"}


# --- use ------------------------------------------------------------------------------------


def test_a_clean_environment_imports_the_wheel_and_nothing_else(
    python: Path, tmp_path: Path
) -> None:
    code = """
import importlib.util, sys
import refusal_runtime
print(refusal_runtime.__file__)
for name in ("torch", "transformers", "onnx", "runtime", "export"):
    assert importlib.util.find_spec(name) is None, name
"""
    done = call(python, "-W", "error", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).is_relative_to(python.parents[1])


def test_the_command_is_installed(python: Path, tmp_path: Path) -> None:
    done = call(python.with_name("refusal"), "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"refusal-runtime {__version__}\n")


def test_the_exporter_s_command_names_its_extra(python: Path, tmp_path: Path) -> None:
    done = call(python.with_name("refusal-export"), "absent", tmp_path / "out", cwd=tmp_path)
    assert done.returncode != 0
    assert "refusal-runtime[export]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_local_bundle_is_classified_without_heavy_modules(
    python: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    code = f"""
import sys
from refusal_runtime import RefusalClassifier
classifier = RefusalClassifier({str(tiny_bundle)!r}, variant="fp32")
print(*classifier.classify({TEXT!r}).logits)
heavy = {{"torch", "transformers", "huggingface_hub", "onnx", "requests"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = call(python, "-W", "error", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    here = RefusalClassifier(tiny_bundle, variant="fp32").classify(TEXT).logits
    assert [float(value) for value in done.stdout.split()] == pytest.approx(here, abs=1e-4)


def test_the_command_classifies_with_the_bundle(
    python: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    done = call(python.with_name("refusal"), "classify", "--model", tiny_bundle, EXAMPLES,
                cwd=tmp_path)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(EXAMPLES.read_text("utf-8").splitlines())
    assert all("label" in answer for answer in answers)


def test_the_embedded_model_works_from_the_wheel(python: Path, tmp_path: Path) -> None:
    if not EMBEDDED.is_dir():
        pytest.skip("this tree has no embedded model")
    done = call(python.with_name("refusal"), "classify", EXAMPLES, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    verdicts = RefusalClassifier().stream(
        [json.loads(line) for line in EXAMPLES.read_text("utf-8").splitlines()], on_error="raise"
    )
    for answer, verdict in zip(answers, verdicts, strict=True):
        assert answer["label"] == verdict.label
        assert answer["tokens"] == verdict.tokens
    assert call(python.with_name("refusal"), "doctor", cwd=tmp_path).returncode == 0


def test_the_hub_client_that_a_fresh_install_brings_is_cache_first(
    python: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with serving({NAME: {"v1": tiny_bundle}}) as hub:
        first = ask(hub, cache, NAME, python=str(python))
        assert Path(first["folder"]).name == commit_of(tiny_bundle)
        assert "onnx/model.onnx" not in hub.fetched()
        hub.requests.clear()
        assert ask(hub, cache, NAME, python=str(python)) == first
        assert hub.requests == []
        hub.stop()
        assert ask(hub, cache, NAME, python=str(python), local_files_only=True) == first


def test_without_onnxruntime_the_first_use_names_both_extras(
    wheel: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    python = make_venv(tmp_path / "bare", wheel)
    code = f"""
from refusal_runtime import ProviderError, RefusalClassifier
try:
    RefusalClassifier({str(tiny_bundle)!r})
except ProviderError as error:
    print(error)
"""
    done = call(python, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "refusal-runtime[cpu]" in done.stdout
    assert "refusal-runtime[gpu]" in done.stdout
    done = call(python.with_name("refusal"), "classify", "--model", tiny_bundle, "--text", "hi",
                cwd=tmp_path)  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert "refusal-runtime[cpu]" in done.stderr
    assert "Traceback" not in done.stderr
