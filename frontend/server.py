"""The life of a frontend process: start, serve, drain on SIGTERM, leave.

SIGTERM ─▶ admit nothing ─▶ running streams finish, up to shutdown_timeout ─▶ abort the rest ─▶ exit 0
second signal, or the launcher's death ─▶ abort all ─▶ exit
retire (a successor listens on the same socket) ─▶ accept no more ─▶ running streams finish ─▶ exit
"""

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn

from frontend.app import make_app
from frontend.connection_limits import guarded_protocol
from frontend.debug import log_state
from frontend.descriptors import connections_that_fit
from frontend.engine_client import EngineClient
from frontend.engine_metrics import EngineCollector, ProcessUsage
from frontend.metrics import ENGINE, FrontendMetrics
from frontend.tokenizer import Tokenizer
from frontend.trace_file import TraceFile
from minivllm.config import ServeConfig
from minivllm.control import ControlChannel
from minivllm.diagnostics import dump_stacks_on_signal
from minivllm.listener import public_url
from minivllm.transport import Endpoints

logger = logging.getLogger(__name__)

_LAST_WRITES_SECONDS = 5  # for clients to take the end of their stream
_LAST_REQUESTS_SECONDS = 1  # for requests on connections that were accepted just before retiring
_KEEP_ALIVE_SECONDS = 30


class Frontend:
    """One frontend process around one listening socket. `run` returns when it has shut down.

    is_successor: another process serves that socket, so listen only once the engine core is there.
    """

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Tokenizer,
        endpoints: Endpoints,
        listener: socket.socket,
        control: ControlChannel,
        is_successor: bool = False,
        engine_timeout: float | None = None,
        stream_ping_interval: float = 5.0,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._endpoints = endpoints
        self._listener = listener
        self._control = control
        self._is_successor = is_successor
        self._engine_timeout = engine_timeout or config.silence_timeout
        self._stream_ping_interval = stream_ping_interval
        self._collector = EngineCollector((config.served_model_name or config.model, ENGINE))
        self._shutdown: asyncio.Task[None] | None = None
        self._retirement: asyncio.Task[None] | None = None
        self._engine_wait: asyncio.Task[bool] | None = None

    async def run(self) -> None:
        """Serve until a signal, `stop`, or the launcher's death."""
        self._loop = asyncio.get_running_loop()
        metrics = FrontendMetrics(self._config.served_model_name or self._config.model, self._collector)
        self._engine = EngineClient(
            self._endpoints,
            self._tokenizer,
            metrics,
            self._config.max_num_queued_reqs,
            ping_interval=self._config.heartbeat_seconds,
            engine_timeout=self._engine_timeout,
            stream_ping_interval=self._stream_ping_interval,
            resume_timeout=self._config.resume_timeout,
            faults=self._config.faults,
        )
        self._collector.stats = lambda: self._engine.link.stats
        self._collector.stats_age = lambda: time.monotonic() - self._engine.link.stats_time
        self._collector.num_restarts = lambda: self._engine.link.num_restarts
        app = make_app(self._config, self._engine, self._tokenizer, metrics)
        self._server = _Server(_uvicorn_config(app, self._config), self._on_listening)
        self._install_signal_handlers()
        self._control.watch(self._on_control_message, lambda: self._call(self.stop_now))
        self._engine.link.start()
        trace_file = TraceFile.of(self._config, self._engine)
        trace_file.start()
        try:
            if self._is_successor:
                await self._until_engine_ready()
            await self._server.serve(sockets=[self._listener])
        finally:
            self._engine.abort_all()
            await trace_file.stop()
            await self._engine.link.close()

    def stop(self) -> None:
        """Drain, then leave; called again, leave at once."""
        if self._shutdown is None:
            self._shutdown = self._loop.create_task(self._drain())
        else:
            self.stop_now()

    def retire(self) -> None:
        """Leave to another process that listens on the same socket."""
        self._retirement = self._loop.create_task(self._retire())

    def stop_now(self) -> None:
        """Abort everything and leave."""
        self._engine.drain()
        self._engine.abort_all()
        self._server.force_exit = True
        self._leave()

    async def _until_engine_ready(self) -> None:
        """What it would have to refuse goes to its predecessor, which listens as long as this process does not."""
        self._engine_wait = self._loop.create_task(self._engine.link.is_ready.wait())
        await asyncio.wait([self._engine_wait])

    async def _retire(self) -> None:
        """Accept no more, but refuse nothing that comes over connections that are open; then finish what runs."""
        for server in self._server.servers:
            server.close()
        logger.info("retiring: %d requests are unfinished", self._engine.num_unfinished)
        await asyncio.sleep(_LAST_REQUESTS_SECONDS)
        self._server.config.timeout_graceful_shutdown = None  # streams are ended here
        self._server.should_exit = True
        if not await self._engine.wait_until_idle(self._config.shutdown_timeout):
            self._engine.abort_all()

    async def _drain(self) -> None:
        self._engine.drain()
        logger.info("shutting down: %d requests are unfinished", self._engine.num_unfinished)
        if not await self._engine.wait_until_idle(self._config.shutdown_timeout):
            logger.warning("aborting %d requests", self._engine.num_unfinished)
            self._engine.abort_all()
        self._leave()

    def _leave(self) -> None:
        self._server.should_exit = True
        if self._engine_wait is not None:
            self._engine_wait.cancel()

    def _on_listening(self) -> None:
        url = public_url(self._config, self._listener)
        logger.info("listening on %s", url)
        self._control.report("ready", url=url)

    def _install_signal_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signal_number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(signal_number, self.stop)
            dump_stacks_on_signal(lambda: self._call(lambda: log_state(self._engine)))

    def _on_control_message(self, message: dict[str, Any]) -> None:
        """In the control channel's thread: a line of the launcher."""
        if message.get("retire"):
            self._call(self.retire)
        if "engine_gone" in message:
            self._call(lambda: self._engine.link.lose(message["engine_gone"], message.get("pid")))
        if "engine_lost" in message:
            self._call(lambda: self._engine.give_up(message["engine_lost"]))
        if "processes" in message:
            self._collector.processes = [
                ProcessUsage(process["name"], process["rss"], process["cpu_seconds"])
                for process in message["processes"]
            ]

    def _call(self, action: Any) -> None:
        """Run `action` on the event loop, from another thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)


class _Server(uvicorn.Server):
    """uvicorn, telling when it listens and leaving signals to `Frontend`."""

    def __init__(self, config: uvicorn.Config, on_listening: Any) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _uvicorn_config(app: Any, config: ServeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=guarded_protocol(config.request_timeout, connections_that_fit(config.limit_concurrency)),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks for the client's address
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_WRITES_SECONDS,
    )
