"""Every live request of this frontend: admission, the way of its tokens from the engine core to its stream, its end."""

import asyncio
import logging
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import msgspec

from frontend import recovery
from frontend.detokenizer import IncrementalDetokenizer
from frontend.engine_link import EngineLink
from frontend.engine_watch import EngineWatch, HttpSpan
from frontend.live_request import LiveRequest
from frontend.output_stream import OutputStream
from frontend.tokenizer import Tokenizer
from minivllm import protocol
from minivllm.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineKilledError,
    GenerationError,
    InvalidRequestError,
    MiniVLLMError,
    NotReadyError,
    OverloadedError,
)
from minivllm.faults import NO_FAULTS, Faults
from minivllm.protocol import EngineFacts, Error, Finished, Logprobs, Outputs, Released
from minivllm.sampling_params import SamplingParams
from minivllm.transport import Endpoints

logger = logging.getLogger(__name__)

STREAM_PING_INTERVAL = 5.0  # seconds without news after which a stream shows its client that it is alive


class RequestObserver(Protocol):
    """Who measures requests."""

    def on_tokens(self, request: LiveRequest, now: float) -> None: ...

    def on_resumed(self, request: LiveRequest) -> None: ...

    def on_finished(self, request: LiveRequest, finished: Finished, now: float) -> None: ...


