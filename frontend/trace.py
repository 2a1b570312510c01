"""Views of the engine → a trace in Chrome's JSON format, which Perfetto's UI and chrome://tracing open.

engine core   | prefill |decode|decode|decode| prefill |decode …          one slice per pass; counters
requests  a   | queued | prefill 0:512 | prefill 512:700 | decode ───────────────────▶ |
          b            | queued ········ | prefill | decode ─ | preempted | prefill | decode ▶ |
frontend  a   | request: arrival ──────────────────────────────────────────────▶ end |
"""

import os
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from frontend.engine_watch import HttpSpan
from minivllm.engine_view import EngineView, RequestRow, StepRecord
from minivllm.protocol import EngineFacts, View

Event = dict[str, Any]
_PASSES = 1  # the engine core's track
_REQUESTS_OFFSET = 1 << 22  # above every process id: the requests are shown as a process of their own
_RATE_SECONDS = 1.0
_encoder = msgspec.json.Encoder()


def as_json(events: Sequence[Event]) -> bytes:
    """The whole file."""
    return b'{"displayTimeUnit":"ms","traceEvents":[\n' + b",\n".join(map(_encoder.encode, events)) + b"\n]}\n"


class _Track:
    """One request: the slice that is open. Its name tells what the request is doing since `since`."""

    def __init__(self, row: RequestRow) -> None:
        self.row = row
        self.state, self.since = "queued", row.arrival_time


