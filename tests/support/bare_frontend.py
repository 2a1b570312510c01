"""A frontend without HTTP, which speaks to an engine core over real sockets. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import zmq

from minivllm import transport
from minivllm.channel import Channel
from minivllm.protocol import (
    Abort,
    Add,
    EngineMessage,
    Error,
    Hello,
    Message,
    Outputs,
    Ping,
    Ready,
    Released,
    Stats,
    decode_from_engine,
    encode,
)
from minivllm.sampling_params import SamplingParams

WAIT_MS = 20_000


class Frontend:
    """One frontend: checks that each message is addressed to it, of one epoch, and none is lost."""

    def __init__(self, endpoints: transport.Endpoints, frontend_id: bytes, subscribe: bool = True) -> None:
        self.frontend_id = frontend_id
        self._endpoints = endpoints
        self._context: zmq.Context[Any] = zmq.Context()
        self._output = transport.frontend_output(self._context, endpoints)
        self._input: Any = None
        self.channel: Channel[Outputs | Error | Released] = Channel()
        self.epoch: int | None = None
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        if subscribe:
            self.subscribe()

    def subscribe(self) -> None:
        self._input = transport.frontend_input(self._context, self._endpoints, self.frontend_id)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def send_frame(self, frame: bytes | bytearray) -> None:
        """Any bytes, as soon as the engine core is connected."""
        self.send_frames([frame])

    def send_frames(self, frames: Sequence[bytes | bytearray]) -> None:
        """Any bytes, as the frames of one ZeroMQ message."""
        assert self._output.poll(WAIT_MS, zmq.POLLOUT), "the engine core does not listen"
        self._output.send_multipart(frames, zmq.NOBLOCK)

    def send(self, make: Callable[[bytes, int], Message]) -> None:
        """A numbered message."""
        self.send_frame(self.channel.send(lambda seq: make(self.frontend_id, seq)))

    def hello(self) -> None:
        self.send_frame(encode(Hello(self.frontend_id)))

    def ping(self) -> None:
        self.send_frame(encode(Ping(self.frontend_id, self.channel.state)))

    def add(
        self, request_id: str, prompt: list[int], params: SamplingParams, output_token_ids: list[int] | None = None
    ) -> None:
        output = list(output_token_ids or [])
        self.send(lambda frontend_id, seq: Add(frontend_id, seq, request_id, prompt, params, output))

    def abort(self, *request_ids: str) -> None:
        self.send(lambda frontend_id, seq: Abort(frontend_id, seq, list(request_ids)))

    def receive(self, timeout_ms: int = WAIT_MS) -> EngineMessage | None:
        """The next message, or None when none comes."""
        if not self._input.poll(timeout_ms):
            return None
        topic, frame = self._input.recv_multipart()
        assert topic == self.frontend_id
        message = decode_from_engine(frame)
        if isinstance(message, Outputs | Error | Released):
            assert self.channel.receive(message.seq, message) == [message], "a message was lost"
        self.epoch = self.epoch or message.epoch
        assert message.epoch == self.epoch
        if isinstance(message, Outputs):
            self._note(message)
        return message

    def wait_for(self, condition: Callable[[EngineMessage], bool], keep_alive: bool = False) -> EngineMessage:
        """The first message that meets `condition`."""
        while (message := self.receive()) is not None:
            if condition(message):
                return message
            if keep_alive and isinstance(message, Stats):
                self.ping()
        raise AssertionError(f"frontend {self.frontend_id!r} waited {WAIT_MS} ms in vain")

    def wait_ready(self) -> Ready:
        message = self.wait_for(lambda message: isinstance(message, Ready))
        assert isinstance(message, Ready)
        return message

    def wait_finished(self, *request_ids: str) -> None:
        self.wait_for(lambda _: set(request_ids) <= self.reasons.keys())

    def wait_token(self, request_id: str) -> None:
        self.wait_for(lambda _: bool(self.tokens.get(request_id)))

    def _note(self, message: Outputs) -> None:
        start = 0
        for request_id, count in zip(message.request_ids, message.counts, strict=True):
            assert request_id not in self.reasons, f"{request_id} speaks after its end"
            self.tokens.setdefault(request_id, []).extend(message.token_ids[start : start + count])
            start += count
        self.reasons |= {request_id: finished.reason for request_id, finished in message.finished.items()}


@contextmanager
def connected(endpoints: transport.Endpoints, *frontend_ids: bytes) -> Iterator[list[Frontend]]:
    """Frontends of a serving engine that have received READY."""
    frontends = [Frontend(endpoints, frontend_id) for frontend_id in frontend_ids]
    try:
        for frontend in frontends:
            frontend.hello()
            frontend.wait_ready()
        yield frontends
    finally:
        for frontend in frontends:
            frontend.close()
