"""What holds for every endpoint: the API key, and the request id that is echoed."""

import hmac
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.body import is_request_id
from frontend.http_errors import error_response
from frontend.page import STATIC_PREFIX

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/"})  # probes carry no key; the page asks its user for it


class ApiKeyMiddleware:
    """Lets in what carries `Authorization: Bearer <api_key>`; the rest gets 401."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]):
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                response = error_response(401, "missing or wrong API key", {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(STATIC_PREFIX)


class RequestIdMiddleware:
    """Echoes the client's X-Request-Id, unless the endpoint has set one itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Headers(scope=scope).get("x-request-id", "") if scope["type"] == "http" else ""
        if not is_request_id(request_id):
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("x-request-id", request_id)
            await send(message)

        await self._app(scope, receive, send_with_id)
