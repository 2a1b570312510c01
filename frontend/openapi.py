"""GET /openapi.json: the API described by the very models that validate its bodies, and a table of its operations."""

from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from frontend.openai.schemas import ChatCompletionRequest, CompletionRequest
from frontend.schemas import DetokenizeRequest, GenerateRequest, TokenizeRequest
from minivllm import __version__

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_EVENTS = "text/event-stream"
_TEXT = "text/plain"


class Operation(NamedTuple):
    """One path and method. `kinds`: content types of a good answer."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    kinds: tuple[str, ...] = ("application/json",)
    status: int = 200


OPERATIONS = (
    Operation("post", "/generate", "Continue a prompt or a chat", GenerateRequest, ("application/json", _EVENTS)),
    Operation("post", "/v1/completions", "Continue prompts", CompletionRequest, ("application/json", _EVENTS)),
    Operation("post", "/v1/chat/completions", "Answer a chat", ChatCompletionRequest, ("application/json", _EVENTS)),
    Operation("get", "/v1/models", "The models that are served"),
    Operation("get", "/v1/models/{name}", "One of them"),
    Operation("post", "/tokenize", "Text or messages to token ids", TokenizeRequest),
    Operation("post", "/detokenize", "Token ids to text", DetokenizeRequest),
    Operation("delete", "/v1/requests/{request_id}", "Abort a request", status=202),
    Operation("get", "/v1/requests/{request_id}", "What happened to a request, and what it waited for"),
    Operation("get", "/v1/engine/events", "What the engine core does, as it does it", kinds=(_EVENTS,)),
    Operation("get", "/", "The live page", kinds=("text/html",)),
    Operation("get", "/health", "Whether nothing is broken"),
    Operation("get", "/ping", "The same"),
    Operation("post", "/ping", "The same"),
    Operation("get", "/ready", "Whether a request would be served now"),
    Operation("get", "/version", "The version of the server"),
    Operation("get", "/metrics", "Prometheus metrics", kinds=(_TEXT,)),
    Operation("get", "/openapi.json", "This document"),
)
_PROBES = ("/health", "/ping", "/ready")  # they tell their state with 503, too


def openapi_document() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    bodies = [operation.body for operation in OPERATIONS if operation.body is not None]
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Mini-vLLM", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _describe(operation: Operation) -> dict[str, Any]:
    good = {kind: {"schema": {"type": "string"} if kind == _TEXT else {}} for kind in operation.kinds}
    error = {"application/json": {"schema": {} if operation.path in _PROBES else {"$ref": _REF.format(model="Error")}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            str(operation.status): {"description": "done", "content": good},
            "4XX": {"description": "the request is at fault", "content": error},
            "5XX": {"description": "the server is at fault, or not ready", "content": error},
        },
    }
    if "{" in operation.path:
        name = operation.path.partition("{")[2].rstrip("}")
        described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.body is not None:
        schema = {"$ref": _REF.format(model=operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described
