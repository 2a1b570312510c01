"""What all chunks of one response share: id, object, created, model, and the usage that may follow. Encoded once.

data: {"id":…,"object":…,"created":…,"model":…,"choices":[{"index":0, ⟨the chunk's own⟩ }],"usage":…}
       └───────────────── head, per choice ────────────────────────┘                  └─── tail ───┘
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from frontend.choices import Choice, usage
from frontend.json_bytes import to_json
from frontend.openai.schemas import OpenAIFields
from frontend.output_stream import Chunk
from frontend.sse import event


class Envelope:
    """The frame around the choices of one response."""

    def __init__(self, kind: str, body: OpenAIFields, request_id: str, model: str, choices: Sequence[Choice]) -> None:
        self._fields = {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
        self._choices = choices
        head = b"data: " + to_json(self._fields)[:-1] + b',"choices":[{"index":'
        self._heads = [head + to_json(choice.index) + b"," for choice in choices]
        options = body.stream_options
        self._includes_usage = bool(options and options.include_usage)
        self._usage_in_chunks = bool(options and options.continuous_usage_stats)
        self._tail = b'}],"usage":null}\n\n' if self._includes_usage else b"}]}\n\n"

    def chunk(self, choice: Choice, *own: bytes) -> bytes:
        """One event: the choice's fields are `own`, written out."""
        tail = self._tail
        if self._usage_in_chunks:
            tail = b'}],"usage":' + to_json(usage([choice])) + b"}\n\n"
        return b"".join((self._heads[choice.index], *own, tail))

    def last_events(self) -> bytes:
        """The usage, in a chunk without choices, if it was asked for."""
        if not self._includes_usage:
            return b""
        return event(to_json({**self._fields, "choices": [], "usage": usage(self._choices)}))

    def whole(self, answers: Sequence[Chunk], render: Callable[[Choice, Chunk], dict[str, Any]]) -> bytes:
        """The whole response as JSON; `render` writes one choice with its answer."""
        choices = [render(*pair) for pair in zip(self._choices, answers, strict=True)]
        return to_json({**self._fields, "choices": choices, "usage": usage(self._choices)})


def finish_reason(chunk: Chunk) -> str | None:
    """Why the choice ended with this chunk, if it did."""
    return chunk.finished.reason if chunk.finished else None
