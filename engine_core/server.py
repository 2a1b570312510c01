"""The engine core's sockets: requests in, tokens out, and who is still listening. No scheduling here.

    loop   drain inbox ─▶ drain subscriptions ─▶ expired leases, heartbeat ─▶ one engine step ─▶ publish

A frontend is served once it has said Hello and its subscription is seen; it is gone when its subscription ends (the
kernel tells within milliseconds of a kill), and its requests are aborted. When nothing was heard of it for a lease, its
requests are released: freed, and it is told so, should it wake up and want them back.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import zmq

from engine_core.engine import EngineCore, RequestOutput
from engine_core.state_dump import describe
from engine_core.stats import StatsLine
from engine_core.watching import Watching
from minivllm import transport
from minivllm.channel import Channel
from minivllm.errors import InvalidRequestError, ProtocolError
from minivllm.faults import NO_FAULTS, Faults
from minivllm.protocol import (
    FRONTEND_ID_BYTES,
    Abort,
    Add,
    Dead,
    EngineFacts,
    EngineStats,
    Error,
    Explain,
    Finished,
    FrontendMessage,
    Hello,
    Message,
    Outputs,
    Ping,
    Ready,
    Released,
    Stats,
    Watch,
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
    """What the engine core knows of one session of a frontend."""

    last_heard: float
    greeted: bool = False
    subscribed: bool = False
    channel: Channel[Add | Abort] = field(default_factory=Channel)
    request_ids: set[str] = field(default_factory=set)


class EngineServer:
    """Serves an `EngineCore` to any number of frontends. `bind` first, load the model, then `run`."""

    def __init__(
        self,
        endpoints: transport.Endpoints,
        lease_seconds: float = LEASE_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stats_line: StatsLine | None = None,
        on_heartbeat: Callable[[], None] = lambda: None,
        check_integrity: bool = False,
        faults: Faults = NO_FAULTS,
    ) -> None:
        """`on_heartbeat` is called by `run` between steps; `check_integrity`: with each heartbeat."""
        self._endpoints = endpoints
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._stats_line = stats_line
        self._on_heartbeat = on_heartbeat
        self._check_integrity = check_integrity
        self._faults = faults
        self._context = zmq.Context()
        self._epoch = time.time_ns()
        self._frontends: dict[bytes, _Frontend] = {}
        self._owners: dict[str, bytes] = {}  # request id → frontend id
        self._watching = Watching(self._epoch, self._say)
        self._stop = threading.Event()
        self._dump_wanted = threading.Event()

    def bind(self) -> None:
        """Open both sockets, so that frontends can connect and say Hello while the model is loading."""
        self._inbox = transport.engine_input(self._context, self._endpoints)
        self._outbox = transport.engine_output(self._context, self._endpoints)
        self._send_frames = self._faults.disturb_sends(lambda frames: self._outbox.send_multipart(frames, copy=False))

    def stop(self) -> None:
        """Ask `run` to end after the current step. Callable from a signal handler or another thread."""
        self._stop.set()

    def dump_state(self) -> None:
        """Ask `run` to log what it is doing after the current step. Callable like `stop`."""
        self._dump_wanted.set()

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
                if self._dump_wanted.is_set():
                    self._dump_wanted.clear()
                    self._log_state()
                now = time.monotonic()
                if now >= next_heartbeat:  # before the step: what was said during a long one has just been heard
                    next_heartbeat = now + self._heartbeat_seconds
                    self._on_heartbeat()
                    self._expire_leases(now)
                    self._publish_stats()
                if engine.has_work:
                    self._publish_outputs(engine.step())
                self._watching.publish(engine)
        except BaseException as error:
            self.close(f"the engine core failed: {type(error).__name__}: {error}")
            raise
        self.close("the engine core was stopped")

    def close(self, reason: str) -> None:
        """Say farewell to every frontend and remove the sockets. Safe to repeat."""
        for frontend_id in list(self._frontends):
            self._say(frontend_id, Dead(self._epoch, reason))
        if not self._context.closed:
            self._context.destroy(linger=_FAREWELL_MS)
        self._endpoints.unlink()

    def _drain_inbox(self) -> None:
        for _ in range(_MAX_MESSAGES_PER_STEP):
            try:
                frames = self._inbox.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if len(frames) != 1:
                logger.warning("dropped a message of %d frames: one is a message", len(frames))
                continue
            try:
                self._handle(decode_from_frontend(frames[0].buffer))
            except ProtocolError as error:
                logger.warning("dropped a frame of %d bytes: %s", len(frames[0].buffer), error)

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
        frontend_id = message.frontend_id
        frontend = self._frontend(frontend_id)
        frontend.last_heard = time.monotonic()
        if isinstance(message, Hello):
            frontend.greeted = True
            self._send_ready(frontend_id)
        elif not frontend.greeted:  # it speaks to an engine core that is no more, or that has forgotten it
            self._say(frontend_id, Dead(self._epoch, "the engine core does not know this session"))
        elif isinstance(message, Watch | Explain):
            self._watching.handle(message, self._engine)
        elif isinstance(message, Ping):
            for frame in frontend.channel.update(message.channel):
                self._publish(frontend_id, frame)
        else:
            for next_message in frontend.channel.receive(message.seq, message):
                self._obey(next_message, frontend)
        if frontend.channel.notices_gap():
            logger.warning("frontend %s: %d messages are missing", frontend_id.hex(), frontend.channel.num_missing)
            self._send_stats(frontend_id, self._engine.stats())

    def _obey(self, message: Add | Abort, frontend: _Frontend) -> None:
        if isinstance(message, Add):
            self._add(message, frontend)
        else:
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
        if self._check_integrity:
            stats.integrity = self._integrity()
        now = time.monotonic()
        if self._stats_line is not None:
            self._stats_line.update(stats, now)
        for frontend_id, frontend in self._frontends.items():
            if frontend.greeted and not self._has_lapsed(frontend, now):  # else messages would pile up here
                self._send_stats(frontend_id, stats)

    def _integrity(self) -> str:
        try:
            self._engine.check_integrity()
        except ValueError as error:
            logger.error("the engine core is inconsistent: %s", error)
            return str(error)
        return "ok"

    def _log_state(self) -> None:
        now = time.monotonic()
        for frontend_id, frontend in self._frontends.items():
            logger.info(
                "frontend %s: heard %.1f s ago, %d requests, %s",
                frontend_id.hex(), now - frontend.last_heard, len(frontend.request_ids), frontend.channel.state,
            )  # fmt: skip
        for line in describe(self._engine.scheduler, self._engine.kv):
            logger.info(line)

    def _send_stats(self, frontend_id: bytes, stats: EngineStats) -> None:
        self._say(frontend_id, Stats(self._epoch, self._frontends[frontend_id].channel.state, stats))

    def _send_ready(self, frontend_id: bytes) -> None:
        if self._frontends[frontend_id].greeted:
            self._say(frontend_id, Ready(self._epoch, self._facts))

    def _send(self, frontend_id: bytes, make: Callable[[int], Message]) -> None:
        """Publish the numbered message `make(seq)` to one frontend; it will arrive unless the session ends."""
        frontend = self._frontends.get(frontend_id)
        if frontend is not None and frontend.greeted:
            self._publish(frontend_id, frontend.channel.send(make))

    def _say(self, frontend_id: bytes, message: Message) -> None:
        """Publish a message that may get lost."""
        self._publish(frontend_id, encode(message))

    def _publish(self, frontend_id: bytes, frame: bytearray) -> None:
        frontend = self._frontends.get(frontend_id)
        if frontend is not None and frontend.subscribed and not self._context.closed:
            self._send_frames((frontend_id, frame))

    def _frontend(self, frontend_id: bytes) -> _Frontend:
        frontend = self._frontends.get(frontend_id)
        if frontend is None:
            frontend = self._frontends[frontend_id] = _Frontend(time.monotonic())
        return frontend

    def _expire_leases(self, now: float) -> None:
        """Free what a silent frontend asked for. When it wakes up, it reads so after all tokens that came before."""
        lapsed = [item for item in self._frontends.items() if self._has_lapsed(item[1], now)]
        for frontend_id, frontend in lapsed:
            if not frontend.subscribed:
                self._forget(frontend_id)
            elif frontend.request_ids:
                self._release(frontend_id, list(frontend.request_ids))

    def _release(self, frontend_id: bytes, request_ids: list[str]) -> None:
        logger.warning(
            "frontend %s: nothing heard for %g s, %d requests are released",
            frontend_id.hex(), self._lease_seconds, len(request_ids),
        )  # fmt: skip
        self._engine.abort(request_ids)
        self._forget_requests(frontend_id, request_ids)
        self._send(frontend_id, lambda seq: Released(self._epoch, seq, request_ids))

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
