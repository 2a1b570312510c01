"""Binds the HTTP address before anything expensive happens, so that a port in use is known at once.

The launcher binds and listens; every frontend inherits the same socket by its file descriptor. Clients that come
while the engine core loads are therefore answered (503, loading) instead of refused.
"""

import errno
import socket
import stat
from pathlib import Path

from minivllm.config import FrontendConfig
from minivllm.errors import StartupError

LISTEN_FD_VARIABLE = "MINIVLLM_LISTEN_FD"
_BACKLOG = 2048


def open_listener(config: FrontendConfig) -> socket.socket:
    """A listening socket on --uds, or on --host and --port. Raises `StartupError` that names the address."""
    return _listen_on_path(config.uds) if config.uds is not None else _listen_on_port(config.host, config.port)


def public_url(config: FrontendConfig, listener: socket.socket) -> str:
    """What a client connects to: `http://host:port` with the real port, or `unix:/path`."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"


def _listen_on_port(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartupError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return _bind(listener, address, f"port {port} of {host}")


def _listen_on_path(path: Path) -> socket.socket:
    if path.exists():
        _remove_stale_socket(path)
    return _bind(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(path), f"--uds {path}")


def _remove_stale_socket(path: Path) -> None:
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise StartupError(f"--uds {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise StartupError(f"--uds {path} is in use by another server")
    path.unlink()


def _bind(listener: socket.socket, address: str | tuple[object, ...], name: str) -> socket.socket:
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)  # two sockets may bind a port with SO_REUSEADDR, but only one may listen
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"{name} is in use by another process; choose another with --port") from error
        raise StartupError(f"cannot listen on {name}: {error.strerror or error}") from error
    return listener
