"""The frontend's line to the engine core: sockets, sessions, liveness, and messages that arrive once and in order.

frontend                          engine core
HELLO, HELLO, … (until answered) ─▶             a fresh frontend id: a new session
                                 ◀─ READY
PING every second ───────────────▶              renews the lease of this frontend's requests
                                 ◀─ OUTPUTS, STATS, …   silence for `timeout` seconds: the engine is gone

Ping and Stats carry the state of the channel, so that either side sends again what the other one lacks.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq

from minivllm import protocol, transport
from minivllm.channel import Channel
from minivllm.errors import ProtocolError
from minivllm.faults import NO_FAULTS, Faults
from minivllm.protocol import (
    ChannelState,
    Dead,
    EngineFacts,
    EngineMessage,
    EngineStats,
    Error,
    Explained,
    Hello,
    Outputs,
    Ping,
    Ready,
    Released,
    Stats,
    View,
)
from minivllm.transport import Endpoints

logger = logging.getLogger(__name__)

HELLO_INTERVAL = 0.1
MAX_FAILED_PINGS = 2  # one may fall into a reconnection
MAX_MESSAGES_PER_TURN = 16  # then the event loop goes round: clients are written to, however much there is to read


class LinkListener(Protocol):
    """What the owner of a link is told."""

    def on_ready(self) -> None: ...

    def on_outputs(self, message: Outputs) -> None: ...

    def on_refused(self, message: Error) -> None: ...

    def on_released(self, message: Released) -> None: ...

    def on_engine_gone(self, reason: str) -> None: ...

    def on_tick(self, now: float) -> None: ...


class EngineLink:
    """Create and use it on one event loop. Times in seconds on `time.monotonic`.

    facts, is_ready: set while the engine core is ready. gone_reason: set after it was lost, until it is ready again.
    stats: what the engine core last said of itself, at stats_time. on_view: gets the messages that carry no number.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        listener: LinkListener,
        ping_interval: float = 1.0,
        timeout: float = 30.0,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self._listener = listener
        self._ping_interval = ping_interval
        self._timeout = timeout
        self._begin_session()
        self._context: zmq.Context[Any] = zmq.Context()
        self._input = transport.frontend_input(self._context, endpoints, self._frontend_id)
        self._output = transport.frontend_output(self._context, endpoints)
        self._receive_frames = faults.delay_reads(lambda: self._input.recv_multipart(zmq.NOBLOCK))
        self._next_turn: asyncio.Handle | None = None
        self._send_frames = faults.disturb_sends(lambda frames: self._output.send_multipart(frames, zmq.NOBLOCK))
        self._epoch: int | None = None  # of the engine core that was ready last
        self._last_heard = 0.0
        self._num_failed_pings = 0
        self._task: asyncio.Task[None] | None = None
        self.facts: EngineFacts | None = None
        self.is_ready = asyncio.Event()
        self.on_view: Callable[[View | Explained], None] = lambda message: None
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
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._input.close(linger=0)
        self._output.close(linger=200)
        self._context.term()

    def send(self, make_message: Callable[[bytes, int], protocol.Message]) -> bool:
        """Send what `make_message(frontend_id, seq)` returns. True: it arrives, unless this session ends before."""
        if self.facts is None:
            return False
        self._transmit(self._channel.send(lambda seq: make_message(self._frontend_id, seq)))
        return True

    def say(self, make_message: Callable[[bytes], protocol.Message]) -> bool:
        """Send what `make_message(frontend_id)` returns, a message without a number. False when it cannot be sent."""
        return self.facts is not None and self._transmit(protocol.encode(make_message(self._frontend_id)))

    def lose(self, reason: str, pid: int | None = None) -> None:
        """Give the engine core up (only if it is process `pid`, where given), and look for another."""
        if self.facts is None or pid not in (None, self.facts.pid):
            return
        logger.error("%s", reason)
        self.facts = None
        self.is_ready.clear()
        # A new id: what was said in the old session cannot be heard any more, and its requests are freed.
        self._input.unsubscribe(self._frontend_id)
        self._begin_session()
        self._input.subscribe(self._frontend_id)
        self.gone_reason = reason
        self._listener.on_engine_gone(reason)

    def _begin_session(self) -> None:
        self._frontend_id = secrets.token_bytes(protocol.FRONTEND_ID_BYTES)
        self._channel: Channel[Outputs | Error | Released] = Channel()

    def _transmit(self, frame: bytearray) -> bool:
        """False when no engine core is connected."""
        try:
            self._send_frames((frame,))
        except zmq.Again:
            return False
        return True

    @property
    def channel_state(self) -> ChannelState:
        """Of this session, in messages."""
        return self._channel.state

    async def _beat(self) -> None:
        while True:
            # ZeroMQ's descriptor signals changes, not state: look once a beat, so that a missed edge cannot stall.
            self._drain()
            if self.facts is None:
                self._transmit(protocol.encode(Hello(self._frontend_id)))
            else:
                self._check_liveness()
            self._listener.on_tick(time.monotonic())
            await asyncio.sleep(self._ping_interval if self.facts else HELLO_INTERVAL)

    def _ping(self) -> bool:
        return self._transmit(protocol.encode(Ping(self._frontend_id, self._channel.state)))

    def _check_liveness(self) -> None:
        self._num_failed_pings = 0 if self._ping() else self._num_failed_pings + 1
        silence = time.monotonic() - self._last_heard
        if self._num_failed_pings >= MAX_FAILED_PINGS:
            self.lose("the engine core closed its sockets")
        elif silence > self._timeout:
            self.lose(f"the engine core has been silent for {silence:.1f} s")

    def _drain(self) -> None:
        """Handle what is there, in turns: ZeroMQ's descriptor does not tell again of what is left."""
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        for _ in range(MAX_MESSAGES_PER_TURN):
            try:
                frames = self._receive_frames()
            except zmq.Again:
                return
            self._read(frames)
        self._next_turn = asyncio.get_running_loop().call_soon(self._drain)

    def _read(self, frames: Sequence[bytes]) -> None:
        if frames[0] != self._frontend_id:
            return  # of a session that is over
        if len(frames) != 2:
            logger.error("dropped a message of %d frames from the engine core: two are one", len(frames))
            return
        try:
            self._handle(protocol.decode_from_engine(frames[1]))
        except ProtocolError as error:
            logger.error("dropped a frame of %d bytes from the engine core: %s", len(frames[1]), error)

    def _handle(self, message: EngineMessage) -> None:
        if self.facts is not None and self._epoch is not None and message.epoch < self._epoch:
            return  # of an engine core that is gone: an epoch is the time of its start
        self._last_heard = time.monotonic()
        if isinstance(message, Ready):
            self._on_ready(message)
        elif self.facts is None:
            return  # the session has not begun
        elif message.epoch != self._epoch:
            self.lose("the engine core was restarted")
        elif isinstance(message, Stats):
            self.stats, self.stats_time = message.stats, time.monotonic()
            for frame in self._channel.update(message.channel):
                self._transmit(frame)
        elif isinstance(message, View | Explained):
            self.on_view(message)
        elif isinstance(message, Dead):
            self.lose(message.reason)
        else:
            for next_message in self._channel.receive(message.seq, message):
                self._deliver(next_message)
        if self._channel.notices_gap():
            logger.warning("%d messages of the engine core are missing", self._channel.num_missing)
            self._ping()

    def _deliver(self, message: Outputs | Error | Released) -> None:
        match message:
            case Outputs():
                self._listener.on_outputs(message)
            case Error():
                self._listener.on_refused(message)
            case Released():
                self._listener.on_released(message)

    def _on_ready(self, message: Ready) -> None:
        if self.facts is not None:  # the answer to a HELLO repeated
            return
        self.num_restarts += self._epoch not in (None, message.epoch)
        self._epoch, self.facts = message.epoch, message.facts
        self.is_ready.set()
        facts = message.facts
        logger.info("engine core ready: %s, %s, context of %d", facts.model, facts.device, facts.max_model_len)
        self.gone_reason = None
        self._num_failed_pings = 0
        self._listener.on_ready()
