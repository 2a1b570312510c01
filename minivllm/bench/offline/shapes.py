"""The directory of the model to measure: a model of the user's, or a published configuration with random weights."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from minivllm.bench.offline.options import ShapedConfig
from minivllm.model_store import resolve_model

SHAPES = Path(__file__).with_name("shapes")

OptionsT = TypeVar("OptionsT", bound=ShapedConfig)


@contextmanager
def located(options: OptionsT) -> Iterator[tuple[OptionsT, Path]]:
    """`options` with the model they come down to, and its directory. Raises `ModelError`."""
    if options.shape is not None:
        options = options.model_copy(update={"model": str(SHAPES / options.shape), "load_format": "dummy"})
    directory = resolve_model(options)
    asked = {"vocab_size": options.vocab_size, "num_hidden_layers": options.num_hidden_layers}
    changes = {name: value for name, value in asked.items() if value is not None}
    if not changes:
        yield options, directory
        return
    with tempfile.TemporaryDirectory(prefix="minivllm-shape-") as temporary:
        content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (Path(temporary) / "config.json").write_text(json.dumps(changed_config(content, changes)), encoding="utf-8")
        yield options.model_copy(update={"model": temporary}), Path(temporary)


def changed_config(content: dict[str, Any], changes: dict[str, int]) -> dict[str, Any]:
    """`content` of a config.json with other sizes, and without token ids that its vocabulary no longer has."""
    config = content | changes
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.get(name)
        if any(
            token >= config["vocab_size"] for token in (ids if isinstance(ids, list) else [ids]) if token is not None
        ):
            config[name] = None
    return config


def model_name(options: ShapedConfig) -> str:
    """What was measured, for a reader: the shape or model, and how it was changed."""
    parts = [f"{options.shape} shape" if options.shape else options.model]
    if options.vocab_size is not None:
        parts.append(f"vocabulary of {options.vocab_size:,}")
    if options.num_hidden_layers is not None:
        parts.append(f"{options.num_hidden_layers} layers")
    if options.shape or options.load_format == "dummy":
        parts.append("random weights")
    return ", ".join(parts)
