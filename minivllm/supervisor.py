"""Watches the engine core and the frontends: one queue of events, one loop, no way to hang.

start all ──▶ until all are ready ──▶ watch ──▶ stop: frontends drain, then the engine core, then SIGKILL
                   │ exit, "failed",     │ signal, engine core gone,
                   ▼ overdue, signal     ▼ frontend gone too often
                  stop                  stop
"""

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.child import Child, ChildSpec, Exited, Reported, describe_exit
from minivllm.errors import StartupError
from minivllm.process_facts import process_facts
from minivllm.restart_policy import RestartPolicy

logger = logging.getLogger(__name__)

EXIT_ENGINE_DEAD = 70
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FACTS_INTERVAL = 2.0
_EXIT_GRACE = 5.0  # seconds to end by itself after draining, before SIGKILL
_ABORT_GRACE = 2.0  # the same without draining


@dataclass(frozen=True)
class Signalled:
    """The launcher was told to stop."""

    signal_number: int


@dataclass(frozen=True)
class Overdue:
    """`child` has had its time to become ready."""

    child: Child


@dataclass(frozen=True)
class Due:
    """It is time to start `spec` again."""

    spec: ChildSpec


Event = Reported | Exited | Signalled | Overdue | Due


class Supervisor:
    """Runs one engine core and some frontends. Times in seconds; `on_progress` gets what a loading process reports."""

    def __init__(
        self,
        engine: ChildSpec,
        frontends: Sequence[ChildSpec],
        *,
        startup_timeout: float,
        shutdown_timeout: float,
        on_progress: Callable[[str], None],
        on_ready: Callable[[], None],
    ) -> None:
        self._engine_spec = engine
        self._frontend_specs = frontends
        self._startup_timeout = startup_timeout
        self._shutdown_timeout = shutdown_timeout
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._children: dict[str, Child] = {}  # by name; those that have not exited
        self._policies = {spec.name: RestartPolicy() for spec in frontends}

    async def run(self) -> int:
        """Start, watch and stop everything; the exit code. Raises `StartupError` after stopping everything."""
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._events.put_nowait, Signalled(number))
        drain = False
        facts: asyncio.Task[None] | None = None
        try:
            for spec in (self._engine_spec, *self._frontend_specs):
                await self._start(spec)
            if not await self._until_ready():
                return 0
            self._on_ready()
            facts = asyncio.create_task(self._send_process_facts())
            exit_code = await self._watch()
            drain = exit_code == 0 or self._engine_spec.name not in self._children  # clients are to hear why
            return exit_code
        finally:
            if facts is not None:
                facts.cancel()
            await (self._drain() if drain else self._stop_now())

    async def _start(self, spec: ChildSpec) -> None:
        child = await Child.start(spec, self._events.put_nowait)
        self._children[spec.name] = child
        asyncio.get_running_loop().call_later(self._startup_timeout, self._events.put_nowait, Overdue(child))

    async def _next_event(self) -> Event:
        event = await self._events.get()
        if isinstance(event, Exited):
            self._children.pop(event.child.name, None)
        return event

    async def _until_ready(self) -> bool:
        """True when every child is ready, False when told to stop. Raises `StartupError` with the first reason."""
        while not all(child.is_ready for child in self._children.values()):
            match await self._next_event():
                case Signalled():
                    return False
                case Exited(child, returncode):
                    raise StartupError(f"{child.name} {describe_exit(returncode)} while starting")
                case Overdue(child) if not child.is_ready:
                    raise StartupError(
                        f"{child.name} was not ready within {self._startup_timeout:g} s (--startup-timeout)"
                    )
                case Reported(child, {"state": "failed", **facts}):
                    raise StartupError(str(facts.get("reason") or f"{child.name} failed to start"))
                case Reported(child, {"state": "loading", "detail": detail}):
                    self._on_progress(str(detail))
        return True

    async def _watch(self) -> int:
        """Serve until there is a reason to stop; the exit code."""
        while True:
            match await self._next_event():
                case Signalled(number):
                    logger.info("%s: stopping (again: at once)", signal.Signals(number).name)
                    return 0
                case Exited(child, returncode):
                    if child.name == self._engine_spec.name:
                        self._tell_frontends({"engine_gone": f"the engine core {describe_exit(returncode)}"})
                    if not self._plan_restart(child, returncode):
                        return EXIT_ENGINE_DEAD
                case Due(spec):
                    await self._start(spec)
                case Overdue(child) if not child.is_ready:
                    logger.error("%s was not ready within %g s: killing it", child.name, self._startup_timeout)
                    child.kill()
                case Reported(child, {"state": "failed", **facts}):
                    logger.error("%s failed: %s", child.name, facts.get("reason"))

    def _plan_restart(self, child: Child, returncode: int) -> bool:
        """Have a dead child started again after a while. False when it has no restart left."""
        policy = self._policies.get(child.name)
        delay = policy.next_delay() if policy else None
        if delay is None:
            logger.error("%s (pid %d) %s: stopping", child.name, child.pid, describe_exit(returncode))
            return False
        logger.error("%s (pid %d) %s: restarting", child.name, child.pid, describe_exit(returncode))
        asyncio.get_running_loop().call_later(delay, self._events.put_nowait, Due(child.spec))
        return True

    async def _drain(self) -> None:
        """Let running requests finish: the frontends first, while the engine core still works for them."""
        frontends = [child for child in self._children.values() if child.name != self._engine_spec.name]
        for child in frontends:
            child.terminate()
        engine = self._children.get(self._engine_spec.name)
        if await self._gone(frontends, self._shutdown_timeout + _EXIT_GRACE, needed=engine) and engine:
            engine.terminate()
            await self._gone([engine], _EXIT_GRACE)
        await self._stop_now()

    async def _stop_now(self) -> None:
        """End what still runs without draining."""
        children = list(self._children.values())
        for child in children:
            child.hang_up()
        if not await self._gone(children, _ABORT_GRACE):
            for child in self._children.values():
                logger.warning("%s (pid %d) did not end in time: killing it", child.name, child.pid)
                child.kill()
            await self._gone(children, _ABORT_GRACE)

    async def _gone(self, children: Sequence[Child], seconds: float, needed: Child | None = None) -> bool:
        """Wait until `children` have exited. False after `seconds`, on another signal, or when `needed` exits."""
        try:
            async with asyncio.timeout(seconds):
                while any(self._children.get(child.name) is child for child in children):
                    match await self._next_event():
                        case Signalled():
                            return False
                        case Exited(child, returncode) if child is needed:
                            logger.error("%s %s while draining", child.name, describe_exit(returncode))
                            return False
        except TimeoutError:
            return False
        return True

    async def _send_process_facts(self) -> None:
        while True:
            facts = process_facts({child.name: child.pid for child in self._children.values()})
            self._tell_frontends({"processes": facts})
            await asyncio.sleep(_FACTS_INTERVAL)

    def _tell_frontends(self, message: dict[str, Any]) -> None:
        for child in self._children.values():
            if child.name in self._policies:
                child.send(message)
