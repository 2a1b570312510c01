"""The mailbox between the engine's output and the writer of one response: what the writer has not fetched is merged.

engine's pace   put put put ── put ─────── put put
writer's pace   get ········── get(3 merged) ── get …      a slow client costs memory for its own text, nothing else
"""

import asyncio
from collections.abc import Sequence

from msgspec import Struct

from minivllm.errors import MiniVLLMError
from minivllm.protocol import Finished, Logprobs


class Chunk(Struct):
    """New text and token ids, with log-probabilities where the request asks; `finished` with the last ones."""

    text: str
    token_ids: list[int]
    finished: Finished | None = None
    logprobs: Logprobs | None = None

    def append(self, later: "Chunk") -> None:
        """Add what came after this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.finished = later.finished
        if later.logprobs is not None:
            self.logprobs = self.logprobs or Logprobs()
            self.logprobs.extend(later.logprobs)


class OutputStream:
    """One producer (`put`, `fail`, `nudge`: never wait), one consumer (`get`). For use on one event loop."""

    def __init__(self) -> None:
        self._pending = Chunk("", [])
        self._has_pending = False
        self._failure: MiniVLLMError | None = None
        self._news = asyncio.Event()
        self.closed = False

    def put(
        self,
        text: str,
        token_ids: Sequence[int],
        finished: Finished | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """Add to what waits. Nothing may follow a `finished`."""
        pending = self._pending
        pending.text += text
        pending.token_ids += token_ids
        pending.finished = finished
        if logprobs is not None:
            pending.logprobs = pending.logprobs or Logprobs()
            pending.logprobs.extend(logprobs)
        self.closed = finished is not None
        self._has_pending = True
        self._news.set()

    def fail(self, error: MiniVLLMError) -> None:
        """End with an error, after what waits was fetched."""
        self._failure = error
        self.closed = True
        self._news.set()

    def nudge(self) -> None:
        """Let a waiting `get` return None, so that the writer can show the client that it is alive."""
        self._news.set()

    async def get(self) -> Chunk | None:
        """Everything that came since the last `get`, waiting for the first of it. Raises the error of `fail`."""
        await self._news.wait()
        self._news.clear()
        if self._has_pending:
            chunk, self._pending, self._has_pending = self._pending, Chunk("", []), False
            if self._failure is not None:
                self._news.set()
            return chunk
        if self._failure is not None:
            raise self._failure
        return None
