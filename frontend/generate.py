"""How POST /generate writes its answer: one prompt in, a stream of events or one JSON object out."""

from collections.abc import Sequence
from typing import Any

from frontend.choices import Choice, usage
from frontend.json_bytes import to_json
from frontend.output_stream import Chunk
from frontend.schemas import GenerateRequest
from frontend.sse import event
from minivllm.protocol import Logprobs


class GenerateRenderer:
    """A `Renderer`. What does not change is encoded once."""

    def __init__(self, body: GenerateRequest, request_id: str, choices: Sequence[Choice]) -> None:
        self._choices = choices
        self._request_id = request_id
        self._head = b'data: {"request_id":' + to_json(request_id) + b',"text":'

    def event(self, choice: Choice, chunk: Chunk) -> bytes:
        """See `Renderer`."""
        if chunk.finished is not None:
            return event(self.whole([chunk]))
        logprobs = b"" if chunk.logprobs is None else b',"logprobs":' + to_json(_columns(chunk.logprobs))
        text, token_ids = to_json(chunk.text), to_json(chunk.token_ids)
        return b"".join((self._head, text, b',"token_ids":', token_ids, logprobs, b',"finish_reason":null}\n\n'))

    def last_events(self) -> bytes:
        """See `Renderer`."""
        return b""

    def whole(self, answers: Sequence[Chunk]) -> bytes:
        """See `Renderer`; also the last event of a stream."""
        (chunk,), request = answers, self._choices[0].request
        content: dict[str, Any] = {
            "request_id": self._request_id,
            "text": chunk.text,
            "token_ids": chunk.token_ids,
            "finish_reason": chunk.finished.reason if chunk.finished else None,
            "usage": usage(self._choices),
        }
        if chunk.logprobs is not None:
            content["logprobs"] = _columns(chunk.logprobs)
        if request.prompt_logprobs is not None:
            content["prompt_logprobs"] = _columns(request.prompt_logprobs)
        return to_json(content)


def _columns(logprobs: Logprobs) -> dict[str, list[Any]]:
    """One entry per token in each column, the alternatives best first."""
    k, num_tokens = logprobs.num_top, len(logprobs)
    return {
        "token_logprobs": logprobs.tokens,
        "top_token_ids": [logprobs.top_ids[i * k : (i + 1) * k] for i in range(num_tokens)],
        "top_logprobs": [logprobs.top[i * k : (i + 1) * k] for i in range(num_tokens)],
    }
