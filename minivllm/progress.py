"""Shows what start-up is doing: a spinner on a terminal, plain lines where nobody watches."""

import sys
from types import TracebackType
from typing import Self, TextIO


class Progress:
    """`with Progress() as progress: progress.update("Loading …")`. Writes to stderr, each text once."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._text = ""
        self._status = None
        if self._stream.isatty():
            from rich.console import Console  # here: 30 ms that only a terminal is worth

            self._status = Console(file=self._stream).status("")

    def update(self, text: str) -> None:
        """Show `text` as what is going on now."""
        if text == self._text:
            return
        self._text = text
        if self._status is None:
            print(text, file=self._stream, flush=True)
        else:
            self._status.update(text)
            self._status.start()

    def pause(self) -> None:
        """Clear the line for somebody else's progress bar; the next `update` shows again."""
        if self._status is not None:
            self._status.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pause()
