"""Watches the engine core and the frontends: one queue of events, one loop, no way to hang.

start all ──▶ until all are ready ──▶ watch ──▶ stop: frontends drain, then the engine core, then SIGKILL
                   │ exit, "failed",     │ exit, silence: restart
                   ▼ overdue, signal     ▼ too often, signal
                  stop                  stop

SIGTERM, SIGINT, SIGHUP stop (again: at once); SIGUSR1 has every process log its state; SIGUSR2 replaces the frontends.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.child import Child, ChildSpec, Exited, Reported, describe_exit
from minivllm.errors import StartupError
from minivllm.process_facts import process_facts
from minivllm.restart_policy import RestartPolicy
from minivllm.rolling_restart import RollingRestart

logger = logging.getLogger(__name__)

EXIT_ENGINE_DEAD = 70
ENGINE_CRASH_WINDOW = 600.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ROUND_INTERVAL = 2.0
_EXIT_GRACE = 5.0  # seconds to end by itself after draining, before SIGKILL
_ABORT_GRACE = 2.0  # the same without draining


@dataclass(frozen=True)
class Signalled:
    """The launcher was told something."""

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
    """Runs one engine core and some frontends. Times in seconds; `on_progress` gets what a loading process reports.

    max_engine_restarts: crashes within `ENGINE_CRASH_WINDOW` that are survived. silence_timeout: an engine core that
    has not moved for so long is killed, and so restarted.
    """

    def __init__(
        self,
        engine: ChildSpec,
        frontends: Sequence[ChildSpec],
        *,
        startup_timeout: float,
        shutdown_timeout: float,
        silence_timeout: float,
        max_engine_restarts: int,
        on_progress: Callable[[str], None],
        on_ready: Callable[[], None],
    ) -> None:
        self._engine_spec = engine
        self._frontend_specs = frontends
        self._startup_timeout = startup_timeout
        self._shutdown_timeout = shutdown_timeout
        self._silence_timeout = silence_timeout
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._children: dict[str, Child] = {}  # by name; those that have not exited and are not to be replaced
        self._alive: set[Child] = set()  # those and the ones that retire or replace another
        self._policies = {spec.name: RestartPolicy() for spec in frontends}
        self._policies[engine.name] = RestartPolicy(limit=max_engine_restarts, window=ENGINE_CRASH_WINDOW)
        self._rolling = RollingRestart(self._start)

    async def run(self) -> int:
        """Start, watch and stop everything; the exit code. Raises `StartupError` after stopping everything."""
        loop = asyncio.get_running_loop()
        for number in (*_STOP_SIGNALS, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                loop.add_signal_handler(number, self._events.put_nowait, Signalled(number))
        drain = False
        rounds: asyncio.Task[None] | None = None
        try:
            for spec in (self._engine_spec, *self._frontend_specs):
                self._children[spec.name] = await self._start(spec)
            if not await self._until_ready():
                return 0
            self._on_ready()
            rounds = asyncio.create_task(self._make_rounds())
            exit_code = await self._watch()
            drain = exit_code == 0 or self._engine is None  # clients are to hear why
            return exit_code
        finally:
            if rounds is not None:
                rounds.cancel()
            await (self._drain() if drain else self._stop_now())

    @property
    def _engine(self) -> Child | None:
        return self._children.get(self._engine_spec.name)

    async def _start(self, spec: ChildSpec, variables: Mapping[str, str] | None = None) -> Child:
        child = await Child.start(spec, self._events.put_nowait, variables)
        self._alive.add(child)
        asyncio.get_running_loop().call_later(self._startup_timeout, self._events.put_nowait, Overdue(child))
        return child

    async def _next_event(self) -> Event:
        """The next event that asks for a decision."""
        while True:
            event = await self._events.get()
            match event:
                case Exited(child):
                    self._alive.discard(child)
                case Signalled(signal.SIGUSR1):
                    self._dump_state()
                    continue
            return event

    def _dump_state(self) -> None:
        for child in sorted(self._alive, key=lambda child: child.name):
            logger.info("%s (pid %d) is %s", child.name, child.pid, "ready" if child.is_ready else "starting")
            child.dump_state()

    async def _until_ready(self) -> bool:
        """True when every child is ready, False when told to stop. Raises `StartupError` with the first reason."""
        while not all(child.is_ready for child in self._children.values()):
            match await self._next_event():
                case Signalled(number) if number in _STOP_SIGNALS:
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
                case Signalled(signal.SIGUSR2):
                    logger.info("SIGUSR2: replacing the frontends")
                    await self._rolling.begin(self._frontend_specs)
                case Signalled(number):
                    logger.info("%s: stopping (again: at once)", signal.Signals(number).name)
                    if self._engine is None:  # none is started any more, so nobody should wait for one
                        self._tell_frontends({"engine_lost": "the engine core died while the server was stopping"})
                    return 0
                case Exited(child) if self._rolling.is_successor(child):
                    self._rolling.give_up()
                case Exited(child, returncode) if self._children.get(child.name) is child:
                    del self._children[child.name]
                    if not self._plan_restart(child, returncode):
                        return EXIT_ENGINE_DEAD
                case Exited(child, returncode):
                    logger.info("%s (pid %d) has retired: it %s", child.name, child.pid, describe_exit(returncode))
                    await self._rolling.next()
                case Due(spec):
                    child = self._children[spec.name] = await self._start(spec)
                    logger.info("%s was started again as pid %d", child.name, child.pid)
                case Overdue(child) if not child.is_ready and child in self._alive:
                    logger.error("%s was not ready within %g s: killing it", child.name, self._startup_timeout)
                    child.kill()
                case Reported(child, message):
                    await self._note_report(child, message)

    async def _note_report(self, child: Child, message: dict[str, Any]) -> None:
        match message:
            case {"state": "failed", **facts}:
                logger.error("%s failed: %s", child.name, facts.get("reason"))
            case {"state": "ready"} if self._rolling.is_successor(child):
                await self._replace(child)

    async def _replace(self, successor: Child) -> None:
        self._rolling.take_over()
        predecessor = self._children.get(successor.name)
        self._children[successor.name] = successor
        if predecessor is None:  # it died meanwhile
            await self._rolling.next()
        else:
            predecessor.send({"retire": True})

    def _plan_restart(self, child: Child, returncode: int) -> bool:
        """Have a dead child started again after a while. False when it has no restart left."""
        delay, end = self._policies[child.name].next_delay(), describe_exit(returncode)
        if child.name == self._engine_spec.name:
            key = "engine_lost" if delay is None else "engine_gone"
            self._tell_frontends({key: f"the engine core {end}", "pid": child.pid})
        if delay is None:
            logger.error("%s (pid %d) %s: stopping", child.name, child.pid, end)
            return False
        logger.error("%s (pid %d) %s: restarting", child.name, child.pid, end)
        asyncio.get_running_loop().call_later(delay, self._events.put_nowait, Due(child.spec))
        return True

    async def _drain(self) -> None:
        """Let running requests finish: the frontends first, while the engine core still works for them."""
        frontends = [child for child in self._alive if child.name != self._engine_spec.name]
        for child in frontends:
            child.terminate()
        engine = self._engine
        if await self._gone(frontends, self._shutdown_timeout + _EXIT_GRACE, needed=engine) and engine:
            engine.terminate()
            await self._gone([engine], _EXIT_GRACE)
        await self._stop_now()

    async def _stop_now(self) -> None:
        """End what still runs without draining."""
        children = list(self._alive)
        for child in children:
            child.hang_up()
        if not await self._gone(children, _ABORT_GRACE):
            for child in self._alive:
                logger.warning("%s (pid %d) did not end in time: killing it", child.name, child.pid)
                child.kill()
            await self._gone(children, _ABORT_GRACE)

    async def _gone(self, children: Sequence[Child], seconds: float, needed: Child | None = None) -> bool:
        """Wait until `children` have exited. False after `seconds`, on another signal, or when `needed` exits."""
        try:
            async with asyncio.timeout(seconds):
                while any(child in self._alive for child in children):
                    match await self._next_event():
                        case Signalled(number) if number in _STOP_SIGNALS:
                            return False
                        case Exited(child, returncode) if child is needed:
                            logger.error("%s %s while draining", child.name, describe_exit(returncode))
                            return False
        except TimeoutError:
            return False
        return True

    async def _make_rounds(self) -> None:
        """Every few seconds: tell the frontends what the processes use, look whether the engine core still moves."""
        while True:
            facts = process_facts({child.name: child.pid for child in self._children.values()})
            self._tell_frontends({"processes": facts})
            self._kill_if_silent(self._engine)
            await asyncio.sleep(_ROUND_INTERVAL)

    def _kill_if_silent(self, engine: Child | None) -> None:
        """What a stuck engine core cannot do itself (see `diagnostics.Watchdog`): it may be stopped altogether."""
        if engine is None or not engine.is_ready:
            return
        silence = time.monotonic() - engine.last_heard
        if silence > self._silence_timeout:
            logger.error("%s (pid %d) has not moved for %.1f s: killing it", engine.name, engine.pid, silence)
            engine.kill()

    def _tell_frontends(self, message: dict[str, Any]) -> None:
        for child in self._alive:
            if child.name != self._engine_spec.name:
                child.send(message)
