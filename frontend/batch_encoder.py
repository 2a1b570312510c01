"""Tokenizes in batches, off the event loop. A batch is what has queued meanwhile: nobody waits for it to fill.

texts ─▶ short, and nothing runs: at once, here
      └▶ queue ─▶ all that queue ─▶ thread ─▶ token ids    two batches at most run at a time: a long text
                                                           holds up only what came with it
"""

import asyncio
from collections.abc import Sequence
from functools import partial

from msgspec import Struct

from frontend.tokenizer import Tokenizer

_INLINE_CHARACTERS = 256  # their tokens take no longer than the way to a thread and back
_MAX_RUNNING = 2


class _Job(Struct, eq=False):
    texts: Sequence[str]
    add_special_tokens: bool
    result: asyncio.Future[list[list[int]]]


class BatchEncoder:
    """Create and use it on one event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._queue: list[_Job] = []
        self._num_running = 0

    async def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each of `texts`, as `Tokenizer.encode` gives them."""
        if not self._num_running and sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return [self.tokenizer.encode(text, add_special_tokens) for text in texts]
        job = _Job(texts, add_special_tokens, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._start_batch()
        return await job.result

    def _start_batch(self) -> None:
        if self._queue and self._num_running < _MAX_RUNNING:
            jobs, self._queue = self._queue, []
            self._num_running += 1
            running = asyncio.get_running_loop().run_in_executor(None, self._encode, jobs)
            running.add_done_callback(partial(self._finish_batch, jobs))

    def _encode(self, jobs: Sequence[_Job]) -> list[list[list[int]]]:
        """In a thread."""
        pairs = [(text, job.add_special_tokens) for job in jobs for text in job.texts]
        token_ids = iter(self.tokenizer.encode_batch(pairs))
        return [[next(token_ids) for _ in job.texts] for job in jobs]

    def _finish_batch(self, jobs: Sequence[_Job], running: "asyncio.Future[list[list[list[int]]]]") -> None:
        self._num_running -= 1
        self._start_batch()
        waiting = [(index, job.result) for index, job in enumerate(jobs) if not job.result.done()]  # who has not left
        for index, result in waiting:
            if running.cancelled():
                result.cancel()
            elif (error := running.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(running.result()[index])
