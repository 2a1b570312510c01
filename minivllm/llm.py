"""Offline generation: the server's own engine, driven in-process.

from minivllm import LLM, SamplingParams
for output in LLM().generate(["The capital of France is"], SamplingParams(max_tokens=8)):
    print(output.text)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine_core.engine import EngineCore, RequestOutput
from frontend.detokenizer import IncrementalDetokenizer
from frontend.tokenizer import Tokenizer
from minivllm.config import DEFAULT_MODEL, EngineConfig
from minivllm.model_store import resolve_model, resolve_tokenizer
from minivllm.protocol import Finished, Logprobs
from minivllm.sampling_params import SamplingParams

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """The answer to one prompt. `text` ends before a stop string; `token_ids` are all that were generated.

    logprobs, prompt_logprobs: where `SamplingParams` ask; of `token_ids`, and of the prompt from its second token on.
    """

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finished: Finished
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


@dataclass(slots=True)
class _Stream:
    detokenizer: IncrementalDetokenizer | None
    completion: Completion
    done: bool = False


class LLM:
    """One model for offline use. `options` are those of `EngineConfig`; `tokenize=False` for token ids only."""

    def __init__(self, model: str = DEFAULT_MODEL, *, tokenize: bool = True, **options: Any) -> None:
        """Load `model`: a directory or hub id. Raises `StartupError`."""
        config = EngineConfig(model=model, **options)
        self.engine = EngineCore(config, resolve_model(config))
        self.tokenizer = Tokenizer.from_directory(resolve_tokenizer(config)) if tokenize else None
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_progress_bar: bool = True,
    ) -> list[Completion]:
        """One `Completion` per prompt (text or token ids), in order. Raises `InvalidRequestError` before any work."""
        batch = _as_batch(prompts)
        each = (
            [params or SamplingParams()] * len(batch)
            if params is None or isinstance(params, SamplingParams)
            else params
        )
        streams = self._add_all(batch, each)
        try:
            with _progress_bar(use_progress_bar) as progress:
                task = progress.add_task("generating", total=len(streams))
                while self.engine.has_work:
                    for output in self.engine.step():
                        progress.advance(task, self._receive(streams[output.request_id], output))
        except BaseException:
            self._abandon(streams)
            raise
        return [stream.completion for stream in streams.values()]

    def chat(
        self, messages: Sequence[dict[str, Any]], params: SamplingParams | None = None, use_progress_bar: bool = False
    ) -> Completion:
        """The model's answer to `messages` ({"role", "content"}), formatted by its chat template."""
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer: LLM(tokenize=True)")
        prompt = self.tokenizer.apply_chat_template(list(messages))
        return self.generate([self.tokenizer.encode(prompt, add_special_tokens=False)], params, use_progress_bar)[0]

    def _add_all(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> dict[str, _Stream]:
        streams = {}
        try:
            for prompt, each in zip(prompts, params, strict=True):
                self._num_requests += 1
                request_id = f"offline-{self._num_requests}"
                token_ids = self._token_ids(prompt)
                self.engine.add_request(request_id, token_ids, each)
                detokenizer = IncrementalDetokenizer(self.tokenizer, each) if self.tokenizer else None
                streams[request_id] = _Stream(detokenizer, Completion(token_ids, "", [], Finished("error")))
        except BaseException:
            self._abandon(streams)
            raise
        return streams

    def _abandon(self, streams: dict[str, _Stream]) -> None:
        """End what is left of an interrupted call, so that the next one finds an idle engine."""
        self.engine.abort(list(streams))
        while self.engine.has_work:
            self.engine.step()

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer: LLM(tokenize=True)")
        return self.tokenizer.encode(prompt)

    def _receive(self, stream: _Stream, output: RequestOutput) -> int:
        """Append what a step brought; 1 when the request has ended now, else 0."""
        if stream.done:
            return 0
        completion, finished = stream.completion, output.finished
        completion.token_ids += output.token_ids
        completion.logprobs = _joined(completion.logprobs, output.logprobs)
        completion.prompt_logprobs = _joined(completion.prompt_logprobs, output.prompt_logprobs)
        if stream.detokenizer is not None:
            completion.text += stream.detokenizer.add(output.token_ids, finished.stop_token_id if finished else None)
            if stream.detokenizer.stopped and finished is None:
                finished = Finished("stop")
                self.engine.abort([output.request_id])
        if finished is None:
            return 0
        if stream.detokenizer is not None:
            completion.text += stream.detokenizer.finish()
        completion.finished, stream.done = finished, True
        return 1


def _joined(known: Logprobs | None, new: Logprobs | None) -> Logprobs | None:
    if known is None or new is None:
        return known or new
    known.extend(new)
    return known


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _progress_bar(enabled: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, disable=not enabled, transient=True)
