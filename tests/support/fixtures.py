"""Fixtures of the tests that run models: a conftest imports them."""

from collections.abc import Iterator

import pytest
import torch

from engine_core.cpu_jit import set_num_threads
from tests.support.models import TinyModels


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Directories of tiny random models, by architecture."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose a lot where another process uses the same cores."""
    num_threads = torch.get_num_threads()
    set_num_threads(1)  # first: numba's threads, once started, change the number of torch's
    torch.set_num_threads(1)
    yield
    set_num_threads(num_threads)
    torch.set_num_threads(num_threads)
