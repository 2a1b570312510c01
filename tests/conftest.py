"""Fixtures that all tests share: the real default model, out of the same cache that `minivllm serve` uses."""

import os
import shutil
from pathlib import Path

import pytest

from minivllm.config import ModelConfig
from minivllm.model_store import resolve_model

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run without a GPU; triton reads this when it is first imported


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """Local directory of the default model; fetched and converted once per machine."""
    return resolve_model(ModelConfig())
