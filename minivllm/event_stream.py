"""A stream of server-sent events as a client of ours reads it, for what shows text rather than measures."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from minivllm.errors import MiniVLLMError

_MAX_SHOWN = 300  # characters of an error's body


class ServerError(MiniVLLMError):
    """The server did not do what was asked of it; the message says what it answered. `status` unless it was 200."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


async def post_events(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """POST, and the objects of the answer up to [DONE]. Raises `ServerError` for an error, at the start or later on."""
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != httpx.codes.OK:
            answer = (await response.aread()).decode(errors="replace")
            raise ServerError(_describe(response.status_code, answer), response.status_code)
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").lstrip()
            if line.startswith("data:") and data != "[DONE]":
                event: dict[str, Any] = json.loads(data)
                if event.get("error"):
                    raise ServerError(_message(event) or data)
                yield event


def _describe(status: int, body: str) -> str:
    try:
        message = _message(json.loads(body))
    except ValueError:
        message = None
    return f"the server answered {status}: {message or body[:_MAX_SHOWN]}"


def _message(content: Any) -> str | None:
    error = content.get("error") if isinstance(content, dict) else None
    return str(error["message"]) if isinstance(error, dict) and "message" in error else None
