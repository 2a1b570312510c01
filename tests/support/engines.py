"""Engines under test: built on a model directory, driven to the end, and checked for leaks when the test is over."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_core.engine import EngineCore
from minivllm.config import EngineConfig
from minivllm.protocol import Finished, Logprobs
from minivllm.sampling_params import SamplingParams

MAX_STEPS = 10_000  # far beyond any test: an engine that needs more is stuck


@dataclass(slots=True)
class Result:
    """All that an engine said of one request."""

    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None
    logprobs: Logprobs = field(default_factory=Logprobs)
    prompt_logprobs: Logprobs = field(default_factory=Logprobs)

    @property
    def reason(self) -> str | None:
        return self.finished.reason if self.finished else None


@contextmanager
def running_engine(directory: Path, **options: Any) -> Iterator[EngineCore]:
    """An `EngineCore` on the CPU in float32; `options` are those of `EngineConfig`. Ends with `assert_idle`."""
    # Few blocks: the integrity check after every step looks at all of them.
    defaults = {"device": "cpu", "dtype": "float32", "block_size": 4, "num_gpu_blocks_override": 400}
    config = EngineConfig(**{"model": str(directory)} | defaults | options)
    engine = EngineCore(config, directory)
    yield engine
    assert_idle(engine)


def assert_idle(engine: EngineCore) -> None:
    """Nothing is queued, no block is held, and every count reconciles."""
    engine.check_integrity()
    assert not engine.has_work
    stats = engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)
    assert (stats.kv_blocks_used, stats.kv_blocks_leaked) == (0, 0)
    assert stats.kv_blocks_cached + stats.kv_blocks_free == engine.kv_pool.num_blocks
    assert stats.num_requests_submitted == sum(stats.num_requests_finished.values())


def run_to_end(engine: EngineCore, on_step: Callable[[int], None] = lambda step: None) -> dict[str, Result]:
    """Step until idle and check the engine's integrity after every step; `on_step(i)` runs before step i."""
    results: dict[str, Result] = {}
    for step in range(MAX_STEPS):
        on_step(step)
        if not engine.has_work:
            return results
        step_once(engine, results)
    raise AssertionError(f"still at work after {MAX_STEPS} steps")


def step_once(engine: EngineCore, results: dict[str, Result]) -> None:
    """One step; what it brought is added to `results`. A request that has ended must stay silent."""
    for output in engine.step():
        result = results.setdefault(output.request_id, Result())
        assert result.finished is None, f"{output.request_id} speaks after its end"
        result.token_ids += output.token_ids
        result.finished = output.finished
        if output.logprobs is not None:
            assert len(output.logprobs) == len(output.token_ids)
            result.logprobs.extend(output.logprobs)
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs.start == len(result.prompt_logprobs) + 1
            result.prompt_logprobs.extend(output.prompt_logprobs)
    engine.check_integrity()


def generate(
    engine: EngineCore, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[list[int]]:
    """The tokens of each prompt, all added at once. Every request must end by itself."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        engine.add_request(str(index), prompt, one)
    results = run_to_end(engine)
    assert {result.reason for result in results.values()} <= {"length", "stop"}
    return [results[str(index)].token_ids for index in range(len(prompts))]


def greedy(max_tokens: int | None, **changes: Any) -> SamplingParams:
    """Exactly `max_tokens` most probable tokens, whatever they are."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | changes)
