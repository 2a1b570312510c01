"""Turns the name of a model into a local directory that can be served, and refuses early what cannot.

    name of a directory ─────────────────────────────────────────────▶ that directory
    hub id ─▶ in the Hugging Face cache? ─▶ else download from the hub ─▶ its snapshot
    default model, hub out of reach ─▶ packaged weights (default_model.py) ─▶ our own cache

Neither torch nor transformers is imported here: what needs them runs in a subprocess.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from minivllm import default_model, hub
from minivllm.cache import build_once, cache_dir, run_module
from minivllm.config import DEFAULT_MODEL, ModelConfig
from minivllm.errors import ModelError
from minivllm.progress import Progress

_SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def resolve_model(config: ModelConfig, progress: Progress | None = None) -> Path:
    """Directory of the model, fetched if need be, with config.json and weights. Raises `ModelError`."""
    with_weights = config.load_format != "dummy"
    directory = _find(config, config.model, with_weights, progress or Progress())
    _check_model(directory, config.model, with_weights)
    return directory


def resolve_tokenizer(config: ModelConfig, progress: Progress | None = None) -> Path:
    """Directory with the tokenizer.json to use, converted from an older format if need be. Raises `ModelError`."""
    progress = progress or Progress()
    name = config.tokenizer or config.model
    with_weights = config.tokenizer is None and config.load_format != "dummy"
    directory = _find(config, name, with_weights, progress)
    if (directory / "tokenizer.json").is_file():
        return directory
    if any((directory / file).is_file() for file in _SLOW_TOKENIZER_FILES):
        return _convert_tokenizer(directory, name, progress)
    raise ModelError(f"{name} has no tokenizer.json; name a tokenizer with --tokenizer")


def pull_model(config: ModelConfig, progress: Progress) -> Path:
    """Like `resolve_model`, and the tokenizer too, but asks the hub for a newer version first. Raises `ModelError`."""
    for name in dict.fromkeys((config.model, config.tokenizer or config.model)):
        if not Path(name).is_dir() and hub.is_reachable():
            _download(config, name, name == config.model and config.load_format != "dummy", progress)
    directory = resolve_model(config, progress)
    resolve_tokenizer(config, progress)
    return directory


def _find(config: ModelConfig, name: str, with_weights: bool, progress: Progress) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"{name} is a file; a model is a directory with config.json, or a hub id")
    if name.startswith(("/", ".", "~")):
        raise ModelError(f"{name}: no such directory")
    cached = hub.cached_snapshot(name, _revision(config, name))
    if cached is not None and _is_complete(cached, with_weights):
        return cached
    if name != DEFAULT_MODEL or _revision(config, name) is not None:
        return _download(config, name, with_weights, progress)
    if (built := default_model.built_directory()) is not None:
        return built
    try:
        return _download(config, name, with_weights, progress)
    except ModelError as error:
        progress.update(f"{error}: taking the packaged weights instead")
        return default_model.build(progress)


def _download(config: ModelConfig, name: str, with_weights: bool, progress: Progress) -> Path:
    progress.update(f"Looking for {name} at {hub.endpoint()}")
    progress.pause()
    return hub.download(name, _revision(config, name), with_weights=with_weights, with_code=config.trust_remote_code)


def _revision(config: ModelConfig, name: str) -> str | None:
    return config.revision if name == config.model else None  # --revision is the model's, not the tokenizer's


def _is_complete(directory: Path, with_weights: bool) -> bool:
    """An interrupted download leaves a snapshot directory with some of its files."""
    has_tokenizer = any((directory / file).is_file() for file in ("tokenizer.json", *_SLOW_TOKENIZER_FILES))
    is_model = (directory / "config.json").is_file() and (not with_weights or not _missing_weights(directory))
    return has_tokenizer and is_model


def _check_model(directory: Path, name: str, with_weights: bool) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{name} has no config.json: not a model directory")
    model_config = _read_json(directory / "config.json")
    if model_config.get("is_encoder_decoder"):
        kind = model_config.get("model_type", "this model")
        raise ModelError(f"{name} is an encoder-decoder model ({kind}); only decoder-only models can be served")
    if with_weights and (missing := _missing_weights(directory)):
        raise ModelError(f"{name} lacks weights: {missing} (--load-format dummy runs on random ones)")


def _missing_weights(directory: Path) -> str:
    """The first weight file that is not there; "" when all are. Pickled weights (.bin) are not read."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return "" if any(directory.glob("*.safetensors")) else "no *.safetensors file"
    shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
    return next((shard for shard in shards if not (directory / shard).is_file()), "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"cannot read {path}: not a JSON object")
    return content


def _convert_tokenizer(directory: Path, name: str, progress: Progress) -> Path:
    """A directory in our cache with the fast form of the slow tokenizer in `directory`."""
    digest = hashlib.sha256(str(directory).encode())
    for file in sorted(directory.glob("*token*")) + [directory / file for file in _SLOW_TOKENIZER_FILES]:
        if file.is_file():
            digest.update(file.read_bytes())

    def convert(target: Path) -> None:
        progress.update(f"Converting the tokenizer of {name}")
        run_module("engine_core.tokenizer_import", directory, target, what=f"{name} has no tokenizer.json")
        for template in directory.glob("chat_template*"):
            if not (target / template.name).exists():
                shutil.copy(template, target)

    return build_once(cache_dir() / "tokenizers" / digest.hexdigest()[:16], convert)
