"""POST /generate: one prompt in, a stream of events or one JSON object out."""

import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from frontend import sse
from frontend.disconnect import watch_disconnect
from frontend.engine_client import EngineClient, LiveRequest
from frontend.http_errors import error_body
from frontend.output_stream import Chunk
from frontend.request_body import parse_body, read_body
from frontend.request_preparation import fit_to_model, tokenize
from frontend.schemas import GenerateRequest, is_request_id
from frontend.tokenizer import Tokenizer
from minivllm.errors import MiniVLLMError

logger = logging.getLogger(__name__)

_json = msgspec.json.Encoder()


class GenerateEndpoint:
    """An ASGI application. max_request_bytes: largest body; log_requests: a line per request, never its text."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, max_request_bytes: int, log_requests: bool) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_request_bytes = max_request_bytes
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival_time = time.monotonic()
        body = parse_body(GenerateRequest, await read_body(scope, receive, self._max_request_bytes))
        params = body.params()
        async with watch_disconnect(receive) as disconnect:
            facts = self._engine.check_admission()
            prompt_token_ids = await tokenize(body, self._tokenizer)
            params = fit_to_model(body, params, prompt_token_ids, facts)
            if disconnect.gone:
                return
            request_id = body.request_id or _request_id(scope)
            with self._engine.generate(request_id, prompt_token_ids, params, arrival_time) as request:
                disconnect.callback = lambda: self._engine.abort(request)
                self._log(request, params.max_tokens)
                if body.stream:
                    await _respond_with_events(request, send)
                else:
                    await _respond_with_json(request, scope, receive, send)

    def _log(self, request: LiveRequest, max_tokens: int | None) -> None:
        if self._log_requests:
            logger.info("request %s: %d prompt tokens, max_tokens %s", *_sizes(request), max_tokens)


def _sizes(request: LiveRequest) -> tuple[str, int]:
    return request.request_id, request.num_prompt_tokens


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id where it can serve as an id, else a fresh one."""
    header = Headers(scope=scope).get("x-request-id", "")
    return header if is_request_id(header) else f"gen-{uuid.uuid4().hex}"


async def _respond_with_events(request: LiveRequest, send: Send) -> None:
    # The status waits for the first token (or the first ping), so that a refusal by the engine core is still a 4xx.
    first = await request.stream.get()
    await sse.send_events(send, _events(request, first), {"x-request-id": request.request_id})


async def _events(request: LiveRequest, chunk: Chunk | None) -> AsyncIterator[bytes]:
    head = b'{"request_id":' + _json.encode(request.request_id) + b',"text":'
    try:
        while True:
            if chunk is None:
                yield sse.PING
            elif chunk.finished is None:
                ids = _json.encode(chunk.token_ids)
                text = _json.encode(chunk.text)
                yield b"".join((b"data: ", head, text, b',"token_ids":', ids, b',"finish_reason":null}\n\n'))
            else:
                yield sse.event(_json.encode(_last_event(request, chunk))) + sse.DONE
                return
            chunk = await request.stream.get()
    except MiniVLLMError as error:
        yield sse.event(_json.encode(error_body(error))) + sse.DONE


async def _respond_with_json(request: LiveRequest, scope: Scope, receive: Receive, send: Send) -> None:
    """Gather all chunks; one that ends with an error raises it."""
    whole = Chunk("", [])
    texts = []
    while whole.finished is None:
        chunk = await request.stream.get()
        if chunk is not None:
            texts.append(chunk.text)
            whole.token_ids += chunk.token_ids
            whole.finished = chunk.finished
    whole.text = "".join(texts)
    payload = _json.encode(_last_event(request, whole))
    headers = {"x-request-id": request.request_id}
    await Response(payload, media_type="application/json", headers=headers)(scope, receive, send)


def _last_event(request: LiveRequest, chunk: Chunk) -> dict[str, Any]:
    return {
        "request_id": request.request_id,
        "text": chunk.text,
        "token_ids": chunk.token_ids,
        "finish_reason": chunk.finished.reason if chunk.finished else None,
        "usage": usage(request),
    }


def usage(request: LiveRequest) -> dict[str, Any]:
    """Token counts of a finished request."""
    return {
        "prompt_tokens": request.num_prompt_tokens,
        "completion_tokens": request.num_output_tokens,
        "total_tokens": request.num_prompt_tokens + request.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": request.num_cached_tokens},
    }
