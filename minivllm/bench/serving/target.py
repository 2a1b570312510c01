"""The server that is measured: its address, and every request to it as bytes, built before the clock starts."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec

from minivllm.bench.serving.endpoints import ENDPOINTS, EndpointName, RequestSpec
from minivllm.errors import InvalidRequestError


class Address(NamedTuple):
    """host and port to connect to; `path` stands before that of every endpoint."""

    host: str
    port: int
    tls: bool
    path: str

    @classmethod
    def of(cls, url: str) -> Self:
        """Raises `InvalidRequestError` for what is not an http(s) address."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in {"http", "https"} or not host:
            raise InvalidRequestError(f"--url {url}: not an http or https address", "url")
        tls = parts.scheme == "https"
        return cls(host, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Target:
    """fields: what every body holds besides the prompt and max_tokens (model, temperature, …)."""

    url: str
    endpoint: EndpointName
    fields: dict[str, Any] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0

    def payload(self, request: RequestSpec) -> bytes:
        """The whole HTTP request."""
        address, endpoint = Address.of(self.url), ENDPOINTS[self.endpoint]
        body = msgspec.json.encode({**endpoint.fields(request.prompt), "max_tokens": request.max_tokens, **self.fields})
        lines = [
            f"POST {address.path}{endpoint.path} HTTP/1.1",
            f"Host: {address.netloc}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(body)}",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
