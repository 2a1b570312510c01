"""Faults on purpose, for tests and learners: what a bad day does to messages and steps. Off, nothing of it is there.

    --enable-debug --inject-faults drop=0.01,duplicate=0.01,reorder=0.01,corrupt=0.01,stall=30@step:100,kill@step:200

drop, duplicate, reorder, corrupt   probability, for each message either side sends
slow=SECONDS                        a frontend spends so long on each message of the engine core
stall=SECONDS, kill, oom @step:N    when the engine core launches its Nth step, in each life of it
seed=N                              of the random choices; without it they differ from run to run
"""

import math
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Frames = tuple[bytes | bytearray, ...]  # the last one is the message
Send = Callable[[Frames], None]

_RATES = ("drop", "duplicate", "reorder", "corrupt")


@dataclass(frozen=True)
class StepFault:
    """`kind` ("stall", "kill" or "oom") at the launch of step number `step`, counted from 1."""

    kind: str
    step: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Faults:
    """What to inject. The default injects nothing and costs nothing."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    slow: float = 0.0
    seed: int | None = None
    steps: tuple[StepFault, ...] = ()

    @classmethod
    def parse(cls, spec: str) -> "Faults":
        """Raises `ValueError` naming the part that is not understood."""
        values: dict[str, Any] = {}
        steps = []
        for part in filter(None, spec.replace(" ", "").split(",")):
            try:
                if "@" in part:
                    steps.append(_parse_step(part))
                else:
                    values.update(_parse_value(part))
            except ValueError as error:
                raise ValueError(f"{part!r} is not a fault: {error}") from error
        return cls(**values, steps=tuple(steps))

    def disturb_sends(self, send: Send) -> Send:
        """`send` with the faults of messages; `send` itself when there are none."""
        return _Disturbance(self, send) if any(getattr(self, name) for name in _RATES) else send

    def delay_reads(self, read: Callable[[], R]) -> Callable[[], R]:
        """`read` that takes `slow` seconds more whenever something is there; `read` itself when that is 0."""
        if not self.slow:
            return read

        def delayed() -> R:
            result = read()
            time.sleep(self.slow)
            return result

        return delayed

    def disturb_steps(self, launch: Callable[P, R], out_of_memory: Callable[[], Exception]) -> Callable[P, R]:
        """`launch` with the faults of steps; `launch` itself when there are none. `out_of_memory` makes the error."""
        if not self.steps:
            return launch
        faults = {fault.step: fault for fault in self.steps}
        count = 0

        def disturbed(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal count
            count += 1
            if (fault := faults.get(count)) is not None:
                _strike(fault, out_of_memory)
            return launch(*args, **kwargs)

        return disturbed


NO_FAULTS = Faults()


class _Disturbance:
    """Sends what it is given, mostly."""

    def __init__(self, faults: Faults, send: Send) -> None:
        self._faults = faults
        self._send = send
        self._random = random.Random(faults.seed)
        self._held: Frames | None = None  # until another message has overtaken it

    def __call__(self, frames: Frames) -> None:
        faults = self._faults
        if self._happens(faults.drop):
            return
        if self._happens(faults.corrupt):
            frames = (*frames[:-1], self._damage(frames[-1]))
        if self._held is None and self._happens(faults.reorder):
            self._held = frames
            return
        for _ in range(1 + self._happens(faults.duplicate)):
            self._send(frames)
        if self._held is not None:
            held, self._held = self._held, None
            self._send(held)

    def _happens(self, rate: float) -> bool:
        return rate > 0 and self._random.random() < rate

    def _damage(self, message: bytes | bytearray) -> bytes:
        damaged = bytearray(message)
        damaged[self._random.randrange(len(damaged))] ^= 1 << self._random.randrange(8)
        return bytes(damaged)


def _strike(fault: StepFault, out_of_memory: Callable[[], Exception]) -> None:
    if fault.kind == "oom":
        raise out_of_memory()
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(fault.seconds)


def _parse_value(part: str) -> dict[str, float | int]:
    name, _, value = part.partition("=")
    if name == "seed":
        return {name: int(value)}
    if name == "slow":
        return {name: _parse_seconds(value)}
    if name not in _RATES:
        raise ValueError(f"expected one of {', '.join(_RATES)}, slow, seed, or something @step:N")
    rate = float(value)
    if not 0.0 <= rate <= 1.0:
        raise ValueError("a probability lies in [0, 1]")
    return {name: rate}


def _parse_step(part: str) -> StepFault:
    what, _, when = part.partition("@")
    kind, _, seconds = what.partition("=")
    word, _, number = when.partition(":")
    if kind not in ("stall", "kill", "oom") or word != "step" or int(number) < 1:
        raise ValueError("expected stall=SECONDS@step:N, kill@step:N or oom@step:N")
    return StepFault(kind, int(number), _parse_seconds(seconds) if kind == "stall" else 0.0)


def _parse_seconds(value: str) -> float:
    seconds = float(value)
    if not 0.0 < seconds < math.inf:
        raise ValueError("seconds are more than 0")
    return seconds
