"""Runs work on an engine core and times it, from the first request submitted to the last token read."""

import gc
import time
from dataclasses import dataclass

from engine_core.engine import EngineCore
from minivllm.bench.offline.work import Work
from minivllm.errors import MiniVLLMError
from minivllm.protocol import EngineStats
from minivllm.sampling_params import SamplingParams


class MeasurementError(MiniVLLMError):
    """The engine did not do the work; a time would mean nothing."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of some work."""

    seconds: float
    num_decode_passes: int
    num_prefill_passes: int
    num_preemptions: int


def run_work(engine: EngineCore, work: Work, temperature: float) -> Run:
    """Submit all of `work` to an idle engine and step until it is done.

    The prefix cache is emptied first, so that a repetition does the same work. Raises `MeasurementError` when a request
    ends early and `InvalidRequestError` when one does not fit.
    """
    params = [SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=n) for n in work.output_lens]
    engine.kv.pool.reset_prefix_cache()
    gc.collect()
    before, start = _counts(engine.stats()), time.perf_counter()
    for index, (prompt, each) in enumerate(zip(work.prompts, params, strict=True)):
        engine.add_request(f"bench-{index}", prompt, each)
    num_tokens = 0
    while engine.has_work:
        for output in engine.step():
            num_tokens += len(output.token_ids)
            if output.finished is not None and output.finished.reason != "length":
                raise MeasurementError(f"a request ended by {output.finished.reason}: {output.finished.message}")
    seconds = time.perf_counter() - start
    if num_tokens != work.num_output_tokens:
        raise MeasurementError(f"{num_tokens} tokens came where {work.num_output_tokens} were asked for")
    return Run(seconds, *(after - b for after, b in zip(_counts(engine.stats()), before, strict=True)))


def _counts(stats: EngineStats) -> tuple[int, int, int]:
    histograms = stats.histograms
    passes = [sum(histograms[name].counts) for name in ("decode_batch_size", "prefill_batch_tokens")]
    return passes[0], passes[1], stats.num_preemptions
