"""A small server that speaks the OpenAI protocol, for tests of what measures or uses one."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

API_KEY = "secret"
CANNOT = 13  # max_tokens of a request that is refused
BREAKS = 14  # … and of one that fails after its first token


class OpenAIServer:
    """A context manager. `bodies` and `in_flight_peak` say what was asked; every token takes one turn of the loop."""

    def __init__(self, with_usage: bool = True) -> None:
        self.with_usage = with_usage
        self.bodies: list[dict[str, Any]] = []
        self.num_in_flight = 0
        self.in_flight_peak = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/completions", self._answer, methods=["POST"]),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_config=None, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._listener])))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "the-model"}]})

    async def _answer(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {API_KEY}":
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        body = await request.json()
        self.bodies.append(body)
        if body["max_tokens"] == CANNOT:
            return JSONResponse({"error": {"message": "this cannot be"}}, 400)
        return StreamingResponse(self._events(body, "messages" in body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], is_chat: bool) -> AsyncIterator[str]:
        self.num_in_flight += 1
        self.in_flight_peak = max(self.in_flight_peak, self.num_in_flight)
        try:
            yield ": ping\n\n"
            for index in range(body["max_tokens"]):
                delta = {"delta": {"content": f"{index} "}} if is_chat else {"text": f"{index} "}
                yield _event({"choices": [delta], "usage": None})
                await asyncio.sleep(0.001)
                if body["max_tokens"] == BREAKS:
                    yield _event({"error": {"message": "it broke"}})
                    break
            if self.with_usage:
                details = {"cached_tokens": 1}
                usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"], "prompt_tokens_details": details}
                yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            self.num_in_flight -= 1


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
