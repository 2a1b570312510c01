"""How POST /v1/completions writes its answer."""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from frontend.choices import Choice
from frontend.json_bytes import to_json
from frontend.openai.envelope import Envelope, finish_reason
from frontend.openai.schemas import CompletionRequest
from frontend.openai.token_texts import TokenTexts
from frontend.output_stream import Chunk
from frontend.tokenizer import Tokenizer
from minivllm.protocol import Logprobs


class CompletionRenderer:
    """A `Renderer`."""

    def __init__(
        self, tokenizer: Tokenizer, model: str, body: CompletionRequest, request_id: str, choices: Sequence[Choice]
    ) -> None:
        self._envelope = Envelope("text_completion", body, request_id, model, choices)
        self._tokenizer = tokenizer
        self._echo = body.echo is True
        self._started: dict[int, CompletionLogprobs | None] = {}  # by index of the choice

    def event(self, choice: Choice, chunk: Chunk) -> bytes:
        """See `Renderer`."""
        text, logprobs = self._content(choice, chunk)
        return self._envelope.chunk(
            choice,
            b'"text":', to_json(text), b',"logprobs":', to_json(logprobs),
            b',"finish_reason":', to_json(finish_reason(chunk)),
        )  # fmt: skip

    def last_events(self) -> bytes:
        """See `Renderer`."""
        return self._envelope.last_events()

    def whole(self, answers: Sequence[Chunk]) -> bytes:
        """See `Renderer`."""
        return self._envelope.whole(answers, self._whole)

    def _whole(self, choice: Choice, answer: Chunk) -> dict[str, Any]:
        text, logprobs = self._content(choice, answer)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(answer)}

    def _content(self, choice: Choice, chunk: Chunk) -> tuple[str, "LogprobColumns | None"]:
        """Text and log-probabilities of `chunk`; those of an echoed prompt come before the first."""
        text, columns = chunk.text, None
        is_first = choice.index not in self._started
        if is_first:
            asked = choice.params.logprobs is not None
            skip = choice.params.skip_special_tokens
            self._started[choice.index] = (
                CompletionLogprobs(TokenTexts(self._tokenizer.token_bytes, skip)) if asked else None
            )
        logprobs = self._started[choice.index]
        if logprobs is not None:
            columns = LogprobColumns()
            if is_first and self._echo:
                logprobs.add_prompt(columns, choice.prompt.token_ids, choice.request.prompt_logprobs or Logprobs())
            logprobs.add(columns, chunk.token_ids, chunk.logprobs or Logprobs())
        if is_first and self._echo:
            text = self._prompt_text(choice) + text
        return text, columns

    def _prompt_text(self, choice: Choice) -> str:
        prompt = choice.prompt
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, choice.params.skip_special_tokens)


class LogprobColumns(Struct):
    """One entry per token in each column; null where nothing precedes the token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionLogprobs:
    """Writes the columns of one choice, from the first token of its text on."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def add_prompt(self, columns: LogprobColumns, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """Append a prompt; `logprobs` are those of all its tokens but the first."""
        self._add_token(columns, token_ids[0], None, None)
        self.add(columns, token_ids[1:], logprobs)

    def add(self, columns: LogprobColumns, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """Append tokens. `top_logprobs` holds the token itself besides the most probable ones."""
        k = logprobs.num_top
        for place, (token_id, logprob) in enumerate(zip(token_ids, logprobs.tokens, strict=True)):
            top: dict[str, float] = {}
            for index in range(place * k, (place + 1) * k):
                top.setdefault(self._texts.read(logprobs.top_ids[index]), logprobs.top[index])
            top.setdefault(self._texts.read(token_id), logprob)
            self._add_token(columns, token_id, logprob, top)

    def _add_token(
        self, columns: LogprobColumns, token_id: int, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        columns.tokens.append(self._texts.read(token_id))
        columns.token_logprobs.append(logprob)
        columns.top_logprobs.append(top)
        columns.text_offset.append(self._texts.offset)
        self._texts.step(token_id)
