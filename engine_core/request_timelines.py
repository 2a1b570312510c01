"""What happened to each request and why, kept for the live ones and the last that ended.

Costs nothing per decode pass: chunks, preemptions and ends are noted as they happen, and why requests wait is counted
once for all of them (first come, first served: what holds up the first holds up everybody behind it).
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from engine_core.request import Request
from minivllm.engine_view import WAIT_REASONS, Preemption, PrefillChunk, RequestTimeline, WaitReason

MAX_FINISHED = 512
MAX_CHUNKS = 256  # of one request; more are counted, not listed


class WaitClock:
    """Seconds that the prefill queue has been held up, by reason. Times on the engine core's clock."""

    def __init__(self) -> None:
        self.reason: WaitReason | None = None
        self._since = 0.0
        self._seconds = dict.fromkeys(WAIT_REASONS, 0.0)

    def set(self, reason: WaitReason | None, now: float) -> None:
        """From `now` on the queue is held up by `reason`."""
        if self.reason is not None:
            self._seconds[self.reason] += now - self._since
        self.reason, self._since = reason, now

    def read(self, now: float) -> dict[WaitReason, float]:
        """Seconds by reason until `now`; the difference of two readings is what one request waited between them."""
        self.set(self.reason, now)
        return dict(self._seconds)


@dataclass(slots=True)
class _Notes:
    """Of one live request. Chunks and preemptions in seconds since its arrival."""

    request: Request
    num_given_tokens: int  # prompt, and output that it brought along
    wait_start: dict[WaitReason, float] | None
    waited: dict[WaitReason, float] = field(default_factory=dict)
    chunks: list[PrefillChunk] = field(default_factory=list)
    num_chunks: int = 0
    num_prefill_samples: int = 0
    preemptions: list[Preemption] = field(default_factory=list)
    last_chunk_time: float = 0.0
    finish_time: float = 0.0


class RequestTimelines:
    """Told by `StepRecorder` what happens; asked by id."""

    def __init__(self) -> None:
        self.clock = WaitClock()
        self._live: dict[Request, _Notes] = {}
        self._finished: OrderedDict[str, RequestTimeline] = OrderedDict()

    def queued(self, request: Request) -> None:
        """`request` has just arrived."""
        start = self.clock.read(request.arrival_time)
        self._live[request] = _Notes(request, len(request.token_ids), start)

    def started(self, request: Request, now: float) -> None:
        """It was given a row: it waits no longer."""
        notes = self._live[request]
        self._stop_waiting(notes, now)
        if notes.preemptions:
            notes.preemptions[-1].resumed_at = now - request.arrival_time

    def chunk_launched(self, request: Request, start: int, count: int, now: float) -> None:
        """A pass computes `count` of its tokens from `start` on."""
        notes = self._live[request]
        notes.num_chunks += 1
        if not request.first_token_time:
            notes.last_chunk_time = now
        if len(notes.chunks) < MAX_CHUNKS:
            notes.chunks.append(PrefillChunk(now - request.arrival_time, start, count))

    def chunk_done(self, request: Request, sampled: bool, now: float) -> None:
        """Its oldest unfinished chunk was computed; `sampled`: that gave it a token."""
        notes = self._live.get(request)
        if notes is None:  # it ended meanwhile
            return
        notes.num_prefill_samples += sampled
        chunk = next((chunk for chunk in notes.chunks if chunk.end is None), None)
        if chunk is not None:
            chunk.end = now - request.arrival_time

    def preempted(self, request: Request, now: float) -> None:
        """Its blocks were taken away, and it waits again."""
        notes = self._live.get(request)
        if notes is None:
            return
        notes.chunks = [chunk for chunk in notes.chunks if chunk.end is not None]
        notes.preemptions.append(Preemption(now - request.arrival_time, request.num_tokens))
        notes.wait_start = self.clock.read(now)

    def finished(self, request: Request, now: float) -> None:
        """It ended, for the reason in `request.finish`."""
        notes = self._live[request]
        self._stop_waiting(notes, now)
        notes.finish_time = now
        self._finished.pop(request.request_id, None)
        self._finished[request.request_id] = self._timeline(notes, now)
        if len(self._finished) > MAX_FINISHED:
            self._finished.popitem(last=False)
        del self._live[request]

    def last_chunk_time(self, request: Request) -> float:
        """When the pass was launched that was to bring the first token of a live request; 0: not yet."""
        return self._live[request].last_chunk_time

    def of(self, request_id: str, prefill_queue: list[Request], now: float) -> RequestTimeline | None:
        """The timeline of a live request, or of the last one of that id that ended, as of `now`."""
        notes = next((notes for notes in self._live.values() if notes.request.request_id == request_id), None)
        if notes is None:
            return self._finished.get(request_id)
        timeline = self._timeline(notes, now)
        timeline.block_runs = _runs(notes.request.block_table)
        if notes.wait_start is not None:
            timeline.waiting_for = self.clock.reason
            timeline.num_ahead = prefill_queue.index(notes.request)
        return timeline

    def _stop_waiting(self, notes: _Notes, now: float) -> None:
        notes.waited = self._waited(notes, now)
        notes.wait_start = None

    def _waited(self, notes: _Notes, now: float) -> dict[WaitReason, float]:
        """All the time that it has waited so far, by reason; reasons that never held it up are left out."""
        if notes.wait_start is None:
            return notes.waited
        until, start, before = self.clock.read(now), notes.wait_start, notes.waited
        total = {reason: before.get(reason, 0.0) + until[reason] - start[reason] for reason in WAIT_REASONS}
        return {reason: seconds for reason, seconds in total.items() if seconds > 0.0}

    def _timeline(self, notes: _Notes, now: float) -> RequestTimeline:
        request = notes.request
        num_sampled = len(request.token_ids) - notes.num_given_tokens
        return RequestTimeline(
            request_id=request.request_id,
            status=request.status.value,
            age=now - request.arrival_time,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=len(request.token_ids) - request.num_prompt_tokens,
            max_total_tokens=request.max_total_tokens,
            num_cached_tokens=request.num_cached_tokens,
            scheduled_at=_since_arrival(request, request.first_scheduled_time),
            first_token_at=_since_arrival(request, request.first_token_time),
            finished_at=_since_arrival(request, notes.finish_time),
            finish_reason=request.finish.reason if request.finish else None,
            message=request.finish.message if request.finish else None,
            waited=self._waited(notes, now),
            prefill_chunks=list(notes.chunks),
            num_prefill_chunks=notes.num_chunks,
            num_decode_steps=num_sampled - notes.num_prefill_samples,
            preemptions=list(notes.preemptions),
        )


def _since_arrival(request: Request, time: float) -> float | None:
    return time - request.arrival_time if time else None


def _runs(block_table: list[int]) -> list[list[int]]:
    """[first, count] of each run of consecutive blocks."""
    runs: list[list[int]] = []
    for block in block_table:
        if runs and block == runs[-1][0] + runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    return runs
