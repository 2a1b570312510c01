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
    """One producer (`put`, `fail`, `nudge`: never wait), one consumer (`get`). For use on one event loop.

    The consumer waits on a bare future: an `asyncio.Event` takes twice as long to wake it, for every token.
    """

    __slots__ = ("_failure", "_nudged", "_pending", "_waiter", "closed")

    def __init__(self) -> None:
        self._pending: Chunk | None = None
        self._failure: MiniVLLMError | None = None
        self._nudged = False
        self._waiter: asyncio.Future[None] | None = None
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
        new = Chunk(text, list(token_ids), finished, logprobs)
        if pending is None:
            self._pending = new
        else:
            pending.append(new)
        if finished is not None:
            self.closed = True
        if self._waiter is not None:
            self._wake()

    def fail(self, error: MiniVLLMError) -> None:
        """End with an error, after what waits was fetched."""
        self._failure = error
        self.closed = True
        self._wake()

    def nudge(self) -> None:
        """Let a waiting `get` return None, so that the writer can show the client that it is alive."""
        self._nudged = True
        self._wake()

    async def get(self) -> Chunk | None:
        """Everything that came since the last `get`, waiting for the first of it. Raises the error of `fail`."""
        if self._pending is None and self._failure is None and not self._nudged:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._nudged = False
        if (chunk := self._pending) is not None:
            self._pending = None
            return chunk
        if self._failure is not None:
            raise self._failure
        return None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
