"""The engine core's process imports no package merely because it is installed."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.models import TinyModels

PACKAGES = ("PIL", "pandas", "scipy", "sklearn", "torchvision")
LOAD = f"""
import importlib.metadata, sys
from pathlib import Path
map_of_distributions = importlib.metadata.packages_distributions
from engine_core.lean_imports import import_transformers
import_transformers()
from engine_core.model_loader import load_model
from minivllm.config import EngineConfig
load_model(EngineConfig(device="cpu", enforce_eager=True), Path(sys.argv[1]))
print([name for name in {PACKAGES} if name in sys.modules])
import {", ".join(PACKAGES)}
print(importlib.metadata.packages_distributions is map_of_distributions)
"""


def test_a_model_is_loaded_without_what_it_does_not_need_and_that_can_be_imported_later(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    for name in PACKAGES:  # as good as installed, for whoever asks and imports
        (tmp_path / f"{name}.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", LOAD, str(tiny_models["llama"])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[]", "True"]
