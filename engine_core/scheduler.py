"""Which requests the next forward pass serves. Two queues, integers only: no tensor, no clock, no socket.

    add ─▶ prefill queue ──last chunk──▶ decode queue ──stop, length, abort──▶ gone
           (by arrival)  ◀──preempted──  (by arrival)

One schedule is one forward pass of one kind. When both queues have work the kinds alternate, so a decode step never
waits for more than one prefill chunk (at most `max_num_batched_tokens`), and prompts never wait for decodes to end.
Memory policy: a prompt is admitted when blocks for its next chunk are unused; when a decode needs a block and none is
left, the youngest running request is preempted: its blocks are freed and it is computed again later from its tokens.
So is every request of a pass that the device had no memory for; the passes after it are smaller (`PassLimits`).
"""

from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from engine_core.kv_cache_manager import KVCacheManager
from engine_core.pass_limits import PassLimits
from engine_core.request import Request, RequestStatus
from minivllm.engine_view import WaitReason

MAX_PROMPT_LOGITS = 1024  # prompt tokens in one pass that need logits: float32 × vocabulary each


class PromptSpan(NamedTuple):
    """Prompt tokens [start, start + num_tokens) of a request: a pass computes the logits that judge them."""

    request: Request
    start: int
    num_tokens: int


@dataclass(slots=True)
class Batch:
    """One forward pass: request i computes `counts[i]` tokens from position `starts[i]` on."""

    kind: Literal["prefill", "decode"]
    requests: list[Request] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    sampled: list[Request] = field(default_factory=list)  # those that get a token: all but unfinished prefills
    sampled_positions: list[int] = field(default_factory=list)  # position of each of these tokens
    with_logprobs: list[int] = field(default_factory=list)  # which of `sampled` ask for log-probabilities
    prompt_spans: list[PromptSpan] = field(default_factory=list)  # prompt tokens whose log-probabilities are asked for
    started: list[Request] = field(default_factory=list)  # those that were given a row for this pass
    grown: list[Request] = field(default_factory=list)  # those whose block table grew for this pass

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    def append(self, request: Request, num_tokens: int) -> None:
        """Let `request` compute its next `num_tokens` tokens in this pass; it samples if no other is left."""
        self.requests.append(request)
        self.starts.append(request.num_computed_tokens)
        if self.kind == "prefill" and request.needs_prompt_logits:
            self._add_prompt_span(request, num_tokens)
        self.counts.append(num_tokens)
        request.num_computed_tokens += num_tokens
        if request.num_computed_tokens == request.num_tokens:
            if request.params.logprobs is not None:
                self.with_logprobs.append(len(self.sampled))
            self.sampled.append(request)
            self.sampled_positions.append(request.num_computed_tokens)

    def _add_prompt_span(self, request: Request, num_tokens: int) -> None:
        """The logits of a token judge the one after it; those of the last prompt token judge no prompt token."""
        start = request.num_computed_tokens
        count = min(num_tokens, request.num_prompt_tokens - 1 - start)
        if count > 0:
            self.prompt_spans.append(PromptSpan(request, start + 1, count))


