"""`python -m minivllm.bench.serving.worker`: one load process. Jobs come in on stdin, samples go out on stdout."""

import asyncio
import os
import sys
import time
from asyncio import StreamReader

import uvloop

from minivllm.bench.serving import messages
from minivllm.bench.serving.client import Client
from minivllm.bench.serving.connection import ConnectionPool
from minivllm.bench.serving.endpoints import ENDPOINTS
from minivllm.bench.serving.messages import Job, Progress, Ready, Result, Sample, Start, frame
from minivllm.bench.serving.target import Address

_PROGRESS_SECONDS = 0.1


class Worker:
    """Works on jobs until stdin ends. Connections are kept from one job to the next."""

    def __init__(self, reader: StreamReader, output: int) -> None:
        self._reader = reader
        self._output = output
        self._pools: dict[str, ConnectionPool] = {}
        self._num_tokens = 0
        self._num_requests = 0

    async def run(self) -> None:
        """Returns at the end of stdin; whatever runs then is dropped."""
        while True:
            job = await messages.receive(self._reader, messages.to_worker)
            if not isinstance(job, Job):
                raise TypeError(f"expected a job, got {job}")
            self._send(Ready())
            start = await messages.receive(self._reader, messages.to_worker)
            if not isinstance(start, Start):
                raise TypeError(f"expected the start, got {start}")
            await self._work(job, start.time)

    async def _work(self, job: Job, start: float) -> None:
        """Do the job. When progress can no longer be told, the command is gone and nobody wants the samples."""
        self._num_tokens = self._num_requests = 0
        async with asyncio.TaskGroup() as group:
            progress = group.create_task(self._report_progress())
            samples = await self._send_all(job, start)
            progress.cancel()
        self._send(Progress(self._num_requests, self._num_tokens))
        self._send(Result(samples))

    async def _send_all(self, job: Job, start: float) -> list[Sample]:
        pool = self._pools.setdefault(job.url, ConnectionPool(Address.of(job.url)))
        client = Client(pool, ENDPOINTS[job.endpoint], job.timeout, self._on_tokens)
        places = asyncio.Semaphore(job.max_concurrency)
        tasks = []

        async def one(payload: bytes) -> Sample:
            try:
                return await client.measure(payload)
            finally:
                self._num_requests += 1
                places.release()

        for payload, offset in zip(job.payloads, job.offsets, strict=True):
            if (delay := start + offset - time.monotonic()) > 0:
                await asyncio.sleep(delay)
            await places.acquire()
            tasks.append(asyncio.create_task(one(payload)))
        return await asyncio.gather(*tasks)

    def _on_tokens(self, count: int) -> None:
        self._num_tokens += count

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            self._send(Progress(self._num_requests, self._num_tokens))

    def _send(self, message: messages.Message) -> None:
        data = memoryview(frame(message))
        while data:
            data = data[os.write(self._output, data) :]


async def _main() -> None:
    loop = asyncio.get_running_loop()
    reader = StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    try:
        await Worker(reader, sys.stdout.fileno()).run()
    except* (asyncio.IncompleteReadError, BrokenPipeError):
        pass  # the command has gone: so do we


def main() -> None:
    """Run to the end of stdin."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main())


if __name__ == "__main__":
    main()
