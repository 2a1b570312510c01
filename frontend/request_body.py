"""Reads and validates a JSON body; what is wrong with it becomes an `InvalidRequestError` naming the field."""

import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from minivllm.errors import InvalidRequestError

_JSON_TYPE = re.compile(r"$|application/([\w.+-]+\+)?json\s*($|;)", re.IGNORECASE)
_MAX_SHOWN = 60  # characters of a wrong value that the message repeats
_UNION_ARMS = {"text", "token_ids", "parts", "several", "texts", "lists", "[key]"}  # our tags; [key] is pydantic's

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_body(scope: Scope, receive: Receive, max_bytes: int, requires_json: bool = False) -> bytes:
    """The whole body. Raises `HTTPException` 413 as soon as it is too large, `ClientDisconnect` when it breaks off.

    requires_json: raise 415 for a body that calls itself something else. (What `curl -d` sends calls itself a form.)
    """
    headers = Headers(scope=scope)
    declared, kind = headers.get("content-length", ""), headers.get("content-type", "")
    if requires_json and not _JSON_TYPE.match(kind):
        raise HTTPException(415, f"Content-Type must be application/json, got {kind!r}")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        more = message.get("more_body", False)
    return b"".join(parts)


def parse_body(kind: type[ModelT], body: bytes) -> ModelT:
    """`body` as a `kind`. Raises `InvalidRequestError` for the first thing that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Of the alternatives of a union, the one that got furthest is the one that was meant.
        raise _explain(max(error.errors(include_url=False), key=lambda details: len(details["loc"]))) from None


def _explain(details: ErrorDetails) -> InvalidRequestError:
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):
        return cause
    param = str(details["loc"][0]) if details["loc"] else None
    place = _place(details["loc"]) if details["loc"] else "the body"
    message = details["msg"].removeprefix("Invalid JSON: ").replace("Input should be", "must be", 1)
    match details["type"]:
        case "json_invalid":
            return InvalidRequestError(f"the body is not valid JSON: {message}")
        case "extra_forbidden":
            return InvalidRequestError(f"{place} is not a field of this endpoint", param)
        case "missing":
            return InvalidRequestError(f"{place} is required", param)
    shown = repr(details["input"])
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
    return InvalidRequestError(f"{place}: {message}, got {shown}", param)


def _place(loc: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content", "str")` → `messages[0].content`: names of union arms are left out."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc if step not in _UNION_ARMS)
    return "".join(steps).removeprefix(".")


def _too_large(max_bytes: int) -> HTTPException:
    detail = f"the body is larger than {max_bytes} bytes (--max-request-bytes)"
    return HTTPException(413, detail, headers={"Connection": "close"})
