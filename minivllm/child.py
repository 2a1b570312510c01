"""One process under the launcher: started in its own session, heard through its control line, ended for certain."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.control import CONTROL_FD_VARIABLE

logger = logging.getLogger(__name__)

_MAX_UNREAD_BYTES = 64 * 1024  # a child that reads nothing (stopped, say) misses messages instead of filling memory


@dataclass(frozen=True)
class ChildSpec:
    """How to start a child: `name` in logs and metrics, `command` as argv, descriptors it inherits."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reported:
    """`child` sent a line up its control channel, e.g. {"state": "ready"}."""

    child: "Child"
    message: dict[str, Any]


@dataclass(frozen=True)
class Exited:
    """`child` is gone; a negative return code is the signal that killed it."""

    child: "Child"
    returncode: int


class Child:
    """A running child process. Made by `start`; posts `Reported` and, last and once, `Exited`."""

    def __init__(self, spec: ChildSpec, process: asyncio.subprocess.Process, writer: asyncio.StreamWriter) -> None:
        self.spec = spec
        self.process = process
        self.is_ready = False
        self.last_heard = time.monotonic()
        self._writer = writer
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls, spec: ChildSpec, post: Callable[[Reported | Exited], None], variables: Mapping[str, str] | None = None
    ) -> "Child":
        """Start the process, with environment `variables` for this time only.

        It is the leader of its own session, so that Ctrl-C reaches only the launcher.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                env={**spec.environment, **(variables or {}), CONTROL_FD_VARIABLE: str(theirs.fileno())},
                pass_fds=(theirs.fileno(), *spec.pass_fds),
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        child = cls(spec, process, writer)
        listening = asyncio.create_task(child._listen(reader, post))
        child._tasks = [listening, asyncio.create_task(child._wait(listening, post))]
        return child

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    def send(self, message: dict[str, Any]) -> None:
        """Send a line down the control channel, or drop it when the child does not read."""
        transport = self._writer.transport
        if not transport.is_closing() and transport.get_write_buffer_size() < _MAX_UNREAD_BYTES:
            self._writer.write(json.dumps(message).encode() + b"\n")

    def dump_state(self) -> None:
        """Ask the process to log what it is doing (SIGUSR1)."""
        if self.is_running:
            self.process.send_signal(signal.SIGUSR1)

    def terminate(self) -> None:
        """Ask the process to end in its own way (SIGTERM)."""
        if self.is_running:
            self.process.terminate()

    def hang_up(self) -> None:
        """Close the control line: to the child its launcher is dead, so it ends without draining."""
        self._writer.close()
        self.terminate()

    def kill(self) -> None:
        """SIGKILL the process and whatever it started."""
        _kill_group(self.pid)

    async def _listen(self, reader: asyncio.StreamReader, post: Callable[[Reported | Exited], None]) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                self.last_heard = time.monotonic()
                if message.get("state") == "ready":
                    self.is_ready = True
                post(Reported(self, message))
        except (OSError, ValueError, AttributeError) as error:
            logger.warning("the control line of %s is broken: %s", self.name, error)

    async def _wait(self, listening: asyncio.Task[None], post: Callable[[Reported | Exited], None]) -> None:
        returncode = await self.process.wait()
        _kill_group(self.pid)  # compiler workers and the like must not outlive it
        # Its last words (why it failed) may still be in the line; a descendant may hold the line open.
        await asyncio.wait([listening], timeout=1.0)
        listening.cancel()
        self._writer.close()
        post(Exited(self, returncode))


def describe_exit(returncode: int) -> str:
    """`exited with code 3`, `was killed by SIGKILL`."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in the group
        os.killpg(pid, signal.SIGKILL)
