"""The engine core's sockets: requests in, tokens out, and who is still listening. No scheduling here.

    loop   drain inbox ─▶ drain subscriptions ─▶ expired leases, heartbeat ─▶ one engine step ─▶ publish

A frontend is served once it has said Hello and its subscription is seen; it is gone when its subscription ends (the
kernel tells within milliseconds of a kill) or nothing was heard of it for a lease. Its requests are then aborted.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import zmq

from engine_core.engine import EngineCore, RequestOutput
from engine_core.stats import StatsLine
from minivllm import transport
from minivllm.errors import InvalidRequestError, ProtocolError
from minivllm.protocol import (
    FRONTEND_ID_BYTES,
    Abort,
    Add,
    Dead,
    EngineFacts,
    Error,
    Finished,
    FrontendMessage,
    Hello,
    Message,
    Outputs,
    Ready,
    Stats,
    decode_from_frontend,
    encode,
)

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
LEASE_SECONDS = 10.0
_IDLE_POLL_MS = 200  # how soon a stop request is noticed when nothing happens
_MAX_MESSAGES_PER_STEP = 1024
_FAREWELL_MS = 500


@dataclass(slots=True)
class _Frontend:
    """What the engine core knows of one frontend."""

    last_heard: float
    greeted: bool = False
    subscribed: bool = False
    next_seq_in: int = 0
    next_seq_out: int = 0
    request_ids: set[str] = field(default_factory=set)


class EngineServer:
    """Serves an `EngineCore` to any number of frontends. `bind` first, load the model, then `run`."""

    def __init__(
        self,
        endpoints: transport.Endpoints,
        lease_seconds: float = LEASE_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stats_line: StatsLine | None = None,
    ) -> None:
        self._endpoints = endpoints
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._stats_line = stats_line
        self._context = zmq.Context()
        self._epoch = time.time_ns()
        self._frontends: dict[bytes, _Frontend] = {}
        self._owners: dict[str, bytes] = {}  # request id → frontend id
        self._stop = threading.Event()

    def bind(self) -> None:
        """Open both sockets, so that frontends can connect and say Hello while the model is loading."""
        self._inbox = transport.engine_input(self._context, self._endpoints)
        self._outbox = transport.engine_output(self._context, self._endpoints)

    def stop(self) -> None:
        """Ask `run` to end after the current step. Callable from a signal handler or another thread."""
        self._stop.set()

    def run(self, engine: EngineCore, facts: EngineFacts) -> None:
        """Serve until `stop()`. An exception of the engine is announced to the frontends and raised."""
        self._engine, self._facts = engine, facts
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._outbox, zmq.POLLIN)
        next_heartbeat = time.monotonic()
        try:
            while not self._stop.is_set():
                poller.poll(0 if engine.has_work else _IDLE_POLL_MS)
                self._drain_inbox()
                self._drain_subscriptions()
                now = time.monotonic()
                if now >= next_heartbeat:  # before the step: what was said during a long one has just been heard
                    next_heartbeat = now + self._heartbeat_seconds
                    self._expire_leases(now)
                    self._publish_stats()
                if engine.has_work:
                    self._publish_outputs(engine.step())
        except BaseException as error:
            self.close(f"the engine core failed: {type(error).__name__}: {error}")
            raise
        self.close("the engine core was stopped")

    def close(self, reason: str) -> None:
        """Say farewell to every frontend and remove the sockets. Safe to repeat."""
        for frontend_id in list(self._frontends):
            self._send(frontend_id, lambda seq: Dead(self._epoch, seq, reason))
        if not self._context.closed:
            self._context.destroy(linger=_FAREWELL_MS)
        self._endpoints.unlink()

    def _drain_inbox(self) -> None:
        for _ in range(_MAX_MESSAGES_PER_STEP):
            try:
                frame = self._inbox.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._handle(decode_from_frontend(frame.buffer))
            except ProtocolError as error:
                logger.warning("dropped a frame of %d bytes: %s", len(frame.buffer), error)

    def _drain_subscriptions(self) -> None:
        while True:
            try:
                frame = self._outbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frame) != 1 + FRONTEND_ID_BYTES or frame[0] not in (0, 1):
                logger.warning("dropped a subscription of %d bytes: not a frontend id", len(frame))
            elif frame[0] == 1:
                self._frontend(frame[1:]).subscribed = True
                self._send_ready(frame[1:])
            elif frame[1:] in self._frontends:
                self._forget(frame[1:])

    def _handle(self, message: FrontendMessage) -> None:
        frontend = self._frontend(message.frontend_id)
        frontend.last_heard = time.monotonic()
        if isinstance(message, Hello):
            frontend.greeted = True
            frontend.next_seq_in = message.seq
            self._send_ready(message.frontend_id)
        if message.seq != frontend.next_seq_in:
            logger.warning(
                "frontend %s: message %d arrived where %d was due",
                message.frontend_id.hex(),
                message.seq,
                frontend.next_seq_in,
            )
        frontend.next_seq_in = message.seq + 1
        if isinstance(message, Add):
            self._add(message, frontend)
        elif isinstance(message, Abort):
            self._engine.abort(message.request_ids)

    def _add(self, message: Add, frontend: _Frontend) -> None:
        try:
            self._engine.add_request(
                message.request_id, message.prompt_token_ids, message.params, message.output_token_ids
            )
        except InvalidRequestError as error:
            text, param = str(error), error.param
            self._send(
                message.frontend_id,
                lambda seq: Error(self._epoch, seq, message.request_id, "invalid_request", text, param),
            )
            return
        self._owners[message.request_id] = message.frontend_id
        frontend.request_ids.add(message.request_id)

    def _publish_outputs(self, outputs: list[RequestOutput]) -> None:
        """One columnar message per frontend that has something to learn from this step."""
        by_frontend: defaultdict[bytes, list[RequestOutput]] = defaultdict(list)
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is not None:
                by_frontend[owner].append(output)
        for frontend_id, columns in by_frontend.items():
            self._send_outputs(frontend_id, columns)
            self._forget_requests(frontend_id, (output.request_id for output in columns if output.finished))

    def _send_outputs(self, frontend_id: bytes, outputs: list[RequestOutput]) -> None:
        finished: dict[str, Finished] = {o.request_id: o.finished for o in outputs if o.finished is not None}
        self._send(
            frontend_id,
            lambda seq: Outputs(
                self._epoch,
                seq,
                [output.request_id for output in outputs],
                [len(output.token_ids) for output in outputs],
                [token for output in outputs for token in output.token_ids],
                finished,
                {o.request_id: o.logprobs for o in outputs if o.logprobs is not None},
                {o.request_id: o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None},
            ),
        )

    def _publish_stats(self) -> None:
        stats = self._engine.stats()
        now = time.monotonic()
        if self._stats_line is not None:
            self._stats_line.update(stats, now)
        for frontend_id, frontend in self._frontends.items():
            if not self._has_lapsed(frontend, now):  # its messages would pile up here
                self._send(frontend_id, lambda seq: Stats(self._epoch, seq, stats))

    def _send_ready(self, frontend_id: bytes) -> None:
        frontend = self._frontends[frontend_id]
        if frontend.greeted and frontend.subscribed:
            self._send(frontend_id, lambda seq: Ready(self._epoch, seq, self._facts))

    def _send(self, frontend_id: bytes, make: Callable[[int], Message]) -> None:
        """Publish `make(seq)` to one frontend, if it is known and listening."""
        frontend = self._frontends.get(frontend_id)
        if frontend is None or not frontend.subscribed or self._context.closed:
            return
        message = make(frontend.next_seq_out)
        frontend.next_seq_out += 1
        self._outbox.send_multipart((frontend_id, encode(message)), copy=False)

    def _frontend(self, frontend_id: bytes) -> _Frontend:
        frontend = self._frontends.get(frontend_id)
        if frontend is None:
            frontend = self._frontends[frontend_id] = _Frontend(time.monotonic())
        return frontend

    def _expire_leases(self, now: float) -> None:
        """Free what a silent frontend asked for; when it speaks again, it finds the ends of its requests waiting."""
        lapsed = [item for item in self._frontends.items() if self._has_lapsed(item[1], now)]
        for frontend_id, frontend in lapsed:
            if not frontend.subscribed:
                self._forget(frontend_id)
            elif frontend.request_ids:
                logger.warning(
                    "frontend %s: nothing heard for %g s, %d requests aborted",
                    frontend_id.hex(), self._lease_seconds, len(frontend.request_ids),
                )  # fmt: skip
                self._engine.abort(list(frontend.request_ids))

    def _has_lapsed(self, frontend: _Frontend, now: float) -> bool:
        return now - frontend.last_heard > self._lease_seconds

    def _forget(self, frontend_id: bytes) -> None:
        """Free what a departed frontend left behind."""
        request_ids = list(self._frontends[frontend_id].request_ids)
        logger.info("frontend %s is gone: %d requests aborted", frontend_id.hex(), len(request_ids))
        self._engine.abort(request_ids)
        self._forget_requests(frontend_id, request_ids)
        del self._frontends[frontend_id]

    def _forget_requests(self, frontend_id: bytes, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._owners.pop(request_id, None)
            self._frontends[frontend_id].request_ids.discard(request_id)
