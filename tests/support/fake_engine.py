"""An engine core without a model, over the real sockets: it emits scripted tokens and can misbehave on command.

In a test:                      with FakeEngine(socket_dir) as engine: …; engine.wait_for(lambda: engine.aborted)
For a load test of frontends:   python -m tests.support.fake_engine DIRECTORY [STEP_SECONDS]
"""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import zmq
from msgspec import Struct

from minivllm.channel import Channel
from minivllm.engine_view import EngineView, RequestTimeline
from minivllm.protocol import (
    FRONTEND_ID_BYTES,
    Abort,
    Add,
    Dead,
    EngineFacts,
    EngineStats,
    Error,
    Explain,
    Explained,
    Finished,
    FinishReason,
    FrontendMessage,
    Hello,
    Histogram,
    Logprobs,
    Message,
    Outputs,
    Ping,
    Ready,
    Released,
    Stats,
    View,
    Watch,
    decode_from_frontend,
    encode,
)
from minivllm.transport import Endpoints, engine_input, engine_output, make_socket_dir

HEARTBEAT_SECONDS = 0.2
WAIT_SECONDS = 20.0


class FakeRequest(Struct):
    """A request that runs: what is still to be emitted."""

    owner: bytes
    tokens: list[int]
    reason: FinishReason
    num_emitted: int = 0
    num_logprobs: int | None = None
    prompt_logprobs: Logprobs | None = None


