"""Watching the engine core: asks for views while somebody here wants them, and hands them out.

A view that a slow reader has not fetched is dropped when newer ones come; the step numbers show the gap.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from frontend.engine_link import EngineLink
from minivllm.engine_view import RequestTimeline
from minivllm.errors import NotReadyError, OverloadedError
from minivllm.protocol import WATCH_SECONDS, Explain, Explained, View, Watch

MAX_WATCHERS = 32
_MAX_UNREAD = 32  # views, about 3 s
_RENEW_SECONDS = WATCH_SECONDS / 5
_EXPLAIN_SECONDS = 5.0  # an engine core in a long pass answers after it
_MAX_SPANS = 4096


class HttpSpan(NamedTuple):
    """A request as this process served it. Times in seconds on `time.monotonic`; first_token is 0 if none came."""

    request_id: str
    arrival: float
    first_token: float
    end: float
    finish_reason: str


class Watcher:
    """One reader's mailbox."""

    def __init__(self) -> None:
        self._unread: deque[View] = deque(maxlen=_MAX_UNREAD)
        self._news = asyncio.Event()
        self.spans: deque[HttpSpan] = deque(maxlen=_MAX_SPANS)  # requests that ended meanwhile; taken by the reader
        self.closed = False

    def put(self, message: View) -> None:
        self._unread.append(message)
        self._news.set()

    def close(self) -> None:
        """No more views: `get` returns None at once from now on."""
        self.closed = True
        self._news.set()

    async def get(self, seconds: float) -> View | None:
        """The next view; None when none comes within `seconds`, or after `close`."""
        if not self._unread:
            try:
                await asyncio.wait_for(self._news.wait(), seconds)
            except TimeoutError:
                return None
        if not self.closed:
            self._news.clear()
        return self._unread.popleft() if self._unread else None


class EngineWatch:
    """All watchers of this process, and questions about single requests. For use on the link's event loop."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._watchers: set[Watcher] = set()
        self._renewal: asyncio.Task[None] | None = None
        self._questions: dict[str, asyncio.Future[RequestTimeline | None]] = {}
        link.on_view = self._on_message

    @contextmanager
    def watch(self) -> Iterator[Watcher]:
        """Views arrive inside the block. Raises `OverloadedError` when too many watch already."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise OverloadedError(f"{len(self._watchers)} clients watch the engine, at most {MAX_WATCHERS} are allowed")
        watcher = Watcher()
        self._watchers.add(watcher)
        is_asked = self._ask(at_once=True)
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew(is_asked))
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers and self._renewal is not None:
                self._renewal.cancel()
                self._renewal = None

    async def explain(self, request_id: str) -> RequestTimeline | None:
        """What happened to a request of any frontend; None if it is unknown. Raises `NotReadyError`."""
        answer = self._questions.get(request_id)
        if answer is None:
            answer = self._questions[request_id] = asyncio.get_running_loop().create_future()
            self._link.say(lambda frontend_id: Explain(frontend_id, request_id))
        try:
            return await asyncio.wait_for(asyncio.shield(answer), _EXPLAIN_SECONDS)
        except TimeoutError:
            raise NotReadyError("the engine core does not answer") from None
        finally:
            if self._questions.get(request_id) is answer:
                del self._questions[request_id]

    def note_ended(self, span: HttpSpan) -> None:
        """A request of this process ended."""
        for watcher in self._watchers:
            watcher.spans.append(span)

    async def _renew(self, is_asked: bool) -> None:
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            is_asked = self._ask(at_once=not is_asked)

    def _ask(self, at_once: bool) -> bool:
        return self._link.say(lambda frontend_id: Watch(frontend_id, at_once))

    def _on_message(self, message: View | Explained) -> None:
        if isinstance(message, View):
            for watcher in self._watchers:
                watcher.put(message)
            return
        answer = self._questions.pop(message.request_id, None)
        if answer is not None and not answer.done():
            answer.set_result(message.timeline)
