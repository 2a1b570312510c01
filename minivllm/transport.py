"""How messages travel: the endpoints, and every socket option of the project in one place.

frontend  PUSH ──connect──▶ bind  PULL  engine core      one ordered channel: an abort cannot overtake its add
frontend  SUB  ◀──connect── bind  XPUB  engine core      XPUB sees subscriptions, so it knows who listens
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from minivllm.errors import StartupError

MAX_FRAME_BYTES = 64 * 1024 * 1024  # an 8-million-token prompt; larger frames drop the connection
CONFIG_FILE = "config.json"  # in the socket directory: the resolved options of this run
METRICS_DIR = "metrics"  # in the socket directory: counters that several frontends share
_MAX_IPC_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS


class Endpoints(NamedTuple):
    """Where one engine core listens."""

    input: str
    output: str

    @classmethod
    def in_directory(cls, directory: Path) -> "Endpoints":
        """Unix sockets inside `directory`. Raises `StartupError` when the path is too long for one."""
        endpoints = cls(f"ipc://{directory}/engine-input.sock", f"ipc://{directory}/engine-output.sock")
        if len(os.fsencode(endpoints.output)) - len("ipc://") > _MAX_IPC_PATH:
            raise StartupError(f"--socket-dir {directory} is too long: a socket path holds {_MAX_IPC_PATH} bytes")
        return endpoints

    def unlink(self) -> None:
        """Remove the socket files (what a killed process leaves behind). Safe to repeat."""
        for endpoint in self:
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def make_socket_dir(path: Path | None = None) -> Path:
    """A directory only this user can enter (mode 0700): `path`, or a fresh one. Raises `StartupError`."""
    if path is None:
        return Path(tempfile.mkdtemp(prefix="minivllm-"))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"--socket-dir {path} cannot be made: {error.strerror}") from error
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StartupError(f"--socket-dir {path} must belong to you alone: chmod 700 it or choose another")
    return path


def remove_socket_dir(path: Path) -> None:
    """Remove what a run keeps in `path`, and `path` itself when nothing else is in it. Safe to repeat."""
    for file in (*path.glob("engine-*.sock"), path / CONFIG_FILE):
        file.unlink(missing_ok=True)
    shutil.rmtree(path / METRICS_DIR, ignore_errors=True)
    with contextlib.suppress(OSError):  # a directory of the user's own with other files in it stays
        path.rmdir()


def engine_input(context: zmq.Context[Any], endpoints: Endpoints) -> Any:
    """PULL, bound by the engine core."""
    socket = _socket(context, zmq.PULL)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.bind(endpoints.input)
    return socket


def engine_output(context: zmq.Context[Any], endpoints: Endpoints) -> Any:
    """XPUB, bound by the engine core; reading it yields b"\\x01topic" on subscribe and b"\\x00topic" on departure."""
    socket = _socket(context, zmq.XPUB)
    socket.setsockopt(zmq.XPUB_VERBOSE, 1)
    socket.bind(endpoints.output)
    return socket


def frontend_output(context: zmq.Context[Any], endpoints: Endpoints) -> Any:
    """PUSH, connected by a frontend. Send with NOBLOCK: without an engine core it raises `zmq.Again` at once."""
    socket = _socket(context, zmq.PUSH)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.connect(endpoints.input)
    return socket


def frontend_input(context: zmq.Context[Any], endpoints: Endpoints, frontend_id: bytes) -> Any:
    """SUB, connected by a frontend and subscribed to its own id."""
    socket = _socket(context, zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, frontend_id)
    socket.connect(endpoints.output)
    return socket


def _socket(context: zmq.Context[Any], kind: int) -> Any:
    # High-water mark 0: at the default of 1,000 a PUB silently drops what a slow reader has not fetched.
    # Memory stays bounded because the engine stops publishing to a frontend whose lease ran out.
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    return socket
