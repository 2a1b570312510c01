"""Replaces the frontends one by one: each successor has the engine core before it listens and its predecessor retires.

old  serves ···················│ retire: accepts no more, finishes its streams ─▶ exits
new              starts ─ ready│ serves                                                      then the next frontend
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping

from minivllm.child import Child, ChildSpec
from minivllm.listener import SUCCESSOR_VARIABLE

logger = logging.getLogger(__name__)


class RollingRestart:
    """`start` starts a process that shares the listening socket with the one it replaces."""

    def __init__(self, start: Callable[[ChildSpec, Mapping[str, str]], Awaitable[Child]]) -> None:
        self._start = start
        self._waiting: deque[ChildSpec] = deque()
        self._successor: Child | None = None
        self._under_way = False

    async def begin(self, specs: Iterable[ChildSpec]) -> None:
        """Replace the processes of `specs`. Does nothing while a restart is under way."""
        if not self._under_way:
            self._under_way = True
            self._waiting.extend(specs)
            await self.next()

    async def next(self) -> None:
        """The last predecessor is gone: start the next successor, if one is left."""
        if self._waiting:
            self._successor = await self._start(self._waiting.popleft(), {SUCCESSOR_VARIABLE: "1"})
        else:
            self._under_way = False

    def is_successor(self, child: Child) -> bool:
        """Whether `child` is starting to replace another."""
        return child is self._successor

    def take_over(self) -> None:
        """The successor serves now."""
        self._successor = None

    def give_up(self) -> None:
        """The successor failed: what serves goes on serving."""
        logger.error("rolling restart: %s failed to start, the old one stays", self._successor and self._successor.name)
        self._successor = None
        self._under_way = False
        self._waiting.clear()
