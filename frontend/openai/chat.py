"""How POST /v1/chat/completions writes its answer."""

from collections.abc import Sequence
from typing import Any

from frontend.choices import Choice
from frontend.json_bytes import to_json
from frontend.openai.envelope import Envelope, finish_reason
from frontend.openai.schemas import ChatCompletionRequest
from frontend.openai.token_texts import TokenTexts
from frontend.output_stream import Chunk
from frontend.tokenizer import Tokenizer
from minivllm.protocol import Logprobs


class ChatRenderer:
    """A `Renderer`. The role comes with the first text, never before there is a token."""

    def __init__(
        self, tokenizer: Tokenizer, model: str, body: ChatCompletionRequest, request_id: str, choices: Sequence[Choice]
    ) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._envelope = Envelope(kind, body, request_id, model, choices)
        self._tokenizer = tokenizer
        self._started: dict[int, TokenTexts] = {}  # by index of the choice

    def event(self, choice: Choice, chunk: Chunk) -> bytes:
        """See `Renderer`."""
        head = b'"delta":{"content":' if choice.index in self._started else b'"delta":{"role":"assistant","content":'
        return self._envelope.chunk(
            choice,
            head, to_json(chunk.text), b'},"logprobs":', to_json(self._logprobs(choice, chunk)),
            b',"finish_reason":', to_json(finish_reason(chunk)),
        )  # fmt: skip

    def last_events(self) -> bytes:
        """See `Renderer`."""
        return self._envelope.last_events()

    def whole(self, answers: Sequence[Chunk]) -> bytes:
        """See `Renderer`."""
        return self._envelope.whole(answers, self._whole)

    def _whole(self, choice: Choice, answer: Chunk) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(choice, answer),
            "finish_reason": finish_reason(answer),
        }

    def _logprobs(self, choice: Choice, chunk: Chunk) -> dict[str, Any] | None:
        """Those of the tokens of `chunk`, which follow those of the last one."""
        if choice.index not in self._started:
            self._started[choice.index] = TokenTexts(self._tokenizer.token_bytes, choice.params.skip_special_tokens)
        if choice.params.logprobs is None:
            return None
        return {"content": _entries(self._started[choice.index], chunk), "refusal": None}


def _entries(texts: TokenTexts, chunk: Chunk) -> list[dict[str, Any]]:
    logprobs = chunk.logprobs or Logprobs()
    k, entries = logprobs.num_top, []
    for place, (token_id, logprob) in enumerate(zip(chunk.token_ids, logprobs.tokens, strict=True)):
        top = range(place * k, (place + 1) * k)
        alternatives = [_entry(texts, logprobs.top_ids[index], logprobs.top[index]) for index in top]
        entries.append(_entry(texts, token_id, logprob) | {"top_logprobs": alternatives})
        texts.step(token_id)
    return entries


def _entry(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.read(token_id), "logprob": logprob, "bytes": list(texts.piece(token_id))}
