"""The endpoints that can be measured: how a request is put, and what one event of the answer says."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Raw, Struct

EndpointName = Literal["completions", "chat", "generate"]
Prompt = str | list[int]  # text or token ids


class RequestSpec(NamedTuple):
    """What is asked of the server: a prompt and how many tokens are to follow."""

    prompt: Prompt
    max_tokens: int


class _CachedTokens(Struct):
    cached_tokens: int | None = None


class Usage(Struct):
    """Token counts of one request, as the server gives them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None

    @property
    def num_cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class Event(Struct):
    """What one event says that matters here; `msgspec` skips all the rest."""

    usage: Usage | None = None
    error: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens that it brings, as far as one can tell without a tokenizer; 0: no output."""
        raise NotImplementedError


class OpenAIEvent(Event):
    """A chunk of /v1/completions or /v1/chat/completions: output is whatever has a choice."""

    choices: list[Raw] = []

    @property
    def num_tokens(self) -> int:
        return 1 if self.choices else 0


class GenerateEvent(Event):
    """An event of /generate."""

    token_ids: list[int] = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class Endpoint(NamedTuple):
    """path: what is posted to. fields: the prompt and what asks for a stream with usage. decode: reads an event."""

    path: str
    fields: Callable[[Prompt], dict[str, Any]]
    decode: Callable[[bytes], Event]


_STREAM = {"stream": True, "stream_options": {"include_usage": True}}

ENDPOINTS: dict[str, Endpoint] = {
    "completions": Endpoint(
        "/v1/completions", lambda prompt: {"prompt": prompt, **_STREAM}, msgspec.json.Decoder(OpenAIEvent).decode
    ),
    "chat": Endpoint(
        "/v1/chat/completions",
        lambda prompt: {"messages": [{"role": "user", "content": prompt}], **_STREAM},
        msgspec.json.Decoder(OpenAIEvent).decode,
    ),
    "generate": Endpoint(
        "/generate", lambda prompt: {"prompt": prompt, "stream": True}, msgspec.json.Decoder(GenerateEvent).decode
    ),
}
