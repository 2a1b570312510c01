"""`python -m minivllm.bench.frontend.stub_engine`: an engine core without a model, as fast as it is told to be.

It waits until a number of requests has come, then gives each of them one random token per step, at a fixed pace: what
is measured is the way of the tokens through a frontend. Everything else of the protocol is as it should be.
"""

import argparse
import random
import signal
import time
from pathlib import Path
from typing import Any

import zmq
from msgspec import Struct

from minivllm import transport
from minivllm.channel import Channel
from minivllm.protocol import (
    FRONTEND_ID_BYTES,
    Abort,
    Add,
    EngineFacts,
    EngineStats,
    Finished,
    FrontendMessage,
    Hello,
    Message,
    Outputs,
    Ping,
    Ready,
    Stats,
    decode_from_frontend,
    encode,
)
from minivllm.transport import Endpoints

_HEARTBEAT_SECONDS = 1.0
_POOL_SIZE = 100_000  # random tokens, drawn before the clock starts


class _Request(Struct):
    owner: bytes
    num_left: int


class StubEngine:
    """tokens_per_second: of all requests together. num_held: requests that must have come before the first step."""

    def __init__(self, endpoints: Endpoints, vocab_size: int, tokens_per_second: float, num_held: int) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._input = transport.engine_input(self._context, endpoints)
        self._output = transport.engine_output(self._context, endpoints)
        self._facts = EngineFacts(1, "stub", "cpu", "float32", vocab_size, 1 << 20, 4096, 16, 1 << 20, 1, 1, [])
        self._tokens_per_second = tokens_per_second
        self._num_held = num_held
        self._epoch = time.time_ns()
        self._requests: dict[str, _Request] = {}
        self._channels: dict[bytes, Channel[Add | Abort]] = {}
        self._stats = EngineStats()
        self._tokens = random.Random(0).choices(range(vocab_size), k=_POOL_SIZE)
        self._is_running = False

    def run(self) -> None:
        """Serve for ever."""
        next_step = next_beat = time.monotonic()
        while True:
            now = time.monotonic()
            wait = next_step - now if self._is_running else next_beat - now
            if wait > 0:
                self._input.poll(wait * 1000)
            self._receive()
            now = time.monotonic()
            if self._is_running and now >= next_step:
                # Behind its pace it does not hurry: that would hand over several tokens at a time.
                next_step = max(now, next_step + len(self._requests) / self._tokens_per_second)
                self._step()
            if now >= next_beat:
                next_beat = now + _HEARTBEAT_SECONDS
                for frontend_id, channel in self._channels.items():
                    self._publish(frontend_id, encode(Stats(self._epoch, channel.state, self._stats)))

    def _receive(self) -> None:
        try:
            while True:
                self._handle(decode_from_frontend(self._input.recv(zmq.NOBLOCK)))
        except zmq.Again:
            pass
        while self._output.poll(0):
            frame = self._output.recv()
            if frame[0] == 1 and len(frame) == FRONTEND_ID_BYTES + 1:
                self._channels.setdefault(frame[1:], Channel())

    def _handle(self, message: FrontendMessage) -> None:
        channel = self._channels.get(message.frontend_id)
        match message:
            case Hello(frontend_id) if channel is not None:
                self._publish(frontend_id, encode(Ready(self._epoch, self._facts)))
            case Ping(frontend_id, state) if channel is not None:
                for frame in channel.update(state):
                    self._publish(frontend_id, frame)
            case Add() | Abort() if channel is not None:
                for next_message in channel.receive(message.seq, message):
                    self._obey(next_message)

    def _obey(self, message: Add | Abort) -> None:
        if isinstance(message, Add):
            self._requests[message.request_id] = _Request(message.frontend_id, message.params.max_tokens or 1)
            self._is_running = self._is_running or len(self._requests) >= self._num_held
            return
        for request_id in message.request_ids:
            if self._requests.pop(request_id, None):
                self._send_outputs(message.frontend_id, [request_id], [0], [], {request_id: Finished("abort")})

    def _step(self) -> None:
        """One token for every request; one message to every frontend that has one."""
        owned: dict[bytes, list[str]] = {}
        finished: dict[str, Finished] = {}
        for request_id, request in self._requests.items():
            owned.setdefault(request.owner, []).append(request_id)
            request.num_left -= 1
            if not request.num_left:
                finished[request_id] = Finished("length", None, 0, 0.01, 0.02, 0.03)
        for owner, request_ids in owned.items():
            count = len(request_ids)
            start = random.randrange(_POOL_SIZE - count)
            ended = {request_id: finished[request_id] for request_id in request_ids if request_id in finished}
            self._send_outputs(owner, request_ids, [1] * count, self._tokens[start : start + count], ended)
        for request_id in finished:
            del self._requests[request_id]
        self._is_running = bool(self._requests)

    def _send_outputs(
        self,
        frontend_id: bytes,
        request_ids: list[str],
        counts: list[int],
        tokens: list[int],
        finished: dict[str, Finished],
    ) -> None:
        def outputs(seq: int) -> Message:
            return Outputs(self._epoch, seq, request_ids, counts, tokens, finished)

        self._publish(frontend_id, self._channels[frontend_id].send(outputs))

    def _publish(self, frontend_id: bytes, frame: bytearray) -> None:
        self._output.send_multipart((frontend_id, frame))


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket_dir", type=Path)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--tokens-per-second", type=float, required=True)
    parser.add_argument("--hold", type=int, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    endpoints = Endpoints.in_directory(options.socket_dir)
    StubEngine(endpoints, options.vocab_size, options.tokens_per_second, options.hold).run()


if __name__ == "__main__":
    main()
