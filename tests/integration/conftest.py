"""One server on the real default model for all tests that leave it as they found it; each must find it idle."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ServerProcess


@pytest.fixture(scope="session")
def shared_server(default_model_dir: Path) -> Iterator[ServerProcess]:
    with ServerProcess(str(default_model_dir), "--served-model-name", "smol", "--max-num-seqs", "32") as server:
        yield server


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    """The shared server; what the test asked of it must be gone without a trace afterwards."""
    yield shared_server
    shared_server.settle()
