"""Decides whether a dead process is started again, and after how long."""

import time
from collections import deque
from collections.abc import Callable


class RestartPolicy:
    """At most `limit` restarts within `window` seconds, each after twice the delay of the one before (or `max_delay`).

    Old deaths are forgotten, so a process that serves for months survives one now and then.
    """

    def __init__(
        self,
        limit: int = 5,
        window: float = 60.0,
        first_delay: float = 0.1,
        max_delay: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._window = window
        self._first_delay = first_delay
        self._max_delay = max_delay
        self._clock = clock
        self._deaths: deque[float] = deque()

    def next_delay(self) -> float | None:
        """Count a death now. Seconds to wait before the restart, or None when the limit is passed."""
        now = self._clock()
        self._deaths.append(now)
        while self._deaths[0] < now - self._window:
            self._deaths.popleft()
        if len(self._deaths) > self._limit:
            return None
        return min(self._max_delay, self._first_delay * 2.0 ** (len(self._deaths) - 1))
