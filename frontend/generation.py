"""The way every generating endpoint goes, from body to response; endpoints differ in schema and rendering alone.

body ─▶ validate ─▶ admit ─▶ prompts ─▶ choices ─▶ events, as they arrive     ┐ written by the
                                               └─▶ one object, when all ended ┘ endpoint's `Renderer`
"""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from frontend import sse
from frontend.access_log import note_choices
from frontend.batch_encoder import BatchEncoder
from frontend.body import is_request_id
from frontend.choices import MAX_CHOICES, Arrival, Choice, arrivals, submit, whole_answers
from frontend.disconnect import watch_disconnect
from frontend.engine_client import EngineClient
from frontend.http_errors import error_body
from frontend.json_bytes import to_json
from frontend.output_stream import Chunk
from frontend.request_body import parse_body, read_body
from frontend.request_preparation import Prompt, check_schema, fit_to_model, prepare_prompts
from frontend.schemas import GenerationFields
from minivllm.config import FrontendConfig
from minivllm.errors import InvalidRequestError, MiniVLLMError, UnknownModelError
from minivllm.protocol import EngineFacts
from minivllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

BodyT = TypeVar("BodyT", bound=GenerationFields)


class Renderer(Protocol):
    """Writes one response."""

    def event(self, choice: Choice, chunk: Chunk) -> bytes:
        """The event of one arrival."""

    def last_events(self) -> bytes:
        """What follows when all choices have ended, before `[DONE]`."""

    def whole(self, answers: Sequence[Chunk]) -> bytes:
        """The one object that says everything, as JSON. `answers` are complete, one for each choice."""


class GenerationEndpoint(Generic[BodyT]):
    """An ASGI application.

    render: (body, request_id, choices) → Renderer. id_prefix: what fresh ids begin with.
    takes_header_id: X-Request-Id becomes the id of the request, where it can; otherwise it is only echoed.
    """

    def __init__(
        self,
        schema: type[BodyT],
        render: Callable[[BodyT, str, Sequence[Choice]], Renderer],
        engine: EngineClient,
        encoder: BatchEncoder,
        config: FrontendConfig,
        *,
        id_prefix: str,
        takes_header_id: bool = False,
        requires_json: bool = True,
    ) -> None:
        self._schema = schema
        self._render = render
        self._engine = engine
        self._encoder = encoder
        self._config = config
        self._id_prefix = id_prefix
        self._takes_header_id = takes_header_id
        self._requires_json = requires_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival_time = time.monotonic()
        payload = await read_body(scope, receive, self._config.max_request_bytes, self._requires_json)
        body = parse_body(self._schema, payload)
        params = body.params()
        await check_schema(params.json_schema, body.schema_param)
        check_model(body.asked_model, self._config)
        async with watch_disconnect(receive) as disconnect:
            facts = self._engine.check_admission()
            prompts = await prepare_prompts(body.inputs(), self._encoder, facts.max_model_len)
            work = _fit(body, params, prompts, facts)
            if disconnect.gone:
                return
            request_id, headers = self._request_id(body.request_id, scope)
            with submit(self._engine, request_id, work, body.num_choices, arrival_time) as choices:
                disconnect.callback = lambda: self._abort(choices)
                note_choices(scope, choices)
                self._log(request_id, choices)
                renderer = self._render(body, request_id, choices)
                if body.stream:
                    await _respond_with_events(renderer, choices, headers, scope, send)
                else:
                    payload = renderer.whole(await whole_answers(choices))
                    response = Response(payload, media_type="application/json", headers=headers)
                    await response(scope, receive, send)

    def _request_id(self, given: str | None, scope: Scope) -> tuple[str, dict[str, str]]:
        """The client's id where it gave one, else a fresh one; and the response's headers."""
        header = Headers(scope=scope).get("x-request-id", "")
        header = header if is_request_id(header) else ""
        if self._takes_header_id:
            request_id = given or header or f"{self._id_prefix}{uuid.uuid4().hex}"
        else:
            request_id = f"{self._id_prefix}{given or uuid.uuid4().hex}"
        echoed = header if header and not self._takes_header_id else request_id
        return request_id, {"x-request-id": echoed}

    def _abort(self, choices: Sequence[Choice]) -> None:
        for choice in choices:
            self._engine.abort(choice.request)

    def _log(self, request_id: str, choices: Sequence[Choice]) -> None:
        if self._config.enable_log_requests:
            num_tokens = sum(choice.request.num_prompt_tokens for choice in choices)
            max_tokens = choices[0].params.max_tokens
            logger.info("request %s: %d prompt tokens, max_tokens %s", request_id, num_tokens, max_tokens)


def check_model(asked: str | None, config: FrontendConfig) -> None:
    """Raises `UnknownModelError` unless `asked` is the one that is served, or nothing."""
    if asked is not None and asked != served_name(config):
        raise UnknownModelError(f"The model `{asked}` does not exist.", "model")


def served_name(config: FrontendConfig) -> str:
    """The model's name in the API."""
    return config.served_model_name or config.model


def _fit(
    body: GenerationFields, params: SamplingParams, prompts: Sequence[Prompt], facts: EngineFacts
) -> list[tuple[Prompt, SamplingParams]]:
    """Every prompt with its parameters. Raises `InvalidRequestError` with the numbers for what cannot fit."""
    inputs, num_choices = body.inputs(), len(prompts) * body.num_choices
    if num_choices > MAX_CHOICES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts × {body.num_choices} choices = {num_choices}, at most {MAX_CHOICES} are allowed",
            inputs.param,
        )
    return [(prompt, fit_to_model(inputs, params, prompt.token_ids, facts)) for prompt in prompts]


async def _respond_with_events(
    renderer: Renderer, choices: Sequence[Choice], headers: dict[str, str], scope: Scope, send: Send
) -> None:
    # The status waits for the first token (or the first ping), so that a refusal by the engine core is still a 4xx.
    async with aclosing(arrivals(choices)) as news:
        first = await anext(news)
        if len(choices) == 1:
            await sse.send_events(send, _events_of_one(renderer, *first), headers, scope)
            return
        await sse.send_events(send, _events(renderer, first, news), headers, scope)


async def _events_of_one(renderer: Renderer, choice: Choice, chunk: Chunk | None) -> AsyncIterator[bytes]:
    """Like `_events`, without a generator in between: it is resumed for every token."""
    stream = choice.request.stream
    try:
        while chunk is None or chunk.finished is None:
            yield sse.PING if chunk is None else renderer.event(choice, chunk)
            chunk = await stream.get()
        yield renderer.event(choice, chunk) + renderer.last_events() + sse.DONE
    except MiniVLLMError as error:
        yield sse.event(to_json(error_body(error))) + sse.DONE


async def _events(renderer: Renderer, arrival: Arrival, news: AsyncGenerator[Arrival]) -> AsyncIterator[bytes]:
    try:
        yield _event(renderer, arrival)
        async for later in news:
            yield _event(renderer, later)
        yield renderer.last_events() + sse.DONE
    except MiniVLLMError as error:
        yield sse.event(to_json(error_body(error))) + sse.DONE


def _event(renderer: Renderer, arrival: Arrival) -> bytes:
    choice, chunk = arrival
    return sse.PING if chunk is None else renderer.event(choice, chunk)
