"""Which error is which HTTP answer: status, `{"error": {"message", "type", "param", "code"}}` and Retry-After."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ExceptionHandler

from minivllm.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineKilledError,
    GenerationError,
    InvalidRequestError,
    MiniVLLMError,
    NotReadyError,
    OverloadedError,
    UnknownModelError,
)

# Error → (status, type, code). Looked up from the most derived class upwards.
_KINDS: dict[type[Exception], tuple[int, str, str]] = {
    InvalidRequestError: (400, "invalid_request_error", "invalid_request"),
    DuplicateRequestError: (409, "invalid_request_error", "duplicate_request_id"),
    UnknownModelError: (404, "not_found_error", "model_not_found"),
    OverloadedError: (429, "overloaded_error", "queue_full"),
    EngineKilledError: (500, "server_error", "engine_crashed_repeatedly"),
    GenerationError: (500, "server_error", "generation_failed"),
    NotReadyError: (503, "unavailable_error", "not_ready"),
    EngineDeadError: (503, "unavailable_error", "engine_gone"),
    MiniVLLMError: (500, "server_error", "internal_error"),
}
_HTTP_TYPES = {401: "authentication_error", 404: "not_found_error"}
_ENGINE_RETRY_AFTER = 5  # seconds; a restarted engine core loads for about that long


def error_body(error: MiniVLLMError) -> dict[str, Any]:
    """The JSON of an error, in a response or as the last event of a stream."""
    _, kind, code = _kind(error)
    return _body(str(error), kind, getattr(error, "param", None), code)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error that HTTP itself knows (401, 404, 413 …)."""
    kind = _HTTP_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse(_body(message, kind, None, None), status, headers=headers)


async def _on_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, MiniVLLMError):
        raise error
    return JSONResponse(error_body(error), _kind(error)[0], headers=_retry_headers(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return error_response(error.status_code, error.detail, dict(error.headers or {}))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bug(request: Request, error: Exception) -> Response:
    return error_response(500, "internal error")  # the traceback is logged by the server


EXCEPTION_HANDLERS: dict[Any, ExceptionHandler] = {
    MiniVLLMError: _on_error,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_disconnect,
    Exception: _on_bug,
}


def _retry_headers(error: MiniVLLMError) -> dict[str, str]:
    match error:
        case OverloadedError() | NotReadyError():
            return {"Retry-After": str(error.retry_after)}
        case EngineDeadError():
            return {"Retry-After": str(_ENGINE_RETRY_AFTER)}
    return {}


def _kind(error: MiniVLLMError) -> tuple[int, str, str]:
    return next(_KINDS[kind] for kind in type(error).__mro__ if kind in _KINDS)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
