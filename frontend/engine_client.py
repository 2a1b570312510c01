"""Every live request of this frontend: admission, the way of its tokens from the engine core to its stream, its end."""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import msgspec

from frontend.detokenizer import IncrementalDetokenizer
from frontend.engine_link import EngineLink
from frontend.output_stream import OutputStream
from frontend.tokenizer import Tokenizer
from minivllm import protocol
from minivllm.errors import (
    DuplicateRequestError,
    EngineDeadError,
    GenerationError,
    InvalidRequestError,
    MiniVLLMError,
    NotReadyError,
    OverloadedError,
)
from minivllm.protocol import EngineFacts, Error, Finished, Logprobs, Outputs
from minivllm.sampling_params import SamplingParams
from minivllm.transport import Endpoints

logger = logging.getLogger(__name__)

STREAM_PING_INTERVAL = 5.0  # seconds without news after which a stream shows its client that it is alive


class LiveRequest(msgspec.Struct, eq=False):
    """A request from admission to its end. Times in seconds on `time.monotonic`; 0 where nothing happened yet."""

    request_id: str
    num_prompt_tokens: int
    detokenizer: IncrementalDetokenizer
    stream: OutputStream
    arrival_time: float
    last_news_time: float
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    num_cached_tokens: int = 0
    prompt_logprobs: Logprobs | None = None  # of the prompt from its second token on; complete with the first output

    @property
    def num_output_tokens(self) -> int:
        return self.detokenizer.num_tokens


class RequestObserver(Protocol):
    """Who measures requests."""

    def on_tokens(self, request: LiveRequest, now: float) -> None: ...

    def on_finished(self, request: LiveRequest, finished: Finished, now: float) -> None: ...


