"""What the engine did, step by step: told by `EngineCore`, kept in a bounded ring while somebody watches.

While nobody does, a pass costs what the timelines of its requests need.
"""

from collections import deque

from engine_core.block_pool import BlockPool
from engine_core.request import Request
from engine_core.request_timelines import RequestTimelines
from engine_core.scheduler import Batch, Scheduler
from minivllm.engine_view import RequestRow, StepRecord

MAX_STEPS = 4096  # kept; a reader that is further behind sees a gap in the numbers
MAX_ENDED = 4096


class StepRecorder:
    """The ring of steps and the requests' timelines. `recording`: whether steps are kept."""

    def __init__(self, scheduler: Scheduler, pool: BlockPool, max_steps: int = MAX_STEPS) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self.timelines = RequestTimelines()
        self.steps: deque[StepRecord] = deque(maxlen=max_steps)
        self.ended: deque[RequestRow] = deque(maxlen=MAX_ENDED)
        self.num_changes = 0  # arrivals, passes and ends so far
        self._num_steps = 0
        self._recording = False
        self._in_flight: deque[tuple[Batch, StepRecord]] = deque()
        self._last_decode: list[Request] = []
        self._last_handles: list[int] = []

    @property
    def recording(self) -> bool:
        return self._recording

    @recording.setter
    def recording(self, wanted: bool) -> None:
        if wanted != self._recording:
            self._recording = wanted
            self.steps.clear()
            self.ended.clear()
            self._in_flight.clear()

    def queued(self, request: Request) -> None:
        """`request` entered the prefill queue."""
        self.timelines.queued(request)
        self.num_changes += 1

    def scheduled(self, batch: Batch, now: float) -> None:
        """`batch` is about to be launched."""
        timelines = self.timelines
        preempted = self._scheduler.take_preempted()
        for request in preempted:
            timelines.preempted(request, now)
        timelines.clock.set(self._scheduler.waiting_for, now)
        for request in batch.started:
            timelines.started(request, now)
        if batch.kind == "prefill":
            for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
                timelines.chunk_launched(request, start, count, now)
        if self._recording:
            self._in_flight.append((batch, self._record(batch, preempted, now)))

    def collected(self, batch: Batch, began: float, now: float) -> None:
        """The oldest pass in flight was `batch`; it had the device from `began` on. Who ends with it is told next."""
        if batch.kind == "prefill":
            sampled = set(batch.sampled)
            for request in batch.requests:
                self.timelines.chunk_done(request, request in sampled, now)
        self.num_changes += 1
        self._num_steps += 1
        if not any(launched is batch for launched, _ in self._in_flight):
            return  # launched while nobody watched
        while (pending := self._in_flight.popleft())[0] is not batch:
            pass  # those before it failed
        record = pending[1]
        record.number, record.began, record.collected = self._num_steps, began, now
        self.steps.append(record)

    def finished(self, request: Request, now: float) -> None:
        """`request` ended."""
        self.num_changes += 1
        if self._recording and request.finish is not None:
            self.ended.append(self.row(request, now))
            if self.steps:
                self.steps[-1].finished[request.arrival_index] = request.finish.reason
        self.timelines.finished(request, now)

    def take(self) -> tuple[list[StepRecord], list[RequestRow]]:
        """The steps and the ends of requests since the last call."""
        taken = list(self.steps), list(self.ended)
        self.steps.clear()
        self.ended.clear()
        return taken

    def row(self, request: Request, finish_time: float = 0.0) -> RequestRow:
        """Where a live request is, or one that ends at `finish_time`."""
        return RequestRow(
            request.arrival_index,
            request.request_id,
            request.status.value,
            request.num_prompt_tokens,
            request.num_tokens,
            request.num_computed_tokens,
            request.max_total_tokens,
            request.num_cached_tokens,
            len(request.block_table),
            request.num_preemptions,
            request.arrival_time,
            request.first_scheduled_time,
            self.timelines.last_chunk_time(request),
            request.first_token_time,
            finish_time,
            request.finish.reason if request.finish else None,
        )

    def _record(self, batch: Batch, preempted: list[Request], now: float) -> StepRecord:
        scheduler = self._scheduler
        is_prefill = batch.kind == "prefill"
        return StepRecord(
            number=0,
            kind=batch.kind,
            began=now,
            num_tokens=batch.num_tokens,
            prefill_queue=len(scheduler.prefill_queue),
            decode_queue=len(scheduler.decode_queue),
            blocks_used=self._pool.num_used,
            waiting_for=scheduler.waiting_for if scheduler.prefill_queue else None,
            requests=self._batch_handles(batch),
            starts=batch.starts if is_prefill else [],
            counts=batch.counts if is_prefill else [],
            sampled=_handles(batch.sampled) if is_prefill else [],
            started=_handles(batch.started),
            preempted=_handles(preempted),
        )

    def _batch_handles(self, batch: Batch) -> list[int]:
        """Decode passes in a row mostly serve the same requests: then it is the very same list."""
        if batch.kind == "prefill":
            return _handles(batch.requests)
        if batch.requests != self._last_decode:
            self._last_decode, self._last_handles = batch.requests, _handles(batch.requests)
        return self._last_handles


def _handles(requests: list[Request]) -> list[int]:
    return [request.arrival_index for request in requests]
