"""Models with random weights of any size: what is tested here needs no sense in the answers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(default_model_dir: Path, tmp_path: Path) -> MakeModel:
    """Make a directory for `--load-format dummy`: the default model's configuration with other sizes, its tokenizer."""

    def make(**sizes: int) -> Path:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).symlink_to(default_model_dir / name)
        config = json.loads((default_model_dir / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | sizes))
        return tmp_path

    return make
