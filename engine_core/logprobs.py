"""Log-probabilities of tokens under the model's own distribution, beside the sampler: never a wait for the device.

launch    logits ─▶ log-softmax ─▶ of the tokens [n], of the most probable [n, k] ─▶ copied with the sampled tokens
collect   columns, cut by request, each with as many alternatives as it asked for
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine_core.request import Request
from engine_core.scheduler import Batch
from minivllm.protocol import Logprobs

_ROWS_AT_ONCE = 128  # bounds the memory of a float32 row of the vocabulary per token
_FLOOR = -9999.0  # instead of -inf, which JSON cannot say


class LogprobTensors(NamedTuple):
    """Columns of n tokens, on the device or on the host."""

    tokens: Tensor  # [n] float32
    top_ids: Tensor  # [n, k] int64, best first
    top: Tensor  # [n, k] float32

    def map(self, copy: Callable[[Tensor], Tensor]) -> "LogprobTensors":
        """`copy` of every column."""
        return LogprobTensors(*(copy(column) for column in self))

    def read(self, spans: Iterable["Span"]) -> Iterator[tuple[Request, Logprobs]]:
        """The columns of each request, whose tokens follow each other in these. The tensors must be on the host."""
        tokens, top_ids, top = (column.tolist() for column in self)
        end = 0
        for request, num_top, start, num_tokens in spans:
            begin, end = end, end + num_tokens
            ids = [token for row in top_ids[begin:end] for token in row[:num_top]]
            values = [value for row in top[begin:end] for value in row[:num_top]]
            yield request, Logprobs(tokens[begin:end], ids, values, start)


class Span(NamedTuple):
    """Tokens of one request with `num_top` alternatives each; `start`, for those of a prompt, is their place in it."""

    request: Request
    num_top: int
    start: int
    num_tokens: int


def log_probabilities(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    """Of `token_ids` [n] and the `num_top` most probable under logits [n, vocab_size], by the same numbers."""
    parts = [
        _log_probabilities(rows, ids, min(num_top, logits.shape[-1]))
        for rows, ids in zip(logits.split(_ROWS_AT_ONCE), token_ids.split(_ROWS_AT_ONCE), strict=True)
    ]
    return LogprobTensors(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _log_probabilities(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    logprobs = logits.float().log_softmax(-1).clamp_(min=_FLOOR)
    top = logprobs.topk(num_top)
    return LogprobTensors(logprobs.gather(-1, token_ids[:, None])[:, 0], top.indices, top.values)


def sampled_spans(batch: Batch) -> list[Span]:
    """One token each for those of `batch.sampled` that ask."""
    requests = (batch.sampled[index] for index in batch.with_logprobs)
    return [Span(request, request.params.logprobs or 0, 0, 1) for request in requests]


def prompt_spans(batch: Batch) -> list[Span]:
    """The prompt tokens that the logits of this pass judge."""
    return [
        Span(span.request, span.request.params.prompt_logprobs or 0, span.start, span.num_tokens)
        for span in batch.prompt_spans
    ]


def most_alternatives(spans: Iterable[Span]) -> int:
    """Columns needed for all of `spans`."""
    return max(span.num_top for span in spans)
