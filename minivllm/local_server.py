"""Runs `minivllm serve` as a subprocess on a free port, for what needs a server of its own: the benchmark, the demo."""

import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from minivllm.errors import StartupError

COMMAND = (sys.executable, "-P", "-m", "minivllm", "serve", "--port", "0")
_LAST_LINES = 50


class LocalServer:
    """A context manager: started and ready inside the block, drained and gone after it.

    options: of `minivllm serve`. on_log: gets every line of its stderr, in a thread. url: where it listens, once ready.
    """

    def __init__(
        self,
        *options: str,
        command: tuple[str, ...] = COMMAND,
        on_log: Callable[[str], None] = lambda line: None,
        stop_timeout: float = 60.0,
    ) -> None:
        self._command = (*command, *options)
        self._on_log = on_log
        self._stop_timeout = stop_timeout
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.url = ""

    def start(self) -> None:
        """Start the process; it is not ready yet."""
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._log_reader = threading.Thread(target=self._read_log, name="server-log", daemon=True)
        self._log_reader.start()

    def wait_until_ready(self) -> None:
        """Block until the server says where it listens. Raises `StartupError` with its reason when it does not."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        match = re.search(r" at (\S+) \(Ctrl-C", line)
        if match is None:
            code = self.wait()
            raise StartupError(f"the server did not start (exit code {code}): {self.log[-1] if self.log else line}")
        self.url = match[1]

    @property
    def log(self) -> list[str]:
        """The last lines of its stderr; all that matters once the process has ended."""
        return list(self._last_lines)

    def wait(self) -> int:
        """Wait for its end; the exit code. Raises `subprocess.TimeoutExpired`."""
        code = self.process.wait(self._stop_timeout)
        self._log_reader.join()
        if self.process.stdout:
            self.process.stdout.close()
        return code

    def stop(self) -> None:
        """Ask it to end; make it end when that takes too long. Safe to repeat."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.wait()

    def _read_log(self) -> None:
        if self.process.stderr is None:
            return
        with self.process.stderr as lines:
            for line in lines:
                self._last_lines.append(line.rstrip("\n"))
                self._on_log(self._last_lines[-1])

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
