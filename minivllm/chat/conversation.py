"""What was said so far, and how the next answer is asked for."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from minivllm.chat.options import ChatOptions
from minivllm.event_stream import ServerError, post_events

_TIMEOUT = httpx.Timeout(30.0, read=None)  # an answer may wait in a queue


@dataclass
class Answer:
    """How an answer went. Times in seconds; usage may be missing, then each event counts as a token."""

    num_tokens: int = 0
    seconds_to_first: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        speed = self.num_tokens / self.seconds if self.seconds else 0.0
        return f"{self.num_tokens} tokens, first after {self.seconds_to_first:.2f} s, {speed:.1f} tokens/s"


class Conversation:
    """The turns of one chat. transport: in place of the network, for tests."""

    def __init__(self, options: ChatOptions, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._options = options
        self._transport = transport
        self._model = options.model
        self.system = options.system
        self.turns: list[dict[str, str]] = []
        self.last = Answer()

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns.clear()

    async def ask(self, question: str) -> AsyncGenerator[str, None]:
        """The answer, piece by piece. Left early, what has come is kept; where nothing came, neither is the question.

        Raises `ServerError` and `httpx.HTTPError`.
        """
        self.turns.append({"role": "user", "content": question})
        said: list[str] = []
        self.last = Answer()
        start = time.monotonic()
        try:
            async for text in self._stream(start):
                said.append(text)
                yield text
        finally:
            self.last.seconds = time.monotonic() - start
            if said:
                self.turns.append({"role": "assistant", "content": "".join(said)})
            else:
                self.turns.pop()

    async def _stream(self, start: float) -> AsyncIterator[str]:
        headers = {"Authorization": f"Bearer {self._options.api_key}"} if self._options.api_key else None
        url = self._options.url.rstrip("/").removesuffix("/v1")
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=_TIMEOUT, transport=self._transport
        ) as http:
            path, body = await self._request(http)
            async for event in post_events(http, path, body):
                text, num_tokens = _read(event)
                if num_tokens and not self.last.num_tokens:
                    self.last.seconds_to_first = time.monotonic() - start
                self.last.num_tokens += num_tokens
                if event.get("usage"):
                    self.last.num_tokens = event["usage"]["completion_tokens"]
                if text:
                    yield text

    async def _request(self, http: httpx.AsyncClient) -> tuple[str, dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {"messages": [*system, *self.turns], "stream": True}
        given = {"max_tokens": self._options.max_tokens, "temperature": self._options.temperature}
        body |= {name: value for name, value in given.items() if value is not None}
        if self._options.endpoint == "generate":
            return "/generate", body
        self._model = self._model or await _first_model(http)
        return "/v1/chat/completions", {**body, "model": self._model, "stream_options": {"include_usage": True}}


async def _first_model(http: httpx.AsyncClient) -> str:
    response = await http.get("/v1/models")
    try:
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ServerError(f"the server lists no model (give its name as MODEL): {error}") from error


def _read(event: dict[str, Any]) -> tuple[str, int]:
    """Text and number of tokens of an event of either endpoint."""
    if "token_ids" in event:
        return event["text"], len(event["token_ids"])
    choices = event.get("choices") or []
    text = (choices[0].get("delta") or {}).get("content") or "" if choices else ""
    return text, 1 if choices else 0