def echo(add: Add) -> list[int]:
    """The default script: the prompt's ids over and over, up to max_tokens."""
    length = add.params.max_tokens or 16
    repeats = -(-length // len(add.prompt_token_ids))
    return (add.prompt_token_ids * repeats)[:length]


def logprobs_of(token_ids: list[int], num_top: int, start: int = 0) -> Logprobs:
    """Even ids are the most probable ones, odd ids come second, as far as `num_top` shows them."""
    columns = Logprobs(start=start)
    for token in token_ids:
        best, second = token - token % 2, token - token % 2 + 1
        ids = [best, second, *range(2, num_top)][:num_top]
        columns.extend(Logprobs([-0.25 - token % 2], ids, [-0.25 - place for place in range(num_top)]))
    return columns


class FakeEngine:
    """Runs in a thread between `start` and `stop`. Public attributes may be changed at any time.

    script: the output of a request; step_seconds: pause between steps; tokens_per_step: for each request.
    holding: requests are admitted but nothing comes; silent: not even heartbeats; refusal: answer to every Add.
    failure: how the first step of every request ends; num_allowed: steps to make before holding (None: no limit).
    lose_next: this many outputs get lost on their way, at first. timelines: answers to Explain.
    adds, aborted, num_pings, num_watches: what was received.
    """

    def __init__(self, socket_dir: Path, vocab_size: int = 1000, max_model_len: int = 256) -> None:
        self.endpoints = Endpoints.in_directory(socket_dir)
        self.facts = EngineFacts(1, "fake", "cpu", "float32", vocab_size, max_model_len, 256, 16, 64, 1, 1, [])
        self.stats = EngineStats(
            num_requests_running=3,
            kv_blocks_used=1,
            kv_blocks_cached=1,
            kv_blocks_free=2,
            prompt_tokens=11,
            histograms={"iteration_tokens": Histogram([1.0, 8.0], [1, 2, 3], 40.0)},
        )
        self.script: Callable[[Add], list[int]] = echo
        self.step_seconds = 0.001
        self.tokens_per_step = 1
        self.holding = False
        self.silent = False
        self.answer_hello = True
        self.refusal: tuple[str, str | None] | None = None
        self.failure: str | None = None
        self.num_allowed: int | None = None
        self.lose_next = 0
        self.epoch = time.time_ns()
        self.adds: dict[str, Add] = {}
        self.aborted: list[str] = []
        self.num_pings = 0
        self.num_watches = 0
        self.timelines: dict[str, RequestTimeline] = {}
        self._requests: dict[str, FakeRequest] = {}
        self._channels: dict[bytes, Channel[Add | Abort]] = {}
        self._greeted: set[bytes] = set()
        self._farewell: str | None = None
        self._releasing = False
        self._raw: list[tuple[bytes, ...]] = []
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """End as a killed engine core would: without a word."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Wait until `condition()` holds; looked at after every step."""
        with self._changed:
            if not self._changed.wait_for(condition, WAIT_SECONDS):
                raise TimeoutError("the fake engine did not see what the test waits for")

    def is_under_way(self) -> bool:
        """Whether some request has got a few tokens."""
        return any(request.num_emitted > 3 for request in self._requests.values())

    def release_all(self) -> None:
        """Before the next step, drop every request as if the lease of its frontend had run out."""
        self._releasing = True

    def say_dead(self, reason: str) -> None:
        """Announce the end at the next step, then keep quiet."""
        self._farewell = reason

    def send_raw(self, *frames: bytes) -> None:
        """Send `frames`, as one message, to every frontend at the next step."""
        self._raw.append(frames)

    def show(self, view: EngineView) -> None:
        """Send `view` to every frontend at the next step, whether it watches or not."""
        self.send_raw(bytes(encode(View(self.epoch, view))))

    def _run(self) -> None:
        with zmq.Context() as context:
            self._input = engine_input(context, self.endpoints)
            self._output = engine_output(context, self.endpoints)
            next_beat = time.monotonic()
            while not self._stop.is_set():
                self._input.poll(self.step_seconds * 1000)
                self._receive()
                self._step()
                if time.monotonic() >= next_beat:
                    next_beat += HEARTBEAT_SECONDS
                    for frontend_id, channel in self._channels.items():
                        self._say(frontend_id, Stats(self.epoch, channel.state, self.stats))
                with self._changed:
                    self._changed.notify_all()
            self._input.close()
            self._output.close()
        self.endpoints.unlink()

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
            elif frame[0] == 0:
                self._channels.pop(frame[1:], None)
                self._requests = {i: r for i, r in self._requests.items() if r.owner != frame[1:]}

    def _handle(self, message: FrontendMessage) -> None:
        channel = self._channels.get(message.frontend_id, Channel())
        match message:
            case Hello():
                if self.answer_hello:
                    self._greeted.add(message.frontend_id)
                    self._say(message.frontend_id, Ready(self.epoch, self.facts))
            case _ if message.frontend_id not in self._greeted:
                self._say(message.frontend_id, Dead(self.epoch, "the engine core does not know this session"))
            case Ping():
                self.num_pings += 1
                for frame in channel.update(message.channel):
                    self._publish(message.frontend_id, frame)
            case Add() | Abort():
                for next_message in channel.receive(message.seq, message):
                    if isinstance(next_message, Add):
                        self._add(next_message)
                    else:
                        self._abort(next_message.request_ids)
            case Watch():
                self.num_watches += 1
            case Explain():
                answer = Explained(self.epoch, message.request_id, self.timelines.get(message.request_id))
                self._say(message.frontend_id, answer)

    def _add(self, add: Add) -> None:
        self.adds[add.request_id] = add
        if self.refusal is not None:
            text, param = self.refusal
            self._send(
                add.frontend_id, lambda seq: Error(self.epoch, seq, add.request_id, "invalid_request", text, param)
            )
            return
        tokens = self.script(add)
        reason: FinishReason = "length" if len(tokens) == add.params.max_tokens else "stop"
        request = FakeRequest(add.frontend_id, tokens, reason, len(add.output_token_ids), add.params.logprobs)
        if add.params.prompt_logprobs is not None and len(add.prompt_token_ids) > 1:
            request.prompt_logprobs = logprobs_of(add.prompt_token_ids[1:], add.params.prompt_logprobs, 1)
        self._requests[add.request_id] = request

    def _abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._emit(request.owner, {request_id: []}, {request_id: Finished("abort")})

    def _step(self) -> None:
        if self._releasing:
            self._releasing = False
            released, self._requests = self._requests, {}
            for request_id, request in released.items():
                self._send(request.owner, lambda seq, ids=[request_id]: Released(self.epoch, seq, ids))  # type: ignore[misc]
        raw, self._raw = self._raw, []
        for frames in raw:
            for frontend_id in self._channels:
                self._output.send_multipart((frontend_id, *frames))
        if self._farewell is not None:
            for frontend_id in self._channels:
                self._say(frontend_id, Dead(self.epoch, self._farewell))
            self.silent = True
        if self.holding or self.silent:
            return
        owners = {request.owner for request in self._requests.values()}
        if owners and self.num_allowed is not None:
            if self.num_allowed == 0:
                return
            self.num_allowed -= 1
        for owner in owners:
            self._step_for(owner)

    def _step_for(self, owner: bytes) -> None:
        outputs: dict[str, list[int]] = {}
        finished: dict[str, Finished] = {}
        logprobs: dict[str, Logprobs] = {}
        of_prompts: dict[str, Logprobs] = {}
        for request_id, request in self._requests.items():
            if request.owner == owner and request.prompt_logprobs is not None:
                # One by one, without a token of output, as a prompt in chunks.
                of_prompts[request_id], rest = request.prompt_logprobs.cut(0, 1), request.prompt_logprobs.cut(1, 999)
                outputs[request_id], request.prompt_logprobs = [], rest if len(rest) else None
            elif request.owner == owner:
                start = request.num_emitted
                outputs[request_id] = request.tokens[start : start + self.tokens_per_step]
                if request.num_logprobs is not None:
                    logprobs[request_id] = logprobs_of(outputs[request_id], request.num_logprobs)
                request.num_emitted = start + len(outputs[request_id])
                if self.failure is not None:
                    outputs[request_id] = []
                    logprobs.pop(request_id, None)
                    finished[request_id] = Finished("error", message=self.failure)
                elif request.num_emitted == len(request.tokens):
                    finished[request_id] = Finished(request.reason, None, 2, 0.01, 0.02, 0.03)
        for request_id in finished:
            del self._requests[request_id]
        self._emit(owner, outputs, finished, logprobs, of_prompts)

    def _emit(
        self,
        owner: bytes,
        outputs: dict[str, list[int]],
        finished: dict[str, Finished],
        logprobs: dict[str, Logprobs] | None = None,
        of_prompts: dict[str, Logprobs] | None = None,
    ) -> None:
        flat = [token for tokens in outputs.values() for token in tokens]
        counts = [len(tokens) for tokens in outputs.values()]
        self._send(
            owner,
            lambda seq: Outputs(
                self.epoch, seq, list(outputs), counts, flat, finished, logprobs or {}, of_prompts or {}
            ),
        )

    def _send(self, frontend_id: bytes, make: Callable[[int], Message]) -> None:
        channel = self._channels.get(frontend_id)
        if channel is None:
            return
        frame = channel.send(make)
        if self.lose_next:
            self.lose_next -= 1
        else:
            self._publish(frontend_id, frame)

    def _say(self, frontend_id: bytes, message: Message) -> None:
        self._publish(frontend_id, encode(message))

    def _publish(self, frontend_id: bytes, frame: bytearray) -> None:
        if not self.silent and frontend_id in self._channels:
            self._output.send_multipart((frontend_id, frame))


def main() -> None:
    """Serve until interrupted."""
    engine = FakeEngine(make_socket_dir(Path(sys.argv[1])), vocab_size=49152, max_model_len=8192)
    engine.step_seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    engine.start()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        engine.stop()


if __name__ == "__main__":
    main()
