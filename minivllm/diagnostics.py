"""What a process shows of itself when it is asked to (SIGUSR1), or when it is stuck.

faulthandler writes the stacks from C: it needs neither Python's lock nor a main thread that still moves.
"""

import faulthandler
import signal
from collections.abc import Callable


def dump_stacks_on_signal(then: Callable[[], None] | None = None) -> None:
    """Have SIGUSR1 write the stacks of all threads to stderr; and call `then` as a signal handler, where given."""
    faulthandler.unregister(signal.SIGUSR1)
    if then is not None:
        signal.signal(signal.SIGUSR1, lambda *_: then())
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=then is not None)


class Watchdog:
    """Unless `reset` is called in time: the stacks of all threads go to stderr and the process ends with code 1."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def reset(self) -> None:
        """All is well. The first call starts the watch."""
        faulthandler.dump_traceback_later(self._seconds, exit=True)

    def stop(self) -> None:
        """Watch no longer."""
        faulthandler.cancel_dump_traceback_later()
