"""The engine at work, over HTTP: a stream of views, one request's timeline, a trace."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from msgspec.structs import asdict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from frontend import sse
from frontend.disconnect import watch_disconnect
from frontend.engine_client import EngineClient
from frontend.engine_watch import Watcher
from frontend.trace import TraceBuilder, as_json
from minivllm.engine_view import EngineView, RequestTimeline
from minivllm.errors import InvalidRequestError
from minivllm.protocol import MAX_REQUEST_ID, EngineFacts

MAX_TRACE_SECONDS = 60.0
_PING_SECONDS = 1.0
_json = msgspec.json.Encoder()


class EventsEndpoint:
    """GET /v1/engine/events, an ASGI application: an event for each view, and one whenever the engine core changes."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._engine.watch.watch() as watcher:
            async with watch_disconnect(receive) as disconnect:
                disconnect.callback = watcher.close
                await sse.send_events(send, self._events(watcher), {})

    async def _events(self, watcher: Watcher) -> AsyncIterator[bytes]:
        facts: EngineFacts | None = None
        is_first = True
        while not watcher.closed and not (self._engine.draining and self._engine.num_unfinished == 0):
            if is_first or self._engine.link.facts is not facts:
                is_first, facts = False, self._engine.link.facts
                body = {"type": "engine", "model_name": self._model_name, "facts": facts and _described(facts)}
                yield sse.event(_json.encode(body))
            message = await watcher.get(_PING_SECONDS)
            if message is None:
                yield sse.PING
            else:
                body = {"type": "view", "epoch": str(message.epoch), **view_as_json(message.view)}
                yield sse.event(_json.encode(body))


def view_as_json(view: EngineView) -> dict[str, Any]:
    """`view` with every field named, as clients in any language like it."""
    return {
        **asdict(view),
        "steps": [asdict(step) for step in view.steps],
        "requests": [asdict(row) for row in view.requests],
        "blocks": view.blocks and asdict(view.blocks),
    }


class RequestTimelineEndpoint:
    """GET /v1/requests/{request_id}: what happened to it and why."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def answer(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        may_exist = 1 <= len(request_id) <= MAX_REQUEST_ID  # no message could ask for another one
        timeline = await self._engine.watch.explain(request_id) if may_exist else None
        if timeline is None:
            raise HTTPException(404, f"no live or recently finished request has the id {request_id!r}")
        return JSONResponse(timeline_as_json(timeline))


def timeline_as_json(timeline: RequestTimeline) -> dict[str, Any]:
    """`timeline` with every field named."""
    return {
        **asdict(timeline),
        "prefill_chunks": [asdict(chunk) for chunk in timeline.prefill_chunks],
        "preemptions": [asdict(preemption) for preemption in timeline.preemptions],
    }


class TraceEndpoint:
    """GET /debug/trace?seconds=5: watches for so long, then answers with a trace."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def answer(self, request: Request) -> Response:
        seconds = _seconds(request.query_params.get("seconds", "5"))
        facts = self._engine.check_ready()
        builder = TraceBuilder(facts)
        events = builder.start()
        with self._engine.watch.watch() as watcher:
            end = time.monotonic() + seconds
            while (left := end - time.monotonic()) > 0 and not await request.is_disconnected():
                message = await watcher.get(min(left, _PING_SECONDS))
                if message is not None:
                    events += builder.add(message, watcher.spans)
        events += builder.finish()
        body = await asyncio.to_thread(as_json, events)
        headers = {"content-disposition": 'attachment; filename="minivllm-trace.json"'}
        return Response(body, media_type="application/json", headers=headers)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TRACE_SECONDS:
        raise InvalidRequestError(f"seconds must lie in (0, {MAX_TRACE_SECONDS:g}], got {text!r}", "seconds")
    return seconds


def _described(facts: EngineFacts) -> dict[str, Any]:
    return {name: value for name, value in asdict(facts).items() if name != "eos_token_ids"}
