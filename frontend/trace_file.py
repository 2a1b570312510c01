"""--trace-file: one more watcher, which writes what it sees as it comes."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import msgspec

from frontend.engine_client import EngineClient
from frontend.trace import Event, TraceBuilder
from minivllm.config import ServeConfig

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.5
_encoder = msgspec.json.Encoder()


class TraceFile:
    """Writes events into `path` until `stop`. A file that was cut off (a crash) still opens: the format allows it."""

    def __init__(self, engine: EngineClient, path: Path | None) -> None:
        self._engine = engine
        self._path = path
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, config: ServeConfig, engine: EngineClient) -> Self:
        """Several frontends write a file each: FILE-<pid>."""
        path = config.trace_file
        if path is not None and (config.api_server_count or 1) > 1:
            path = path.with_stem(f"{path.stem}-{os.getpid()}")
        return cls(engine, path)

    def start(self) -> None:
        """Watch from now on, on the running event loop. Does nothing without a path."""
        if self._path is not None:
            self._task = asyncio.create_task(self._run(self._path))

    async def stop(self) -> None:
        """Write what came last and close the file."""
        self._stopping = True
        if self._task is not None:
            await self._task

    async def _run(self, path: Path) -> None:
        try:
            with path.open("wb") as file:
                file.write(b"[\n")
                async for events in self._events():
                    for event in events:
                        file.write((b"" if file.tell() == 2 else b",\n") + _encoder.encode(event))
                    file.flush()
                file.write(b"\n]\n")
        except OSError as error:
            logger.error("--trace-file %s: %s; no trace is written any more", path, error)

    async def _events(self) -> AsyncIterator[list[Event]]:
        """As they come; a new life of the engine core begins new tracks."""
        builder: TraceBuilder | None = None
        epoch = 0
        with self._engine.watch.watch() as watcher:
            while not self._stopping:
                message, facts = await watcher.get(_WAIT_SECONDS), self._engine.link.facts
                if message is None or facts is None:
                    continue
                if builder is None or message.epoch != epoch:
                    if builder is not None:
                        yield builder.finish()
                    builder, epoch = TraceBuilder(facts), message.epoch
                    yield builder.start()
                yield builder.add(message, watcher.spans)
        if builder is not None:
            yield builder.finish()