class TraceBuilder:
    """Feed it with views in order; each call returns the events that are complete.

    Every pass becomes a slice, and so does every stage of every request. What was going on before the first view
    begins with it.
    """

    def __init__(self, facts: EngineFacts) -> None:
        self._facts = facts
        self._engine, self._requests, self._frontend = facts.pid, facts.pid + _REQUESTS_OFFSET, os.getpid()
        self._tracks: dict[int, _Track] = {}
        self._handles: dict[str, int] = {}
        self._last_decode: list[int] = []
        self._recent: deque[tuple[float, int]] = deque()  # (time, tokens) of the last second
        self._start: float | None = None
        self._last_time = 0.0

    def start(self) -> list[Event]:
        """What names the tracks."""
        facts = self._facts
        return [
            _name("process_name", self._engine, 0, f"engine core: {facts.model} on {facts.device}"),
            _name("thread_name", self._engine, _PASSES, "passes"),
            _name("process_name", self._requests, 0, "requests in the engine core"),
            _name("process_name", self._frontend, 0, "frontend"),
        ]

    def add(self, message: View, spans: deque[HttpSpan]) -> list[Event]:
        """The events of one view, and of the requests that this frontend ended; takes `spans`."""
        view = message.view
        events: list[Event] = []
        if self._start is None:
            self._start = view.steps[0].began if view.steps else view.time
        self._last_time = view.time
        for row in view.requests:
            events += self._meet(row)
        for step in view.steps:
            events += self._step(step)
        for row in view.requests:
            if row.finish_time and row.handle in self._tracks:
                events += self._end(row)
        events += self._gauges(view)
        while spans:
            events += self._http_slice(spans.popleft())
        return events

    def finish(self) -> list[Event]:
        """Slices of what still goes on, cut off at the last view."""
        return [event for handle in list(self._tracks) for event in self._close(handle, self._last_time, "running")]

    def _meet(self, row: RequestRow) -> list[Event]:
        if self._handles.get(row.request_id) == row.handle:
            if row.handle in self._tracks:
                self._tracks[row.handle].row = row
            return []
        self._handles[row.request_id] = row.handle
        track = self._tracks[row.handle] = _Track(row)
        if self._start is not None and row.arrival_time < self._start:  # it was there before: begin with its state
            track.since = self._start
            track.state = {"decode": "decode", "prefill": "prefill"}.get(row.status, "queued")
        return [_name("thread_name", self._requests, row.handle, row.request_id)]

    def _step(self, step: StepRecord) -> list[Event]:
        requests = self._last_decode if step.requests is None else step.requests
        if step.kind == "decode":
            self._last_decode = requests
        args: Event = {"step": step.number, "requests": len(requests), "tokens": step.num_tokens}
        if step.waiting_for:
            args["waiting for"] = step.waiting_for
        events = [_slice(self._engine, _PASSES, step.kind, step.began, step.collected, args)]
        for handle in step.preempted:
            events += self._turn(handle, "preempted", step.began)
        if step.kind == "prefill":
            events += self._chunks(step, requests)
        num_sampled = len(requests) if step.kind == "decode" else len(step.sampled)
        events += [
            self._counter("batch", step.began, {"requests": len(requests)}),
            self._counter("KV blocks", step.began, {"used": step.blocks_used}),
            self._counter("tokens/s", step.collected, {"generated": self._rate(step.collected, num_sampled)}),
        ]
        return events

    def _chunks(self, step: StepRecord, requests: list[int]) -> list[Event]:
        events, sampled = [], set(step.sampled)
        for handle, start, count in zip(requests, step.starts, step.counts, strict=True):
            events += self._turn(handle, f"prefill {start}:{start + count}", step.began)
            events += self._turn(handle, "decode" if handle in sampled else "between chunks", step.collected)
        return events

    def _turn(self, handle: int, state: str, now: float) -> list[Event]:
        """`handle` is in another state from `now` on."""
        track = self._tracks.get(handle)
        if track is None:
            return []
        events = self._slice_of(track, now, {})
        track.state, track.since = state, now
        return events

    def _end(self, row: RequestRow) -> list[Event]:
        return self._close(row.handle, row.finish_time, row.finish_reason or "")

    def _close(self, handle: int, now: float, outcome: str) -> list[Event]:
        return self._slice_of(self._tracks.pop(handle), now, {"outcome": outcome})

    def _slice_of(self, track: _Track, now: float, more: Event) -> list[Event]:
        row = track.row
        # A preempted request waits, whatever it is called; an end is seen a pass late, so it may lie before `since`.
        if now < track.since or (now == track.since and not more):
            return []
        args = {"prompt tokens": row.num_prompt_tokens, "cached tokens": row.num_cached_tokens, **more}
        return [_slice(self._requests, row.handle, track.state, track.since, now, args)]

    def _rate(self, now: float, num_tokens: int) -> float:
        """Generated tokens per second, over the last second."""
        self._recent.append((now, num_tokens))
        while self._recent[0][0] < now - _RATE_SECONDS:
            self._recent.popleft()
        return round(sum(tokens for _, tokens in self._recent) / _RATE_SECONDS, 1)

    def _gauges(self, view: EngineView) -> list[Event]:
        queues = self._counter("requests", view.time, {"running": view.num_running, "waiting": view.num_waiting})
        if view.blocks is None:
            return [queues]
        return [queues, self._counter("prefix cache", view.time, {"cached blocks": view.blocks.cached})]

    def _counter(self, name: str, time: float, values: Event) -> Event:
        return {"ph": "C", "pid": self._engine, "name": name, "ts": _us(time), "args": values}

    def _http_slice(self, span: HttpSpan) -> list[Event]:
        args: Event = {"finish_reason": span.finish_reason}
        if span.first_token:
            args["TTFT ms"] = round(1000 * (span.first_token - span.arrival), 3)
        track = self._handles.get(span.request_id, 0)  # 0: the engine core never saw it, or nobody watched
        return [
            _name("thread_name", self._frontend, track, span.request_id),
            _slice(self._frontend, track, "request", span.arrival, span.end, args),
        ]


def _slice(pid: int, tid: int, name: str, start: float, end: float, args: Event) -> Event:
    duration = _us(end) - _us(start)  # of whole numbers: slices that follow each other must not overlap
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": _us(start), "dur": duration, "args": args}


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}


def _us(seconds: float) -> int:
    return round(1e6 * seconds)
