"""The HTTP application: which path is served by what. No logic."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from frontend.access_log import AccessLogMiddleware
from frontend.batch_encoder import BatchEncoder
from frontend.choices import all_ids
from frontend.debug import invariants
from frontend.engine_client import EngineClient
from frontend.engine_endpoints import EventsEndpoint, RequestTimelineEndpoint, TraceEndpoint
from frontend.generate import GenerateRenderer
from frontend.generation import GenerationEndpoint, served_name
from frontend.health import health, readiness
from frontend.http_errors import EXCEPTION_HANDLERS
from frontend.metrics import FrontendMetrics
from frontend.middleware import ApiKeyMiddleware, RequestIdMiddleware
from frontend.openai.chat import ChatRenderer
from frontend.openai.completions import CompletionRenderer
from frontend.openai.models import Models
from frontend.openai.schemas import ChatCompletionRequest, CompletionRequest
from frontend.openapi import openapi_document
from frontend.page import page_routes
from frontend.request_body import parse_body, read_body
from frontend.request_preparation import prepare_prompts, run_for_size
from frontend.schemas import DetokenizeRequest, GenerateRequest, TokenizeRequest
from frontend.tokenizer import Tokenizer
from minivllm import __version__
from minivllm.config import FrontendConfig, ServeConfig
from minivllm.errors import NotReadyError

Handler = Callable[[Request], Awaitable[Response]]


def make_app(config: ServeConfig, engine: EngineClient, tokenizer: Tokenizer, metrics: FrontendMetrics) -> Starlette:
    """The application of one frontend process."""
    models, document = Models(config, engine), openapi_document()
    encoder = BatchEncoder(tokenizer)
    routes = [
        *_generation_routes(config, engine, encoder),
        Route("/v1/models", _json(lambda request: models.all())),
        Route("/v1/models/{name:path}", _json(lambda request: models.one(request.path_params["name"]))),
        Route("/tokenize", _tokenize(config, engine, encoder), methods=["POST"]),
        Route("/detokenize", _detokenize(config, tokenizer), methods=["POST"]),
        Route("/v1/requests/{request_id:path}", _abort(engine), methods=["DELETE"]),
        Route("/v1/requests/{request_id:path}", RequestTimelineEndpoint(engine).answer),
        Route("/v1/engine/events", EventsEndpoint(engine, served_name(config)), methods=["GET"]),
        Route("/health", _state(lambda: health(engine))),
        Route("/ping", _state(lambda: health(engine)), methods=["GET", "POST"]),
        Route("/ready", _state(lambda: readiness(engine))),
        Route("/version", _version),
        Route("/metrics", _metrics(metrics)),
        Route("/openapi.json", _json(lambda request: document)),
        *page_routes(),
    ]
    if config.enable_debug:
        routes.append(Route("/debug/invariants", _state(lambda: invariants(engine))))
        routes.append(Route("/debug/trace", TraceEndpoint(engine).answer))
    return Starlette(routes=routes, middleware=_middleware(config), exception_handlers=EXCEPTION_HANDLERS)


def _generation_routes(config: FrontendConfig, engine: EngineClient, encoder: BatchEncoder) -> list[Route]:
    parts = (engine, encoder, config)
    name, tokenizer = served_name(config), encoder.tokenizer
    completions = GenerationEndpoint(
        CompletionRequest, partial(CompletionRenderer, tokenizer, name), *parts, id_prefix="cmpl-"
    )
    chat = GenerationEndpoint(
        ChatCompletionRequest, partial(ChatRenderer, tokenizer, name), *parts, id_prefix="chatcmpl-"
    )
    generate = GenerationEndpoint(
        GenerateRequest, GenerateRenderer, *parts, id_prefix="gen-", takes_header_id=True, requires_json=False
    )
    return [
        Route("/generate", generate, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


def _middleware(config: FrontendConfig) -> list[Middleware]:
    """From the outside in: a browser must be able to read a refusal, so CORS comes before the key."""
    middleware = [Middleware(AccessLogMiddleware)] if config.enable_access_log else []
    middleware.append(Middleware(RequestIdMiddleware))
    if config.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.allowed_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id"],
            )
        )
    if config.api_key is not None:
        middleware.append(Middleware(ApiKeyMiddleware, api_key=config.api_key))
    return middleware


def _tokenize(config: FrontendConfig, engine: EngineClient, encoder: BatchEncoder) -> Handler:
    async def endpoint(request: Request) -> Response:
        body = parse_body(TokenizeRequest, await read_body(request.scope, request.receive, config.max_request_bytes))
        max_model_len = engine.link.facts.max_model_len if engine.link.facts else None
        [prompt] = await prepare_prompts(body.inputs(), encoder, max_model_len)
        token_ids = prompt.token_ids
        return JSONResponse({"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids})

    return endpoint


def _detokenize(config: FrontendConfig, tokenizer: Tokenizer) -> Handler:
    async def endpoint(request: Request) -> Response:
        body = parse_body(DetokenizeRequest, await read_body(request.scope, request.receive, config.max_request_bytes))
        text = await run_for_size(
            len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
        )
        return JSONResponse({"prompt": text})

    return endpoint


def _abort(engine: EngineClient) -> Handler:
    async def endpoint(request: Request) -> Response:
        request_id = request.path_params["request_id"]
        if not engine.abort_by_id(all_ids(request_id)):
            raise NotReadyError("the engine core is not connected")
        return JSONResponse({"request_id": request_id, "status": "abort_requested"}, status_code=202)

    return endpoint


def _json(content: Callable[[Request], dict[str, Any]]) -> Handler:
    async def endpoint(request: Request) -> Response:
        return JSONResponse(content(request))

    return endpoint


def _state(check: Callable[[], tuple[int, dict[str, Any]]]) -> Handler:
    async def endpoint(request: Request) -> Response:
        status, body = check()
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 503 else None)

    return endpoint


def _metrics(metrics: FrontendMetrics) -> Handler:
    async def endpoint(request: Request) -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return endpoint


async def _version(request: Request) -> Response:
    return JSONResponse({"version": __version__})
