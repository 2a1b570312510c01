"""The access log: a line for each request when its response has ended, without its text.

cmpl-5f… POST /v1/completions 200 812.4 ms, 12 + 64 tokens
"""

import logging
import time
from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.choices import Choice, usage

logger = logging.getLogger(__name__)

_CHOICES = "minivllm.choices"  # key of the scope
_MAX_PATH = 200  # characters


def note_choices(scope: Scope, choices: Sequence[Choice]) -> None:
    """Have the tokens of `choices` stand in the line of this request."""
    scope[_CHOICES] = choices


class AccessLogMiddleware:
    """Status 500: an exception that is no answer; 499: the client left before there was one (nginx's number)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, request_id = time.monotonic(), 499, "-"

        async def send_and_note(message: MutableMapping[str, Any]) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status, request_id = message["status"], Headers(raw=message["headers"]).get("x-request-id", "-")
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            status = 500
            raise
        finally:
            milliseconds = 1000 * (time.monotonic() - start)
            logger.info(
                "%s %s %s %d %.1f ms%s", request_id, scope["method"], _path(scope), status, milliseconds, _tokens(scope)
            )


def _path(scope: Scope) -> str:
    """As it was sent, so percent-encoded: it cannot break the line. Without the query."""
    return str(scope["raw_path"].partition(b"?")[0][:_MAX_PATH].decode("ascii", "replace"))


def _tokens(scope: Scope) -> str:
    counts = usage(scope[_CHOICES]) if scope.get(_CHOICES) else None
    return f", {counts['prompt_tokens']} + {counts['completion_tokens']} tokens" if counts else ""
