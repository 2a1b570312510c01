"""The frontend's line to the engine core: sockets, handshake, order of messages, and whether anybody is there.

frontend                          engine core
HELLO, HELLO, … (until answered) ─▶
                                 ◀─ READY       epoch and sequence number to count from
PING every second ───────────────▶              renews the lease of this frontend's requests
                                 ◀─ OUTPUTS, STATS, …   silence for `timeout` seconds: the engine is gone
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from minivllm import protocol, transport
from minivllm.errors import ProtocolError
from minivllm.protocol import Dead, EngineFacts, EngineMessage, EngineStats, Error, Outputs, Ready, Stats
from minivllm.transport import Endpoints

logger = logging.getLogger(__name__)

HELLO_INTERVAL = 0.1
MAX_FAILED_PINGS = 2  # one may fall into a reconnection


class LinkListener(Protocol):
    """What the owner of a link is told."""

    def on_outputs(self, message: Outputs) -> None: ...

    def on_refused(self, message: Error) -> None: ...

    def on_gap(self, num_lost: int) -> None: ...

    def on_engine_gone(self, reason: str) -> None: ...

    def on_tick(self, now: float) -> None: ...


class EngineLink:
    """Create and use it on one event loop. Times in seconds on `time.monotonic`.

    facts: set while the engine core is ready. gone_reason: set after it was lost, until it is ready again.
    stats: what the engine core last said of itself, at stats_time.
    """

    def __init__(
        self, endpoints: Endpoints, listener: LinkListener, ping_interval: float = 1.0, timeout: float = 30.0
    ) -> None:
        self._listener = listener
        self._ping_interval = ping_interval
        self._timeout = timeout
        self._frontend_id = secrets.token_bytes(protocol.FRONTEND_ID_BYTES)
        self._context: zmq.Context[Any] = zmq.Context()
        self._input = transport.frontend_input(self._context, endpoints, self._frontend_id)
        self._output = transport.frontend_output(self._context, endpoints)
        self._num_sent = 0
        self._epoch: int | None = None
        self._next_seq = 0
        self._last_heard = 0.0
        self._num_failed_pings = 0
        self._task: asyncio.Task[None] | None = None
        self.facts: EngineFacts | None = None
        self.stats = EngineStats()
        self.stats_time = -math.inf
        self.num_restarts = 0
        self.gone_reason: str | None = None

    def start(self) -> None:
        """Begin to read and to look for the engine core."""
        asyncio.get_running_loop().add_reader(self._input.getsockopt(zmq.FD), self._drain)
        self._task = asyncio.create_task(self._beat())

    async def close(self) -> None:
        """Stop. What was sent last (aborts, mostly) gets a moment to leave."""
        asyncio.get_running_loop().remove_reader(self._input.getsockopt(zmq.FD))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._input.close(linger=0)
        self._output.close(linger=200)
        self._context.term()

    def send(self, make_message: Callable[[bytes, int], protocol.Message]) -> bool:
        """Send what `make_message(frontend_id, seq)` returns. False when no engine core is connected."""
        try:
            self._output.send(protocol.encode(make_message(self._frontend_id, self._num_sent)), zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._num_sent += 1
        return True

    def lose(self, reason: str) -> None:
        """Give the engine core up, and look for another. Does nothing while there is none."""
        if self.facts is None:
            return
        logger.error("%s", reason)
        self.facts = None
        self._epoch = None
        # Subscribe anew: an engine core that gave this frontend up forgot its subscription.
        self._input.unsubscribe(self._frontend_id)
        self._input.subscribe(self._frontend_id)
        self.gone_reason = reason
        self._listener.on_engine_gone(reason)

    async def _beat(self) -> None:
        while True:
            # ZeroMQ's descriptor signals changes, not state: look once a beat, so that a missed edge cannot stall.
            self._drain()
            if self.facts is None:
                self.send(protocol.Hello)
            else:
                self._ping()
            self._listener.on_tick(time.monotonic())
            await asyncio.sleep(self._ping_interval if self.facts else HELLO_INTERVAL)

    def _ping(self) -> None:
        self._num_failed_pings = 0 if self.send(protocol.Ping) else self._num_failed_pings + 1
        silence = time.monotonic() - self._last_heard
        if self._num_failed_pings >= MAX_FAILED_PINGS:
            self.lose("the engine core closed its sockets")
        elif silence > self._timeout:
            self.lose(f"the engine core has been silent for {silence:.1f} s")

    def _drain(self) -> None:
        """Handle every message that is there: one wake-up, many messages."""
        while True:
            try:
                frames = self._input.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = protocol.decode_from_engine(frames[-1])
            except ProtocolError as error:
                logger.error("dropped a frame of %d bytes from the engine core: %s", len(frames[-1]), error)
                continue
            if self._is_next(message):
                self._last_heard = time.monotonic()
                self._handle(message)

    def _is_next(self, message: EngineMessage) -> bool:
        """False for a message of another epoch or one seen before; a gap is reported and then stepped over."""
        if message.epoch != self._epoch:
            if not isinstance(message, Ready) or (self._epoch is not None and message.epoch < self._epoch):
                return False
            if self._epoch is not None:
                self.lose("the engine core was restarted")
            self._epoch, self._next_seq = message.epoch, message.seq
        if message.seq < self._next_seq:
            return False
        num_lost, self._next_seq = message.seq - self._next_seq, message.seq + 1
        if num_lost:
            logger.error("lost %d messages from the engine core", num_lost)
            self._listener.on_gap(num_lost)
        return True

    def _handle(self, message: EngineMessage) -> None:
        match message:
            case Outputs():
                self._listener.on_outputs(message)
            case Stats():
                self.stats, self.stats_time = message.stats, time.monotonic()
            case Error():
                self._listener.on_refused(message)
            case Ready():
                self._on_ready(message)
            case Dead():
                self.lose(f"the engine core stopped: {message.reason}")

    def _on_ready(self, message: Ready) -> None:
        if self.facts is None:
            facts = message.facts
            logger.info("engine core ready: %s, %s, context of %d", facts.model, facts.device, facts.max_model_len)
            self.num_restarts += self.gone_reason is not None
            self.gone_reason = None
            self._num_failed_pings = 0
        self.facts = message.facts
