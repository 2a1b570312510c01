"""Times single passes of an engine core: a decode step of n requests, the prefill of some prompts."""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from engine_core.device import WatchedRunner
from engine_core.engine import EngineCore
from engine_core.scheduler import Batch
from minivllm.errors import InvalidRequestError, StartupError
from minivllm.sampling_params import SamplingParams

_NUM_WARM_STEPS = 2


@dataclass(frozen=True, slots=True)
class TimedDecode:
    """Seconds of one step of `num_rows` requests that read `num_context_tokens` from the KV cache in all."""

    num_rows: int
    num_context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PassShape:
    """One prefill pass: (start, count) of every chunk in it."""

    chunks: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.chunks)


@dataclass(frozen=True, slots=True)
class TimedPrefill:
    """Seconds from the submission of some prompts to their last first token, and the passes in between."""

    passes: tuple[PassShape, ...]
    seconds: float


TimedT = TypeVar("TimedT", TimedDecode, TimedPrefill)


class PassTimer:
    """Needs an idle engine and leaves it idle. Prompts are random, those of prefill passes always new ones.

    Decoding requests have the same prompts again, so that their prefill is found in the prefix cache the next time.
    """

    def __init__(self, engine: EngineCore, repeats: int = 3, num_steps: int = 12) -> None:
        self._engine = engine
        self._repeats = repeats
        self._num_steps = num_steps
        self._source = random.Random(0)
        self._num_requests = 0

    def decode(self, prompt_lens: Sequence[int]) -> TimedDecode:
        """The median of `num_steps` steps. Raises `StartupError` when so many requests do not fit."""
        # The first ones decode while the last ones prefill, so all ask for more than is timed.
        num_rows = len(prompt_lens)
        prompts = [self._prompt(random.Random(row), length) for row, length in enumerate(prompt_lens)]
        request_ids = self._add(prompts, num_rows + _NUM_WARM_STEPS + self._num_steps + 2)
        scheduler = self._engine.scheduler
        while len(scheduler.decode_queue) < num_rows:
            self._engine.step()
            if scheduler.num_preemptions or len(scheduler.decode_queue) + len(scheduler.prefill_queue) < num_rows:
                raise StartupError(f"{num_rows} requests of up to {max(prompt_lens)} tokens do not run together")
        for _ in range(_NUM_WARM_STEPS):
            self._engine.step()
        times, contexts = [], []
        for _ in range(self._num_steps):
            contexts.append(sum(request.num_computed_tokens + 1 for request in scheduler.decode_queue))
            times.append(self._step_seconds())
        self._engine.abort(request_ids)
        self._drain()
        return TimedDecode(num_rows, statistics.median_low(contexts), statistics.median(times))

    def prefill(self, prompt_lens: Sequence[int]) -> TimedPrefill:
        """The median of `repeats` runs. Raises `StartupError` when a prompt does not fit."""
        return median_pass([self._prefill_once(prompt_lens) for _ in range(self._repeats)])

    def _prefill_once(self, prompt_lens: Sequence[int]) -> TimedPrefill:
        with launched_batches(self._engine) as batches:
            self._add([self._prompt(self._source, length) for length in prompt_lens], 1)
            start = time.perf_counter()
            self._drain()
            seconds = time.perf_counter() - start
        return TimedPrefill(tuple(PassShape(tuple(zip(b.starts, b.counts, strict=True))) for b in batches), seconds)

    def _prompt(self, source: random.Random, length: int) -> list[int]:
        return source.choices(range(self._engine.model.vocab_size), k=length)

    def _add(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
        request_ids = []
        for prompt in prompts:
            self._num_requests += 1
            request_ids.append(f"pass-{self._num_requests}")
            try:
                self._engine.add_request(request_ids[-1], prompt, params)
            except InvalidRequestError as error:
                raise StartupError(f"a prompt of {len(prompt)} tokens: {error}") from error
        return request_ids

    def _step_seconds(self) -> float:
        start = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - start

    def _drain(self) -> None:
        while self._engine.has_work:
            self._engine.step()


def median_pass(timed: Sequence[TimedT]) -> TimedT:
    """The one that took the median time (of an even number, the slower of the middle two)."""
    return sorted(timed, key=lambda each: each.seconds)[len(timed) // 2]


@contextmanager
def launched_batches(engine: EngineCore) -> Iterator[list[Batch]]:
    """Every batch that `engine` launches meanwhile."""
    batches: list[Batch] = []
    runner = engine.runner
    engine.runner = WatchedRunner(runner, batches.append)
    try:
        yield batches
    finally:
        engine.runner = runner