class EngineClient:
    """The engine core as the endpoints see it. Create and use it on one event loop.

    max_unfinished: requests admitted and not ended; more are refused with `OverloadedError`.
    resume_timeout: seconds that requests wait for a new engine core when theirs has died.
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
        resume_timeout: float = 300.0,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self.link = EngineLink(endpoints, self, ping_interval, engine_timeout, faults)
        self.watch = EngineWatch(self.link)
        self._tokenizer = tokenizer
        self._observer = observer
        self._max_unfinished = max_unfinished
        self._stream_ping_interval = stream_ping_interval
        self._resume_timeout = resume_timeout
        self._requests: dict[str, LiveRequest] = {}
        # Ended here, but the engine core has not said so yet: its last words must not reach a new request of that id.
        self._ending: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._served: EngineFacts | None = None  # the engine core that the requests began on
        self._gone_time = 0.0
        self.draining = False

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> Collection[LiveRequest]:
        """Those that are unfinished."""
        return self._requests.values()

    def check_ready(self) -> EngineFacts:
        """Facts about the engine core. Raises `NotReadyError` or `EngineDeadError`."""
        if self.draining:
            raise NotReadyError("the server is shutting down", retry_after=5)
        if self.link.gone_reason is not None:
            raise EngineDeadError(self.link.gone_reason)
        if self.link.facts is None:
            raise NotReadyError("the model is still loading", retry_after=2)
        return self.link.facts

    def check_admission(self) -> EngineFacts:
        """Like `check_ready`. Raises `OverloadedError`, too."""
        facts = self.check_ready()
        if len(self._requests) >= self._max_unfinished:
            raise OverloadedError(
                f"{len(self._requests)} requests are unfinished, at most {self._max_unfinished} are allowed "
                "(--max-num-queued-reqs)"
            )
        return facts

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
            self._forget_in_engine(request)
            self._end(request, "", [], Finished("abort"))

    def abort_all(self) -> None:
        """End every request with finish_reason "abort"."""
        for request in list(self._requests.values()):
            self.abort(request)

    def abort_by_id(self, request_ids: Sequence[str]) -> bool:
        """End requests, of whichever frontend. False when the engine core is not there to be asked."""
        mine = [request for request_id in request_ids if (request := self._requests.get(request_id))]
        for request in mine:
            self.abort(request)
        # Others may live in another frontend: the engine core knows all ids, and their owner hears of the end.
        return bool(mine) or self._send_abort(request_ids)

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
        detokenizer, now = IncrementalDetokenizer(self._tokenizer, params), time.monotonic()
        request = LiveRequest(request_id, prompt_token_ids, params, detokenizer, OutputStream(), arrival_time, now)
        self._requests[request_id] = request
        self._idle.clear()
        self._send_add(request)
        return request

    def _send_add(self, request: LiveRequest) -> None:
        request.submitted = self.link.send(request.add_message)

    def _send_abort(self, request_ids: Sequence[str]) -> bool:
        return self.link.send(lambda frontend_id, seq: protocol.Abort(frontend_id, seq, list(request_ids)))

    def _forget_in_engine(self, request: LiveRequest) -> None:
        if request.submitted and self._send_abort([request.request_id]):
            self._ending.add(request.request_id)

    def on_ready(self) -> None:
        facts, before = self.link.facts, self._served
        self._served = facts
        if before and facts and (before.model, before.vocab_size) != (facts.model, facts.vocab_size):
            self._fail_all(EngineDeadError(f"the engine core came back with another model: {facts.model}"))
        self._resume()

    def _resume(self) -> None:
        recovery.resubmit(self.requests, self._resubmit)

    def _resubmit(self, request: LiveRequest) -> None:
        self._send_add(request)
        if request.submitted:
            self._observer.on_resumed(request)

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
        if token_ids:
            self._note_progress(request, token_ids)
        detokenizer, num_before = request.detokenizer, request.detokenizer.num_tokens
        text = detokenizer.add(token_ids, finished.stop_token_id if finished else None)
        if detokenizer.num_tokens > num_before:
            self._observer.on_tokens(request, now)
        if detokenizer.stopped:
            token_ids = token_ids[: detokenizer.num_tokens - num_before]
            logprobs = logprobs.cut(0, len(token_ids)) if logprobs else None
            if finished is None:
                self._forget_in_engine(request)
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

    def _note_progress(self, request: LiveRequest, token_ids: list[int]) -> None:
        request.output_token_ids += token_ids
        if request.num_crashes:
            request.num_crashes = request.num_trials_lost = 0
            self._resume()

    def on_released(self, message: Released) -> None:
        self._ending.difference_update(message.request_ids)
        for request_id in message.request_ids:
            if (request := self._requests.get(request_id)) is not None:
                self._resubmit(request)

    def on_engine_gone(self, reason: str) -> None:
        self._ending.clear()
        self._gone_time = time.monotonic()
        convicted = recovery.on_engine_gone(self.requests)
        if convicted is not None:
            error = EngineKilledError(f"the engine core died {convicted.num_crashes} times with this request: {reason}")
            self._fail(convicted, error)
        if self._requests:
            logger.warning("%d requests wait for a new engine core", len(self._requests))

    def give_up(self, reason: str) -> None:
        """The engine core is gone and will not come back."""
        self.link.lose(reason)
        self._fail_all(EngineDeadError(reason))

    def _fail_all(self, error: MiniVLLMError) -> None:
        for request in list(self._requests.values()):
            self._fail(request, error)

    def on_tick(self, now: float) -> None:
        for request in self._requests.values():
            if now - request.last_news_time >= self._stream_ping_interval:
                request.last_news_time = now
                request.stream.nudge()
        if self.link.gone_reason is not None and now - self._gone_time > self._resume_timeout:
            self._fail_all(EngineDeadError(self.link.gone_reason))

    def _end(
        self,
        request: LiveRequest,
        text: str,
        token_ids: list[int],
        finished: Finished,
        logprobs: Logprobs | None = None,
    ) -> None:
        request.num_cached_tokens = min(finished.num_cached_tokens, request.num_prompt_tokens)
        request.stream.put(text, token_ids, finished, logprobs)
        self._forget(request, finished)

    def _fail(self, request: LiveRequest, error: MiniVLLMError, finished: Finished | None = None) -> None:
        request.stream.fail(error)
        self._forget(request, finished or Finished("error"))

    def _forget(self, request: LiveRequest, finished: Finished) -> None:
        del self._requests[request.request_id]
        now = time.monotonic()
        self._observer.on_finished(request, finished, now)
        self.watch.note_ended(
            HttpSpan(request.request_id, request.arrival_time, request.first_token_time, now, finished.reason)
        )
        if not self._requests:
            self._idle.set()
        elif request.num_crashes:  # it was perhaps under trial: the next may go
            self._resume()


def _note_prompt_logprobs(request: LiveRequest, logprobs: Logprobs | None) -> None:
    """Append the next part. One that comes again, because the prompt was computed again, replaces what it repeats."""
    if logprobs is not None:
        known = request.prompt_logprobs or Logprobs(start=1)
        request.prompt_logprobs = known.cut(0, logprobs.start - 1)
        request.prompt_logprobs.extend(logprobs)
