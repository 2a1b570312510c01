"""One listening socket per frontend on one port, and nobody else's port by accident."""

import socket
from pathlib import Path

import pytest

from minivllm import api_servers
from minivllm.api_servers import default_api_server_count, uses_gpu
from minivllm.config import EngineConfig, FrontendConfig
from minivllm.errors import StartupError
from minivllm.listener import open_listeners


def close(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def test_a_socket_each_on_one_port_and_all_get_connections() -> None:
    listeners = open_listeners(FrontendConfig(port=0), 3)
    (port,) = {listener.getsockname()[1] for listener in listeners}
    assert len({listener.fileno() for listener in listeners}) == 3
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(60)]
    accepted = []
    for listener in listeners:
        listener.setblocking(False)
        try:
            while True:
                accepted.append((listener, listener.accept()[0]))
        except BlockingIOError:
            pass
    assert len(accepted) == 60
    assert {listener for listener, _ in accepted} == set(listeners)  # that one of three gets none: 1 in 10 billion
    close([connection for _, connection in accepted] + clients + listeners)


@pytest.mark.parametrize("count", [1, 2])
def test_the_port_of_another_server_is_not_shared(count: int) -> None:
    others = open_listeners(FrontendConfig(port=0), 2)
    port = others[0].getsockname()[1]
    with pytest.raises(StartupError, match=f"port {port} of 127.0.0.1 is in use"):
        open_listeners(FrontendConfig(port=port), count)
    close(others)


def test_a_unix_socket_is_shared(tmp_path: Path) -> None:
    listeners = open_listeners(FrontendConfig(uds=tmp_path / "s"), 2)
    assert listeners[0] is listeners[1]
    close(listeners)


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (4, 1), (8, 2), (16, 4), (128, 4)])
def test_frontends_by_cores(cores: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_servers, "_num_cores", lambda: cores)
    assert default_api_server_count(EngineConfig(device="cuda")) == count
    assert default_api_server_count(EngineConfig(device="cpu")) == 1


def test_is_there_a_gpu(tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    assert not uses_gpu(EngineConfig(), {}, driver)
    driver.touch()
    assert uses_gpu(EngineConfig(), {}, driver)
    assert not uses_gpu(EngineConfig(), {"CUDA_VISIBLE_DEVICES": ""}, driver)
    assert not uses_gpu(EngineConfig(device="cpu"), {}, driver)
