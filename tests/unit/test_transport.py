"""Sockets and their directory: private, of bearable length, and without a message lost."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from minivllm import transport
from minivllm.errors import StartupError
from minivllm.transport import Endpoints

WAIT_MS = 10_000


@pytest.fixture
def endpoints() -> Iterator[Endpoints]:
    directory = transport.make_socket_dir()
    yield Endpoints.in_directory(directory)
    transport.remove_socket_dir(directory)


class Network:
    """Opens sockets of `transport` and closes them when the test is over."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self.context: zmq.Context[Any] = zmq.Context()
        self._opened: list[Any] = []

    def open(self, make: Callable[..., Any], *arguments: Any) -> Any:
        self._opened.append(make(self.context, self.endpoints, *arguments))
        return self._opened[-1]


@pytest.fixture
def network(endpoints: Endpoints) -> Iterator[Network]:
    network = Network(endpoints)
    yield network
    network.context.destroy(linger=0)


def next_frame(socket: Any) -> Any:
    assert socket.poll(WAIT_MS), "nothing arrived"
    return socket.recv()


def test_a_fresh_directory_is_private_and_unique() -> None:
    first, second = transport.make_socket_dir(), transport.make_socket_dir()
    assert first != second
    assert first.stat().st_mode & 0o777 == 0o700
    for directory in (first, second):
        transport.remove_socket_dir(directory)
        assert not directory.exists()


def test_a_named_directory_is_made_private(tmp_path: Path) -> None:
    directory = transport.make_socket_dir(tmp_path / "a" / "b")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert transport.make_socket_dir(directory) == directory


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_directory_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(StartupError, match="must belong to you alone"):
        transport.make_socket_dir(tmp_path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartupError, match=f"--socket-dir {path} cannot be made: "):
            transport.make_socket_dir(path)


@pytest.mark.parametrize("letter", ["d", "é"])
def test_a_path_too_long_for_a_socket_is_refused(letter: str) -> None:
    fits = Path("/" + "d" * (100 - len("//engine-output.sock")))
    assert Endpoints.in_directory(fits).output.endswith("/engine-output.sock")
    num_letters = 100 if letter == "d" else 60  # 60 characters of 2 bytes
    with pytest.raises(StartupError, match="too long: a socket path holds 100 bytes"):
        Endpoints.in_directory(Path("/" + letter * num_letters))


def test_removal_leaves_what_is_not_ours(tmp_path: Path) -> None:
    directory = transport.make_socket_dir(tmp_path / "sockets")
    (directory / "mine.txt").touch()
    (directory / transport.CONFIG_FILE).touch()
    (directory / transport.METRICS_DIR).mkdir()
    transport.remove_socket_dir(directory)
    assert [path.name for path in directory.iterdir()] == ["mine.txt"]
    transport.remove_socket_dir(directory)


def test_sockets_are_inside_the_private_directory(network: Network) -> None:
    network.open(transport.engine_input)
    network.open(transport.engine_output)
    paths = [Path(endpoint.removeprefix("ipc://")) for endpoint in network.endpoints]
    assert all(path.is_socket() for path in paths)
    assert {path.parent.stat().st_uid for path in paths} == {os.getuid()}
    network.endpoints.unlink()
    assert not any(path.exists() for path in paths)
    network.endpoints.unlink()


def test_sending_without_an_engine_core_fails_at_once(network: Network) -> None:
    socket = network.open(transport.frontend_output)
    with pytest.raises(zmq.Again):
        socket.send(b"x", zmq.NOBLOCK)


def test_the_engine_core_sees_who_listens(network: Network) -> None:
    output = network.open(transport.engine_output)
    first = network.open(transport.frontend_input, b"front-01")
    assert next_frame(output) == b"\x01front-01"
    second = network.open(transport.frontend_input, b"front-01")  # the same id again is told too
    assert next_frame(output) == b"\x01front-01"
    second.close()
    first.close()
    assert next_frame(output) == b"\x00front-01"


def test_a_topic_reaches_its_own_frontend_only(network: Network) -> None:
    output = network.open(transport.engine_output)
    ids = [b"front-01", b"front-10", b"\0\0\0\0\0\0\0\0", b"\0\0\0\0\0\0\0\1"]
    sockets = []
    for frontend_id in ids:
        sockets.append(network.open(transport.frontend_input, frontend_id))
        next_frame(output)
    for frontend_id in ids:
        output.send_multipart((frontend_id, b"for " + frontend_id))
    for frontend_id in ids:
        output.send_multipart((frontend_id, b"end"))
    for frontend_id, socket in zip(ids, sockets, strict=True):
        received: list[tuple[bytes, bytes]] = []
        while not received or received[-1][1] != b"end":
            assert socket.poll(WAIT_MS)
            topic, frame = socket.recv_multipart()
            received.append((topic, frame))
        assert received == [(frontend_id, b"for " + frontend_id), (frontend_id, b"end")]


def test_a_slow_reader_loses_nothing(network: Network) -> None:
    count = 20_000
    output = network.open(transport.engine_output)
    reader = network.open(transport.frontend_input, b"front-01")
    next_frame(output)
    for number in range(count):
        output.send_multipart((b"front-01", number.to_bytes(4, "big") + bytes(100)))
    for number in range(count):
        assert reader.poll(WAIT_MS), f"message {number} was lost"
        assert int.from_bytes(reader.recv_multipart()[1][:4], "big") == number


def test_a_stalled_engine_core_loses_nothing(network: Network) -> None:
    count = 20_000
    inbox = network.open(transport.engine_input)
    writer = network.open(transport.frontend_output)
    assert writer.poll(WAIT_MS, zmq.POLLOUT)
    for number in range(count):
        writer.send(number.to_bytes(4, "big"), zmq.NOBLOCK)
    assert [int.from_bytes(next_frame(inbox), "big") for _ in range(count)] == list(range(count))


def test_an_oversized_frame_is_dropped_and_others_still_arrive(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_FRAME_BYTES", 1000)
    inbox = network.open(transport.engine_input)
    hostile, honest = (network.open(transport.frontend_output) for _ in range(2))
    for socket in (hostile, honest):
        assert socket.poll(WAIT_MS, zmq.POLLOUT)
    hostile.send(bytes(1001))
    honest.send(b"hello")
    assert next_frame(inbox) == b"hello"
    assert not inbox.poll(50)
