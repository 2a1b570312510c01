"""A progress bar that is drawn between measurements only: drawing in the background would take time from the engine."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ResultT = TypeVar("ResultT")


class Watch:
    """`with Watch() as watch: watch.say("loading")`; nothing is drawn where nobody watches."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(file=sys.stderr)
        self._progress = Progress(
            *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("starting", total=None)

    def plan(self, num_runs: int) -> None:
        """So many measurements are to come."""
        self._progress.reset(self._task, total=num_runs)

    def say(self, text: str) -> None:
        """What goes on now."""
        self._progress.update(self._task, description=text, refresh=True)

    def run(self, text: str, measure: Callable[[], ResultT]) -> ResultT:
        """One measurement."""
        self.say(text)
        result = measure()
        self._progress.advance(self._task)
        self._progress.refresh()
        return result

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
