"""Spreads requests over load processes, so that one Python interpreter is not what is measured."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import psutil

from minivllm.bench.serving import messages
from minivllm.bench.serving.endpoints import RequestSpec
from minivllm.bench.serving.messages import Job, Progress, Ready, Result, Sample, Start, frame
from minivllm.bench.serving.target import Target
from minivllm.errors import MiniVLLMError

COMMAND = (sys.executable, "-P", "-m", "minivllm.bench.serving.worker")
_START_DELAY = 0.02  # seconds for the start to reach every process

_Reply = TypeVar("_Reply", Ready, Result)


class LoadError(MiniVLLMError):
    """The load could not be made, or the server failed; the message says how."""


class LoadGenerator:
    """An async context manager around `num_processes` load processes, which serve any number of runs."""

    def __init__(self, target: Target, num_processes: int) -> None:
        self._target = target
        self._num_processes = num_processes
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        for _ in range(self._num_processes):
            self._processes.append(
                await asyncio.create_subprocess_exec(
                    *COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for the command
                )
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.kill()
        for process in self._processes:
            await process.wait()

    def cpu_seconds(self) -> float:
        """Processor time of the load processes together, since they started. Raises `LoadError`."""
        try:
            times = [psutil.Process(process.pid).cpu_times() for process in self._processes]
        except psutil.Error as error:
            raise LoadError(f"a load process ended: {error}") from error
        return sum(each.user + each.system for each in times)

    async def run(
        self,
        requests: Sequence[RequestSpec],
        offsets: Sequence[float],
        max_concurrency: int | None = None,
        on_progress: Callable[[int, int], None] = lambda num_requests, num_tokens: None,
    ) -> list[Sample]:
        """Send every request, and return a sample of each, in their order. Raises `LoadError`.

        offsets: seconds after the start. max_concurrency: requests in flight; each process gets its part of them.
        on_progress: told how many requests have ended and how many tokens have come.
        """
        limit = min(max_concurrency or len(requests), len(requests))
        processes = self._processes[:limit]
        progress = [Progress(0, 0)] * len(processes)

        def on_worker_progress(index: int, message: Progress) -> None:
            progress[index] = message
            on_progress(sum(each.num_requests for each in progress), sum(each.num_tokens for each in progress))

        payloads = [self._target.payload(request) for request in requests]
        workers = [_Worker(process, index, on_worker_progress) for index, process in enumerate(processes)]
        for index, worker in enumerate(workers):
            part = slice(index, None, len(workers))
            places = limit // len(workers) + (index < limit % len(workers))
            worker.send(
                Job(
                    self._target.url,
                    self._target.endpoint,
                    payloads[part],
                    list(offsets[part]),
                    places,
                    self._target.timeout,
                )
            )
        await asyncio.gather(*(worker.receive(Ready) for worker in workers))
        start = time.monotonic() + _START_DELAY
        for worker in workers:
            worker.send(Start(start))
        results = await asyncio.gather(*(worker.receive(Result) for worker in workers))
        samples = [Sample(0.0, 0.0, [])] * len(requests)
        for index, result in enumerate(results):
            samples[index :: len(workers)] = result.samples
        return samples


class _Worker:
    """One load process, as its parent sees it."""

    def __init__(
        self, process: asyncio.subprocess.Process, index: int, on_progress: Callable[[int, Progress], None]
    ) -> None:
        self._process = process
        self._index = index
        self._on_progress = on_progress

    def send(self, message: messages.Message) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(frame(message))

    async def receive(self, kind: type[_Reply]) -> _Reply:
        """The next message of `kind`; progress in between is passed on. Raises `LoadError` when the process dies."""
        reader = self._process.stdout or asyncio.StreamReader()
        try:
            while True:
                message = await messages.receive(reader, messages.from_worker)
                if isinstance(message, kind):
                    return message
                if isinstance(message, Progress):
                    self._on_progress(self._index, message)
        except asyncio.IncompleteReadError:
            code = await self._process.wait()
            raise LoadError(f"load process {self._process.pid} ended (exit code {code})") from None


def default_num_processes() -> int:
    """A quarter of the cores, at most 8: the server needs the others, when it runs on this machine."""
    return max(1, min(8, (os.cpu_count() or 1) // 4))