class EngineClient:
    """The engine core as the endpoints see it. Create and use it on one event loop.

    max_unfinished: requests admitted and not ended; more are refused with `OverloadedError`.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        tokenizer: Tokenizer,
        observer: RequestObserver,
        max_unfinished: int,
        ping_interval: float = 1.0,
        engine_timeout: float = 30.0,
        stream_ping_interval: float = STREAM_PING_INTERVAL,
    ) -> None:
        self.link = EngineLink(endpoints, self, ping_interval, engine_timeout)
        self._tokenizer = tokenizer
        self._observer = observer
        self._max_unfinished = max_unfinished
        self._stream_ping_interval = stream_ping_interval
        self._requests: dict[str, LiveRequest] = {}
        # Ended here, but the engine core has not said so yet: its last words must not reach a new request of that id.
        self._ending: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def check_admission(self) -> EngineFacts:
        """Facts about the engine core. Raises `NotReadyError`, `EngineDeadError` or `OverloadedError`."""
        if self.draining:
            raise NotReadyError("the server is shutting down", retry_after=5)
        if self.link.gone_reason is not None:
            raise EngineDeadError(self.link.gone_reason)
        if self.link.facts is None:
            raise NotReadyError("the model is still loading", retry_after=2)
        if len(self._requests) >= self._max_unfinished:
            raise OverloadedError(
                f"{len(self._requests)} requests are unfinished, at most {self._max_unfinished} are allowed "
                "(--max-num-queued-reqs)"
            )
        return self.link.facts

    @contextmanager
    def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, arrival_time: float
    ) -> Iterator[LiveRequest]:
        """A request while its response is written; left unfinished, it is aborted. Raises like `check_admission`."""
        request = self._submit(request_id, list(prompt_token_ids), params, arrival_time)
        try:
            yield request
        finally:
            self.abort(request)

    def abort(self, request: LiveRequest) -> None:
        """End a request now, here and in the engine core. Does nothing once it has ended."""
        if self._requests.get(request.request_id) is request:
            self.send_abort([request.request_id])
            self._ending.add(request.request_id)
            self._end(request, "", [], Finished("abort"))

    def abort_all(self) -> None:
        """End every request with finish_reason "abort"."""
        for request in list(self._requests.values()):
            self.abort(request)

    def send_abort(self, request_ids: list[str]) -> bool:
        """Ask the engine core to forget requests, of whichever frontend. False when there is no engine core."""
        return self.link.send(lambda frontend_id, seq: protocol.Abort(frontend_id, seq, request_ids))

    def drain(self) -> None:
        """Admit nothing any more."""
        self.draining = True

    async def wait_until_idle(self, seconds: float) -> bool:
        """Wait until no request is left; False if that takes longer."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _submit(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, arrival_time: float
    ) -> LiveRequest:
        self.check_admission()
        if request_id in self._requests or request_id in self._ending:
            raise DuplicateRequestError(f"request_id {request_id!r} is in use", "request_id")
        if params.seed is None:  # chosen here, so that the parameters describe the request completely
            params = msgspec.structs.replace(params, seed=secrets.randbits(63))
        add = self.link.send(
            lambda frontend_id, seq: protocol.Add(frontend_id, seq, request_id, prompt_token_ids, params)
        )
        if not add:
            raise NotReadyError("the engine core is not connected")
        detokenizer = IncrementalDetokenizer(self._tokenizer, params)
        request = LiveRequest(
            request_id, len(prompt_token_ids), detokenizer, OutputStream(), arrival_time, time.monotonic()
        )
        self._requests[request_id] = request
        self._idle.clear()
        return request

    def on_outputs(self, message: Outputs) -> None:
        now, start = time.monotonic(), 0
        for request_id, count in zip(message.request_ids, message.counts, strict=True):
            end = start + count
            request = self._requests.get(request_id)
            if request is not None:
                if message.prompt_logprobs:
                    _note_prompt_logprobs(request, message.prompt_logprobs.get(request_id))
                logprobs = message.logprobs.get(request_id) if message.logprobs else None
                self._deliver(request, message.token_ids[start:end], message.finished.get(request_id), now, logprobs)
            start = end
        if message.finished:
            self._ending -= message.finished.keys()

    def _deliver(
        self,
        request: LiveRequest,
        token_ids: list[int],
        finished: Finished | None,
        now: float,
        logprobs: Logprobs | None,
    ) -> None:
        request.last_news_time = now
        if not token_ids and finished is None:
            return  # something about its prompt
        detokenizer, num_before = request.detokenizer, request.detokenizer.num_tokens
        text = detokenizer.add(token_ids, finished.stop_token_id if finished else None)
        if detokenizer.num_tokens > num_before:
            self._observer.on_tokens(request, now)
        if detokenizer.stopped:
            token_ids = token_ids[: detokenizer.num_tokens - num_before]
            logprobs = logprobs.cut(0, len(token_ids)) if logprobs else None
            if finished is None:
                self.send_abort([request.request_id])
                self._ending.add(request.request_id)
            finished = Finished("stop") if finished is None else msgspec.structs.replace(finished, reason="stop")
        if finished is None:
            request.stream.put(text, token_ids, None, logprobs)
        elif finished.reason == "error":
            self._fail(request, GenerationError(finished.message or "the engine core gave no reason"), finished)
        else:
            self._end(request, text + detokenizer.finish(), token_ids, finished, logprobs)

    def on_refused(self, message: Error) -> None:
        self._ending.discard(message.request_id)
        request = self._requests.get(message.request_id)
        if request is not None:
            kind = DuplicateRequestError if message.param == "request_id" else InvalidRequestError
            self._fail(request, kind(message.message, message.param))

    def on_gap(self, num_lost: int) -> None:
        self._ending.clear()  # the confirmations may be among what was lost
        requests = list(self._requests.values())
        for request in requests:
            self._ending.add(request.request_id)
            self._fail(request, GenerationError(f"{num_lost} messages of the engine core were lost: output is missing"))
        if requests:
            self.send_abort([request.request_id for request in requests])

    def on_engine_gone(self, reason: str) -> None:
        self._ending.clear()
        for request in list(self._requests.values()):
            self._fail(request, EngineDeadError(reason))

    def on_tick(self, now: float) -> None:
        for request in self._requests.values():
            if now - request.last_news_time >= self._stream_ping_interval:
                request.last_news_time = now
                request.stream.nudge()

    def _end(
        self,
        request: LiveRequest,
        text: str,
        token_ids: list[int],
        finished: Finished,
        logprobs: Logprobs | None = None,
    ) -> None:
        request.num_cached_tokens = finished.num_cached_tokens
        request.stream.put(text, token_ids, finished, logprobs)
        self._forget(request, finished)

    def _fail(self, request: LiveRequest, error: MiniVLLMError, finished: Finished | None = None) -> None:
        request.stream.fail(error)
        self._forget(request, finished or Finished("error"))

    def _forget(self, request: LiveRequest, finished: Finished) -> None:
        del self._requests[request.request_id]
        self._observer.on_finished(request, finished, time.monotonic())
        if not self._requests:
            self._idle.set()


def _note_prompt_logprobs(request: LiveRequest, logprobs: Logprobs | None) -> None:
    """Append the next part. One that comes again, because the prompt was computed again, replaces what it repeats."""
    if logprobs is not None:
        known = request.prompt_logprobs or Logprobs(start=1)
        request.prompt_logprobs = known.cut(0, logprobs.start - 1)
        request.prompt_logprobs.extend(logprobs)
