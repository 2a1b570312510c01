"""The live page: files under static/, served as they are, and what a browser may do with them (very little)."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).with_name("static")
STATIC_PREFIX = "/static/"
HEADERS = {
    # Only what this server sends may run, be loaded or be asked, and nobody may show the page inside theirs.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask whether it changed: after an update the modules must fit together
}


def page_routes() -> list[BaseRoute]:
    """The page and its files."""
    return [Route("/", _page), Mount(STATIC_PREFIX, _Files(directory=STATIC), name="static")]


async def _page(request: Request) -> Response:
    return FileResponse(STATIC / "index.html", headers=HEADERS)


class _Files(StaticFiles):
    """Static files with `HEADERS`."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
