"""Binds the HTTP address before anything expensive happens, so that a port in use is known at once.

The launcher binds and listens; a frontend inherits its socket by the file descriptor. Clients that come while the
engine core loads are therefore answered (503, loading) instead of refused.

Several frontends have a socket each on the same port (SO_REUSEPORT), among which the kernel spreads connections by a
hash of the client's address. Accepting from one shared socket leaves that to chance: of 256 connections that came at
once to four frontends, one got up to 150 and one none; with a socket each, 49 to 74.
"""

import errno
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from minivllm.config import FrontendConfig
from minivllm.errors import StartupError

LISTEN_FD_VARIABLE = "MINIVLLM_LISTEN_FD"
SUCCESSOR_VARIABLE = "MINIVLLM_SUCCESSOR"  # set: another process serves the socket until this one can
_BACKLOG = 2048


def open_listener(config: FrontendConfig) -> socket.socket:
    """A listening socket on --uds, or on --host and --port. Raises `StartupError` that names the address."""
    return open_listeners(config, 1)[0]


def open_listeners(config: FrontendConfig, count: int) -> list[socket.socket]:
    """A listening socket for each of `count` frontends, all on one address; where that cannot be, one for all of them.

    Raises `StartupError` that names the address.
    """
    if config.uds is not None:
        return [_listen_on_path(config.uds)] * count
    address = _resolve(config.host, config.port)
    name = f"port {config.port} of {config.host}"
    # The first one binds alone: with SO_REUSEPORT it would quietly share the port of another server of this user.
    first = _bind(_tcp_socket(address), address.address, name)
    if count == 1 or not hasattr(socket, "SO_REUSEPORT"):
        return [_listen(first, name)] * count
    listeners = [first]
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for _ in range(count - 1):
        another = _tcp_socket(address)
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listeners.append(_bind(another, first.getsockname(), name))
    return [_listen(listener, name) for listener in listeners]


def public_url(config: FrontendConfig, listener: socket.socket) -> str:
    """What a client connects to: `http://host:port` with the real port, or `unix:/path`."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"


class _TcpAddress(NamedTuple):
    family: int
    kind: int
    protocol: int
    address: tuple[object, ...]


def _resolve(host: str, port: int) -> _TcpAddress:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartupError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    return _TcpAddress(family, kind, protocol, address)


def _tcp_socket(address: _TcpAddress) -> socket.socket:
    listener = socket.socket(address.family, address.kind, address.protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return listener


def _listen_on_path(path: Path) -> socket.socket:
    if path.exists():
        _remove_stale_socket(path)
    name = f"--uds {path}"
    return _listen(_bind(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(path), name), name)


def _remove_stale_socket(path: Path) -> None:
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise StartupError(f"--uds {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise StartupError(f"--uds {path} is in use by another server")
    path.unlink()


def _bind(listener: socket.socket, address: str | tuple[object, ...], name: str) -> socket.socket:
    with _closing_on_error(listener, name):
        listener.bind(address)
    return listener


def _listen(listener: socket.socket, name: str) -> socket.socket:
    with _closing_on_error(listener, name):
        listener.listen(_BACKLOG)  # two sockets may bind a port with SO_REUSEADDR, but only one may listen
    return listener


@contextmanager
def _closing_on_error(listener: socket.socket, name: str) -> Iterator[None]:
    """Turns an error into a `StartupError` that names the address."""
    try:
        yield
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"{name} is in use by another process; choose another with --port") from error
        raise StartupError(f"cannot listen on {name}: {error.strerror or error}") from error
