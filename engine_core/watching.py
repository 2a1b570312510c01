"""Shows the engine at work to the frontends that asked, and answers what happened to a request.

However large the pool and the queue are, views cost the engine less than 1 % of its time: what a view has cost decides
when the next one is due.

view      |█·····················|█·····················|█        every 0.1 s, or 200 × its cost if that is longer
blocks    |███··········································|███      the map of the KV cache likewise
"""

import time
from collections.abc import Callable
from itertools import islice

from msgspec.structs import replace

from engine_core.block_map import draw_block_map
from engine_core.engine import EngineCore
from minivllm.engine_view import BlockMap, EngineView, RequestRow, StepRecord
from minivllm.protocol import WATCH_SECONDS, Explain, Explained, Message, View, Watch

MIN_INTERVAL = 0.1  # seconds between views
MAX_SHARE = 0.004  # of the engine's time, for views and for block maps each; sending them costs a little more
MAX_WAITING_ROWS = 64  # waiting requests that are described; all are counted
Say = Callable[[bytes, Message], None]


class Pace:
    """When something that costs time may be done again. Times in seconds on `time.monotonic`."""

    def __init__(self, min_interval: float, max_share: float) -> None:
        self._min_interval = min_interval
        self._max_share = max_share
        self._next = 0.0

    def is_due(self, now: float) -> bool:
        return now >= self._next

    def done(self, start: float, end: float) -> None:
        """It was done from `start` to `end`."""
        self._next = start + max(self._min_interval, (end - start) / self._max_share)


class Watching:
    """Which frontends watch, and what each has seen. `say(frontend_id, message)` sends a message that may get lost."""

    def __init__(self, epoch: int, say: Say) -> None:
        self._epoch = epoch
        self._say = say
        self._until: dict[bytes, float] = {}
        self._seen_change = 0  # the last change that a view showed, and the last that a map did
        self._mapped_change = 0
        self._views = Pace(MIN_INTERVAL, MAX_SHARE)
        self._maps = Pace(MIN_INTERVAL, MAX_SHARE)

    def handle(self, message: Watch | Explain, engine: EngineCore) -> None:
        """What a frontend asked for."""
        now = time.monotonic()
        if isinstance(message, Watch):
            if message.at_once:
                self._seen_change = self._mapped_change = -1
            self._until[message.frontend_id] = now + WATCH_SECONDS
            engine.records.recording = True
        else:
            timelines, queue = engine.records.timelines, engine.scheduler.prefill_queue
            timeline = timelines.of(message.request_id, queue, now)
            self._say(message.frontend_id, Explained(self._epoch, message.request_id, timeline))

    def publish(self, engine: EngineCore) -> None:
        """Send a view to everybody who watches, if it is time and there is news. Call it between steps, often."""
        if not self._until:
            return
        now = time.monotonic()
        if not self._views.is_due(now):
            return
        self._until = {frontend_id: until for frontend_id, until in self._until.items() if until > now}
        engine.records.recording = bool(self._until)
        if not self._until or not self._has_news(engine, now):
            return
        blocks = self._block_map(engine, now)
        start = time.monotonic()
        message = View(self._epoch, self._view(engine, start, blocks))
        for frontend_id in self._until:
            self._say(frontend_id, message)
        self._views.done(start, time.monotonic())

    def _has_news(self, engine: EngineCore, now: float) -> bool:
        changes = engine.records.num_changes
        return changes != self._seen_change or (changes != self._mapped_change and self._maps.is_due(now))

    def _block_map(self, engine: EngineCore, now: float) -> BlockMap | None:
        if not self._maps.is_due(now):
            return None
        blocks = draw_block_map(engine.kv.pool, engine.held_requests())
        self._maps.done(now, time.monotonic())
        self._mapped_change = engine.records.num_changes
        return blocks

    def _view(self, engine: EngineCore, now: float, blocks: BlockMap | None) -> EngineView:
        records, scheduler, counters = engine.records, engine.scheduler, engine.counters
        steps, ended = records.take()
        self._seen_change = records.num_changes
        return EngineView(
            time=now,
            max_num_seqs=engine.config.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            block_size=engine.config.block_size,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            steps=_without_repetition(steps),
            requests=[*ended, *_live_rows(engine)],
            blocks=blocks,
        )


def _without_repetition(steps: list[StepRecord]) -> list[StepRecord]:
    """The same, where a decode pass serves the same requests as the one before without naming them again."""
    shown, last_decode = [], None
    for step in steps:
        is_same = step.kind == "decode" and step.requests is last_decode
        shown.append(replace(step, requests=None) if is_same else step)
        if step.kind == "decode":
            last_decode = step.requests
    return shown


def _live_rows(engine: EngineCore) -> list[RequestRow]:
    """The requests that hold a row, and the first that wait."""
    queue, row = engine.scheduler.prefill_queue, engine.records.row
    running = [row(request) for request in (*engine.scheduler.decode_queue, *queue) if request.row >= 0]
    waiting = (request for request in queue if request.row < 0)
    return running + [row(request) for request in islice(waiting, MAX_WAITING_ROWS)]
