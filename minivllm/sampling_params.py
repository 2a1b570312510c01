"""What a request may ask of the sampler, validated once and carried unchanged from HTTP to the device.

A `msgspec.Struct`, so that the very same object is the wire format (a positional msgpack array) and decoding
re-validates it. Field names, ranges and defaults are vLLM's.
"""

import math
from typing import Annotated

from msgspec import Meta, Struct

from minivllm.errors import InvalidRequestError

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
MAX_COUNT = 2**31 - 1  # beyond any vocabulary or context, and every integer type on the way holds it
MAX_LOGPROBS = 20  # alternatives per token that a request may ask for
GREEDY_EPSILON = 1e-5  # a temperature below this is greedy: dividing by it would overflow float32


class SamplingParams(Struct, frozen=True, array_like=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose the tokens of one request and when to stop. Raises `InvalidRequestError` naming the field.

    temperature: 0 means greedy; otherwise logits are divided by it.
    top_k: keep the k most probable tokens; 0 or -1 keeps all.
    top_p, min_p: nucleus mass in (0, 1]; floor relative to the most probable token in [0, 1].
    repetition_penalty: > 1 discourages tokens of prompt and output. presence_/frequency_penalty: [-2, 2], output only.
    logit_bias: token id → addend in [-100, 100].
    seed: with it the output is a pure function of (prompt, parameters, seed).
    stop: strings that end the text (handled by the detokenizer, not by the engine); stop_token_ids: ids that do.
    logprobs: report each output token's log-probability and those of this many most probable tokens (None: nothing).
    prompt_logprobs: the same for every prompt token after the first. Both are of the model's own distribution.
    json_schema: text of a JSON schema that the output follows, if it is not cut short (see `minivllm.json_schema`).
    max_tokens: None means as many as the context holds. min_tokens: no stop token or EOS before that many.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[TokenId, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        self._check_range("temperature", self.temperature, 0.0, 100.0)
        if not -1 <= self.top_k <= MAX_COUNT:
            raise InvalidRequestError(
                f"top_k must be -1 (off), 0 (off) or between 1 and {MAX_COUNT}, got {self.top_k}", "top_k"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(f"top_p must be in (0, 1], got {self.top_p}", "top_p")
        self._check_range("min_p", self.min_p, 0.0, 1.0)
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise InvalidRequestError(
                f"repetition_penalty must be in (0, 100], got {self.repetition_penalty}", "repetition_penalty"
            )
        self._check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for bias in self.logit_bias.values():
            self._check_range("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidRequestError(f"seed must fit in 64 bits, got {self.seed}", "seed")
        if any(not stop for stop in self.stop):
            raise InvalidRequestError("stop must not contain an empty string", "stop")
        if self.max_tokens is not None and not 1 <= self.max_tokens <= MAX_COUNT:
            raise InvalidRequestError(
                f"max_tokens must be between 1 and {MAX_COUNT}, got {self.max_tokens}", "max_tokens"
            )
        if not 0 <= self.min_tokens <= (MAX_COUNT if self.max_tokens is None else self.max_tokens):
            raise InvalidRequestError(
                f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}", "min_tokens"
            )

        self._check_num_logprobs("logprobs", self.logprobs)
        self._check_num_logprobs("prompt_logprobs", self.prompt_logprobs)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the temperature shapes the distribution (`min_tokens` aside)."""
        filters = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
        return not (filters or self.has_penalties or self.logit_bias or self.json_schema is not None)

    @staticmethod
    def _check_range(name: str, value: float, low: float, high: float) -> None:
        if not (math.isfinite(value) and low <= value <= high):
            raise InvalidRequestError(f"{name} must be in [{low:g}, {high:g}], got {value}", name)

    @staticmethod
    def _check_num_logprobs(name: str, number: int | None) -> None:
        if number is not None and not 0 <= number <= MAX_LOGPROBS:
            raise InvalidRequestError(f"{name} must be between 0 and {MAX_LOGPROBS}, got {number}", name)