class Scheduler:
    """First come, first served continuous batching with chunked prefill and preemption by recompute."""

    def __init__(self, kv: KVCacheManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._kv = kv
        self.limits = PassLimits(max_num_batched_tokens, max_num_seqs, kv.block_size)
        self.prefill_queue: list[Request] = []
        self.decode_queue: list[Request] = []
        self._free_rows = list(range(max_num_seqs))[::-1]
        self._last_kind = "decode"
        self._last_decoded = 0  # arrival_index of the request whose turn was the last
        self.num_preemptions = 0
        self.waiting_for: WaitReason | None = None  # what kept the first waiting request out of the last pass
        self._preempted: list[Request] = []

    @property
    def num_running(self) -> int:
        """Requests that hold a row: partly prefilled or decoding."""
        return len(self.decode_queue) + sum(request.row >= 0 for request in self.prefill_queue)

    @property
    def num_waiting(self) -> int:
        return sum(request.row < 0 for request in self.prefill_queue)

    @property
    def has_work(self) -> bool:
        return bool(self.prefill_queue or self.decode_queue)

    def add(self, request: Request) -> None:
        """Queue `request` by its arrival."""
        insort(self.prefill_queue, request, key=_by_arrival)

    def remove(self, request: Request) -> None:
        """Take a finished request out of its queue and free what it holds (at once, or after the passes in flight)."""
        queue = self.decode_queue if request.status is RequestStatus.DECODE else self.prefill_queue
        queue.remove(request)
        request.status = RequestStatus.FINISHED
        if request.num_in_flight == 0:
            self._release(request)

    def can_run_ahead(self) -> bool:
        """Whether `schedule()` may be called before the last pass was collected.

        Only if nobody can be preempted, and nobody's next token depends on what the host makes of the last one.
        """
        if any(request.params.json_schema is not None for request in self.decode_queue):
            return False
        return self._kv.pool.num_unused >= len(self.decode_queue)

    def schedule(self) -> Batch | None:
        """The next pass, or None when nothing can run. Advances `num_computed_tokens` of every request in it."""
        batch = None
        self.waiting_for = "turn"
        if self._last_kind == "decode":
            batch = self._schedule_prefill()
        batch = batch or self._schedule_decode() or self._schedule_prefill()
        if batch is not None:
            self._last_kind = batch.kind
            for request in batch.requests:
                request.num_in_flight += 1
            for request in batch.sampled:
                request.num_pending += 1
        return batch

    def take_preempted(self) -> list[Request]:
        """The requests preempted since the last call."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def complete(self, batch: Batch) -> None:
        """`batch` is done on the device: make its blocks findable, release what finished while it was in flight."""
        self.limits.pass_done()
        for request in batch.requests:
            request.shortages_in_a_row = 0
            self._kv.commit(request)
            self._leave_flight(request)

    def withdraw(self, batch: Batch) -> None:
        """`batch` failed, nothing that it wrote can be relied on: take back what `schedule` promised.

        Batches launched after it are withdrawn before it. Then `preempt` its requests, when no pass is in flight.
        """
        for request in batch.sampled:
            request.num_pending -= 1
        for request, start in zip(batch.requests, batch.starts, strict=True):
            self._kv.rewind(request, start)
            self._leave_flight(request)

    def shrink(self, batch: Batch) -> bool:
        """`batch` did not fit: make later passes of its kind smaller than it. False: it was as small as can be."""
        if batch.kind == "decode":
            return self.limits.shrink_decode(len(batch.requests))
        return self.limits.shrink_prefill(batch.num_tokens, len(batch.requests))

    def preempt(self, requests: Iterable[Request]) -> None:
        """Free what those of `requests` hold that are running; they are computed again from their tokens."""
        for request in requests:
            if request.row >= 0 and not request.finished:
                self._preempt(request)

    def _schedule_prefill(self) -> Batch | None:
        batch = Batch("prefill")
        budget, logits_budget = self.limits.num_tokens, MAX_PROMPT_LOGITS
        for request in self.prefill_queue:
            most = budget if batch.requests else max(budget, self.limits.smallest_prefill)
            most = min(most, logits_budget) if request.needs_prompt_logits else most
            if most <= 0 or (request.row < 0 and not self._free_rows):
                self.waiting_for = "rows" if most > 0 else "budget"
                break
            # Leave a block for each decoding request, so that a new prompt does not force a preemption right away.
            num_tokens = self._kv.allocate_prefill(request, most, reserve=len(self.decode_queue))
            if num_tokens == 0:
                self.waiting_for = "blocks"
                break
            logits_budget -= num_tokens if request.needs_prompt_logits else 0
            self._start(request, batch)
            batch.grown.append(request)
            batch.append(request, num_tokens)
            budget -= num_tokens
        for request in batch.sampled:
            self.prefill_queue.remove(request)
            request.status = RequestStatus.DECODE
            insort(self.decode_queue, request, key=_by_arrival)
        return batch if batch.requests else None

    def _schedule_decode(self) -> Batch | None:
        batch = Batch("decode")
        for request in self._decode_turn():
            if request.status is not RequestStatus.DECODE:
                continue  # preempted in this very loop
            grown = self._append_slot(request)
            if grown is None:
                continue
            if grown:
                batch.grown.append(request)
            batch.append(request, 1)
        return batch if batch.requests else None

    def _decode_turn(self) -> list[Request]:
        """The decoding requests in order of arrival: all, or when that were too many, those whose turn is next."""
        queue = [request for request in self.decode_queue if request.num_tokens < request.max_total_tokens]
        if len(queue) <= self.limits.num_requests:  # the others' last token is in flight
            return queue
        first = bisect_right(queue, self._last_decoded, key=_by_arrival)
        turn = [*queue[first:], *queue[:first]][: self.limits.num_requests]
        self._last_decoded = turn[-1].arrival_index
        return sorted(turn, key=_by_arrival)

    def _append_slot(self, request: Request) -> bool | None:
        """Room for one token, at the cost of younger requests. None: `request` was itself the youngest."""
        while (grown := self._kv.append_slot(request)) is None:
            victim = self._youngest_running()
            self._preempt(victim)
            if victim is request:
                return None
        return grown

    def _youngest_running(self) -> Request:
        running = [request for request in self.prefill_queue if request.row >= 0]
        return max([*running, *self.decode_queue[-1:]], key=_by_arrival)

    def _preempt(self, request: Request) -> None:
        if request.status is RequestStatus.DECODE:
            self.decode_queue.remove(request)
            insort(self.prefill_queue, request, key=_by_arrival)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted.append(request)
        self._release(request)

    def _start(self, request: Request, batch: Batch) -> None:
        if request.row < 0:
            request.row = self._free_rows.pop()
            request.status = RequestStatus.PREFILL
            batch.started.append(request)

    def _leave_flight(self, request: Request) -> None:
        request.num_in_flight -= 1
        if request.finished and request.num_in_flight == 0:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._kv.free(request)
        if request.row >= 0:
            self._free_rows.append(request.row)
            request.row = -1


def _by_arrival(request: Request) -> int:
    return request.arrival_index
