"""A child's line to its launcher: start-up reports go up, process facts come down, and its end means the parent died.

The launcher makes a socket pair per child and hands the child one end through `MINIVLLM_CONTROL_FD`. Both sides
write JSON objects, one a line. A process started by hand has none: reports are then dropped and nothing watched.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

CONTROL_FD_VARIABLE = "MINIVLLM_CONTROL_FD"


class ControlChannel:
    """The child's end. `inherit()` finds it; every method is safe without a launcher."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    @classmethod
    def inherit(cls) -> "ControlChannel":
        """The line that the launcher left in the environment, or a silent one."""
        fd = os.environ.pop(CONTROL_FD_VARIABLE, None)
        return cls(socket.socket(fileno=int(fd)) if fd else None)

    def report(self, state: str, **facts: Any) -> bool:
        """Tell the launcher: state "loading" (detail=…), "ready" (facts) or "failed" (reason=…, exit_code=…).

        False when there is no launcher that could pass it on to the user.
        """
        if self._connection is None:
            return False
        try:
            self._connection.sendall(json.dumps({"state": state, **facts}).encode() + b"\n")
        except OSError:
            return False  # the launcher is gone: `watch` is what acts on that
        return True

    def beat(self) -> None:
        """Tell the launcher that this process moves. Never waits: a launcher that does not read misses it."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(b'{"state": "alive"}\n', socket.MSG_DONTWAIT)

    def watch(self, on_message: Callable[[dict[str, Any]], None], on_parent_death: Callable[[], None]) -> None:
        """Read in a daemon thread: every line to `on_message`, the end of the line to `on_parent_death`, once."""
        if self._connection is None:
            return
        connection = self._connection

        def read() -> None:
            try:
                with connection.makefile("r", encoding="utf-8") as lines:
                    for line in lines:
                        on_message(json.loads(line))
            except (OSError, ValueError):
                pass  # a broken line is a dead parent
            on_parent_death()

        threading.Thread(target=read, name="control-channel", daemon=True).start()
