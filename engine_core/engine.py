"""The engine without sockets: add, abort, step. The server drives it over ZeroMQ, `minivllm.LLM` in-process.

step()   schedule ─▶ launch N+1 ─┐ no wait for the device        depth 1 (GPU): N+1 runs while N is read
         outputs  ◀─ update ◀─ collect N                         depth 0 (CPU): N is collected at once
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine_core.admission import Admission
from engine_core.decision_log import DecisionLog
from engine_core.device import Device, LaunchedTokens, Report, Runner, load_device
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.out_of_memory import Shortage, attempt, release_cached_memory
from engine_core.request import Request
from engine_core.scheduler import Batch, Scheduler
from engine_core.stats import EngineCounters
from engine_core.step_records import StepRecorder
from minivllm.config import EngineConfig
from minivllm.errors import DuplicateRequestError
from minivllm.protocol import EngineFacts, EngineStats, Finished, FinishReason, Logprobs
from minivllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_MOST_SHORTAGES = 256  # of one request's smallest passes, before more of them are no use


@dataclass(slots=True)
class RequestOutput:
    """What one step brought for one request: new tokens, its end, or both."""

    request_id: str
    token_ids: list[int]
    finished: Finished | None = None
    logprobs: Logprobs | None = None  # of `token_ids`, where the request asks
    prompt_logprobs: Logprobs | None = None  # of the next tokens of its prompt, likewise


@dataclass(slots=True)
class _Launched:
    batch: Batch
    tokens: LaunchedTokens
    time: float


class EngineCore:
    """One model on one device, serving many requests. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        config: EngineConfig,
        directory: Path,
        report: Report = lambda detail: None,
        load: Callable[[EngineConfig, Path, Report], Device] = load_device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the model in `directory`; `load` brings another device, `clock` another time. Raises `StartupError`."""
        self.config = config
        device = load(config, directory, report)
        self.model, self.kv_pool = device.model, device.kv_pool
        self.runner: Runner = device.runner
        self.max_model_len, self.max_num_batched_tokens = device.max_model_len, device.max_num_batched_tokens
        eos_token_ids = self.model.eos_token_ids
        self.admission = Admission(self.model.vocab_size, self.max_model_len, eos_token_ids, clock, device.grammars)
        self.kv = KVCacheManager(self.kv_pool.num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(self.kv, config.max_num_seqs, self.max_num_batched_tokens)
        self.counters = EngineCounters(clock)
        self.decision_log = DecisionLog(config.record, config, device) if config.record else None
        if self.decision_log is not None:
            self.runner = self.decision_log.recorded(device.runner)
        self.records = StepRecorder(self.scheduler, self.kv.pool)
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[_Launched] = deque()
        self._depth = device.depth
        self._collected_time = -math.inf  # of the last pass: the next one has the device from then on
        self._events: dict[str, RequestOutput] = {}  # ends that no step produced (aborts)

    @property
    def has_work(self) -> bool:
        """Whether `step()` has anything to do."""
        return bool(self._events or self._in_flight or self.scheduler.has_work)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Queue a request; with `output_token_ids` it continues after them. Raises `InvalidRequestError`."""
        if request_id in self._requests or request_id in self._events:
            raise DuplicateRequestError(f"request_id {request_id!r} is in use", "request_id")
        request = self.admission.make_request(request_id, prompt_token_ids, params, output_token_ids)
        self._requests[request_id] = request
        self.counters.num_submitted += 1
        self.scheduler.add(request)
        if self.decision_log is not None:
            self.decision_log.add(request)
        self.records.queued(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests now; unknown ids (finished already) are ignored. Their end comes with the next `step()`."""
        if self.decision_log is not None:
            self.decision_log.abort(list(request_ids))
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._events[request_id] = RequestOutput(request_id, [], self._finish(request, "abort"))

    def step(self) -> list[RequestOutput]:
        """Launch the next pass and collect the oldest one in flight. Never waits longer than for one pass."""
        if self.decision_log is not None:
            self.decision_log.step()
        outputs, self._events = list(self._events.values()), {}
        if self._in_flight and not self.scheduler.can_run_ahead():
            outputs += self._collect()
        batch = self.scheduler.schedule()
        if batch is not None:
            outputs += self._launch(batch)
        if self._in_flight and (batch is None or len(self._in_flight) > self._depth):
            outputs += self._collect()
        return outputs

    def stats(self) -> EngineStats:
        """All counters and gauges now."""
        held = {block for request in self.held_requests() for block in request.block_table}
        return self.counters.snapshot(self.scheduler, self.kv, len(held))

    def facts(self, pid: int) -> EngineFacts:
        """What does not change while this engine lives."""
        return EngineFacts(
            pid=pid,
            model=self.config.model,
            device=str(self.model.device),
            dtype=str(self.model.layout.dtype).removeprefix("torch."),
            vocab_size=self.model.vocab_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.config.max_num_seqs,
            block_size=self.config.block_size,
            num_blocks=self.kv_pool.num_blocks,
            kv_bytes_per_token=self.model.layout.bytes_per_token,
            weight_bytes=self.model.weight_bytes,
            eos_token_ids=list(self.model.eos_token_ids),
        )

    def check_integrity(self) -> None:
        """Raise `ValueError` unless blocks, queues and counts reconcile. Call it between steps."""
        self.kv.check_integrity(self.held_requests())
        queued = {*self.scheduler.prefill_queue, *self.scheduler.decode_queue}
        if queued != set(self._requests.values()):
            raise ValueError(f"{len(queued)} requests queued, {len(self._requests)} known")
        num_done = sum(self.counters.num_finished.values())
        if self.counters.num_submitted != num_done + len(self._requests):
            raise ValueError(
                f"{self.counters.num_submitted} submitted, {num_done} finished, {len(self._requests)} live"
            )

    def held_requests(self) -> set[Request]:
        """Requests that may hold blocks: the live ones, and ended ones that a pass in flight still names."""
        in_flight = {request for launched in self._in_flight for request in launched.batch.requests}
        return in_flight | set(self._requests.values())

    def _launch(self, batch: Batch) -> list[RequestOutput]:
        now = self._clock()
        for request in batch.started:
            request.first_scheduled_time = request.first_scheduled_time or now
        self.records.scheduled(batch, now)
        if self.config.log_step_composition:
            logger.info("%s of %d tokens: %s", batch.kind, batch.num_tokens, _composition(batch))
        tokens = attempt(lambda: self.runner.launch(batch))
        if isinstance(tokens, Shortage):
            return self._recover(tokens, [batch])
        self._in_flight.append(_Launched(batch, tokens, now))
        return []

    def _collect(self) -> list[RequestOutput]:
        launched = self._in_flight[0]
        tokens = attempt(launched.tokens.collect)
        if isinstance(tokens, Shortage):  # later passes build on this one
            if self.decision_log is not None:
                self.decision_log.fail_collect(tokens.detail)
            failed = [later.batch for later in self._in_flight]
            self._in_flight.clear()
            return self._recover(tokens, failed)
        self._in_flight.popleft()
        if self.decision_log is not None:
            self.decision_log.tokens(tokens)
        now = self._clock()
        began = max(launched.time, self._collected_time)
        self._collected_time = now
        self.records.collected(launched.batch, began, now)
        ended = self._end_failed(launched.tokens.failures)
        outputs = self._update(launched.batch, tokens)
        if launched.batch.with_logprobs or launched.batch.prompt_spans:
            self._add_logprobs(outputs, launched)
        self.scheduler.complete(launched.batch)
        self.counters.step_done(launched.batch, now - began)
        return ended + outputs

    def _end_failed(self, failures: Mapping[Request, str]) -> list[RequestOutput]:
        """Requests whose token is void end here; `_update` then drops it as it drops that of any request that ended."""
        return [
            RequestOutput(request.request_id, [], self._finish(request, "error", message=message))
            for request, message in failures.items()
            if not request.finished
        ]

    def _recover(self, shortage: Shortage, failed: list[Batch]) -> list[RequestOutput]:
        """There was no memory for the passes `failed`: undo them, and go on with smaller ones.

        Passes launched before them are collected. Then the host has every token that is certain, and tokens are the
        state: the requests of the failed passes are preempted, which computes whatever is uncertain again.
        """
        self.counters.num_oom_recoveries += 1
        for batch in reversed(failed):
            self.scheduler.withdraw(batch)
        outputs = []
        while self._in_flight:
            outputs += self._collect()
        for batch in failed:
            self.scheduler.preempt(batch.requests)
        are_smaller = [self.scheduler.shrink(batch) for batch in failed]
        if not any(are_smaller):
            outputs += self._give_way(failed[0], shortage)
        release_cached_memory()
        limits, lost = self.scheduler.limits, failed[0]
        logger.warning(
            "out of memory in a %s pass (%d requests, %d tokens): %s. Passes now hold at most %d prompt tokens or %d "
            "decoding requests",
            lost.kind, len(lost.requests), lost.num_tokens, shortage.detail, limits.num_tokens, limits.num_requests,
        )  # fmt: skip
        return outputs

    def _give_way(self, batch: Batch, shortage: Shortage) -> list[RequestOutput]:
        """Not even the smallest pass of one request fits: try again, then without anybody else, then let it fail."""
        request = batch.requests[0]
        if request.finished:  # by a pass that was collected meanwhile
            return []
        request.num_shortages += 1
        request.shortages_in_a_row += 1
        if request.num_shortages < _MOST_SHORTAGES and request.shortages_in_a_row <= 2:
            if request.shortages_in_a_row == 2:
                self.scheduler.preempt(self._requests.values())
                self.runner.release_memory()
            return []
        message = (
            f"out_of_memory: a {batch.kind} pass of {batch.num_tokens} tokens of this request alone does not fit after "
            f"{batch.starts[0]} computed ones: {shortage.detail}"
        )
        return [RequestOutput(request.request_id, [], self._finish(request, "error", message=message))]

    def _update(self, batch: Batch, tokens: list[int]) -> list[RequestOutput]:
        outputs = []
        now = self._clock()
        num_prompt_tokens = 0
        for request, token in zip(batch.sampled, tokens, strict=True):
            request.num_pending -= 1
            if request.finished:  # aborted or stopped while this pass was in flight: the token is dropped
                continue
            request.token_ids.append(token)
            if not request.first_token_time:
                request.first_token_time = now
                num_prompt_tokens += request.num_prompt_tokens
            finished = None
            if token in request.stop_token_ids:
                finished = self._finish(request, "stop", stop_token_id=token)
            elif len(request.token_ids) >= request.max_total_tokens:
                finished = self._finish(request, "length")
            outputs.append(RequestOutput(request.request_id, [token], finished))
        self.counters.tokens_done(num_prompt_tokens, len(outputs))
        return outputs

    def _add_logprobs(self, outputs: list[RequestOutput], launched: _Launched) -> None:
        """Complete `outputs` with what was asked about the tokens; a prompt that is not at its end has its own."""
        by_id = {output.request_id: output for output in outputs}
        for request, logprobs in launched.tokens.read_logprobs(launched.batch).items():
            if request.request_id in by_id:
                by_id[request.request_id].logprobs = logprobs
        for request, logprobs in launched.tokens.read_prompt_logprobs(launched.batch).items():
            output = by_id.get(request.request_id)
            if output is None and self._requests.get(request.request_id) is request:
                output = RequestOutput(request.request_id, [])
                outputs.append(output)
            if output is not None:
                output.prompt_logprobs = request.take_prompt_logprobs(logprobs)

    def _finish(
        self, request: Request, reason: FinishReason, stop_token_id: int | None = None, message: str | None = None
    ) -> Finished:
        del self._requests[request.request_id]
        self.scheduler.remove(request)
        now = self._clock()
        scheduled = request.first_scheduled_time or now
        first_token = request.first_token_time or now
        request.finish = Finished(
            reason=reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=request.num_cached_tokens,
            queue_time=scheduled - request.arrival_time,
            prefill_time=first_token - scheduled,
            decode_time=now - first_token,
            message=message,
        )
        self.counters.request_finished(request.finish)
        self.records.finished(request, now)
        return request.finish


def _composition(batch: Batch) -> str:
    """`id[start:end]` of every request in the pass."""
    parts = zip(batch.requests, batch.starts, batch.counts, strict=True)
    return " ".join(f"{request.request_id}[{start}:{start + count}]" for request, start, count in parts)
