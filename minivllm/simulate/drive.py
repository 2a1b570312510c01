"""Feeds a trace to an engine core, real or simulated, and notes what its clients would: one driver for both."""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine_core.engine import EngineCore, RequestOutput
from minivllm.errors import InvalidRequestError, StartupError
from minivllm.sampling_params import SamplingParams
from minivllm.simulate.trace import Arrival


class Clock(Protocol):
    """Seconds, and how to get to a later moment."""

    def __call__(self) -> float: ...

    def wait_until(self, time: float) -> None:
        """Return at `time`, or at once if it is over."""


class WallClock:
    """The time of day, for a real engine."""

    def __call__(self) -> float:
        return time.monotonic()

    def wait_until(self, time_: float) -> None:
        """Sleep: nothing happens before the next request comes."""
        time.sleep(max(0.0, time_ - time.monotonic()))


@dataclass(slots=True)
class RequestTimes:
    """One request of the trace; seconds from the start of the run."""

    arrival: Arrival
    first_token: float = -1.0
    last_token: float = -1.0
    queue_time: float = 0.0
    num_tokens: int = 0


@dataclass(slots=True)
class Observed:
    """Everything seen in one run. `itl` holds the seconds between tokens of all requests."""

    requests: list[RequestTimes] = field(default_factory=list)
    itl: "array[float]" = field(default_factory=lambda: array("d"))
    step_times: "array[float]" = field(default_factory=lambda: array("d"))  # end of each step
    used_blocks: "array[int]" = field(default_factory=lambda: array("l"))  # … and what was so then
    num_prefilling: "array[int]" = field(default_factory=lambda: array("l"))
    num_decoding: "array[int]" = field(default_factory=lambda: array("l"))


OnStep = Callable[[EngineCore, list[RequestOutput], float], None]


def run_trace(
    engine: EngineCore,
    trace: Sequence[Arrival],
    clock: Clock,
    on_step: OnStep | None = None,
) -> Observed:
    """Submit every request of `trace` when its time has come and step until all are done.

    Greedy, to the full length. `on_step(engine, outputs, seconds since the start)` is called after each step.
    Raises `StartupError` when a request does not fit the engine.
    """
    observed = Observed()
    live: dict[str, RequestTimes] = {}
    start, num_added = clock(), 0
    while num_added < len(trace) or engine.has_work:
        now = clock() - start
        while num_added < len(trace) and trace[num_added].time <= now:
            _submit(engine, num_added, trace[num_added], live, observed)
            num_added += 1
        if not engine.has_work:
            clock.wait_until(start + trace[num_added].time)
            continue
        outputs = engine.step()
        now = clock() - start
        _note_tokens(observed, live, outputs, now)
        _note_step(observed, engine, now)
        if on_step is not None:
            on_step(engine, outputs, now)
    return observed


def _submit(
    engine: EngineCore, index: int, arrival: Arrival, live: dict[str, RequestTimes], observed: Observed
) -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=arrival.num_output_tokens)
    request_id = f"request-{index}"
    try:
        engine.add_request(request_id, arrival.prompt_token_ids(index, engine.model.vocab_size), params)
    except InvalidRequestError as error:
        raise StartupError(f"request {index} of the trace: {error}") from error
    live[request_id] = RequestTimes(arrival)
    observed.requests.append(live[request_id])


def _note_tokens(
    observed: Observed, live: dict[str, RequestTimes], outputs: Sequence[RequestOutput], now: float
) -> None:
    add_latency = observed.itl.append
    for output in outputs:
        times = live[output.request_id]
        if output.token_ids:
            if times.num_tokens:
                add_latency(now - times.last_token)
            else:
                times.first_token = now
            times.last_token = now
            times.num_tokens += 1
        if output.finished is not None:
            times.queue_time = output.finished.queue_time
            del live[output.request_id]


def _note_step(observed: Observed, engine: EngineCore, now: float) -> None:
    observed.step_times.append(now)
    observed.used_blocks.append(engine.kv.pool.num_used)
    observed.num_prefilling.append(len(engine.scheduler.prefill_queue))
    observed.num_decoding.append(len(engine.scheduler.decode_queue))
