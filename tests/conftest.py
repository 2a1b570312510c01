"""Fixtures that all tests share: the real default model, out of the same cache that `minivllm serve` uses."""

import logging
import os
import shutil
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets logging up; its stream is gone once the test is over."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
