"""One server on the real default model for the tests of all clients; each must leave it idle."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ServerProcess

MODEL = "smol"


@pytest.fixture(scope="session")
def client_server(default_model_dir: Path) -> Iterator[ServerProcess]:
    with ServerProcess(str(default_model_dir), "--served-model-name", MODEL, "--max-num-seqs", "32") as server:
        yield server


@pytest.fixture
def server(client_server: ServerProcess) -> Iterator[ServerProcess]:
    """The server; what the test asked of it must be gone without a trace afterwards."""
    yield client_server
    client_server.settle()


@pytest.fixture
def base_url(server: ServerProcess) -> str:
    """What users give their client."""
    return f"{server.url}/v1"
