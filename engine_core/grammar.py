"""Which tokens may come next, so that a text follows its JSON schema: made on the host, applied on the device.

admission   schema ─▶ compiled against the vocabulary, kept ─▶ or the request is refused
a row       a matcher, rebuilt from the output tokens whenever a request is given a row: tokens are the state
a pass      device   forward ──────────────────────▶ logits ─▶ -inf where the mask is 0 ─▶ sample
            host     take the last token, fill the mask ──────┘

The mask needs every token before it on the host, so with such a request among the decoding ones the engine core
collects a pass before it launches the next (`Scheduler.can_run_ahead`).
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine_core.request import Request
from minivllm.config import ModelConfig
from minivllm.errors import InvalidRequestError, ModelError
from minivllm.json_schema import to_grammar
from minivllm.model_store import resolve_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_NUM_COMPILED = 64  # schemas that are kept
_WORD_BITS = 32

Words = npt.NDArray[np.uint32]


class Grammars:
    """Compiles schemas against a model's vocabulary. The first one costs the reading of the tokenizer besides."""

    def __init__(self, config: ModelConfig, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._compiled = lru_cache(_NUM_COMPILED)(self._compile)

    def start(self, schema: str) -> "LLMatcher":
        """A matcher at the beginning of the text. Raises `InvalidRequestError` naming `json_schema`."""
        return self._compiled(schema).deep_copy()

    def check(self, schema: str, output_token_ids: Sequence[int]) -> None:
        """Raises `InvalidRequestError` for a schema that cannot be followed, or is not followed by these tokens."""
        if not _advance(self.start(schema), output_token_ids):
            raise InvalidRequestError("output_token_ids do not follow json_schema", "output_token_ids")

    def _compile(self, schema: str) -> "LLMatcher":
        grammar = to_grammar(schema)
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if not matcher.is_error():
            matcher.compute_bitmask()  # a schema that is nothing but a reference to itself fails only here
        if matcher.is_error():
            raise InvalidRequestError(f"json_schema cannot be followed: {_error_of(matcher)}", "json_schema")
        return matcher

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        if not self._eos_token_ids:
            raise InvalidRequestError("json_schema needs a model with an end-of-sequence token", "json_schema")
        try:
            text = (resolve_tokenizer(self._config) / "tokenizer.json").read_text("utf-8")
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except (ModelError, OSError, ValueError) as error:
            raise InvalidRequestError(f"json_schema needs the model's tokenizer: {error}", "json_schema") from error


class GrammarRows:
    """The matchers of the rows whose requests ask for one."""

    def __init__(self, grammars: Grammars, vocab_size: int) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._matchers: dict[int, LLMatcher] = {}
        self._num_consumed: dict[int, int] = {}  # output tokens that the matcher has seen
        self._failures: dict[Request, str] = {}

    def load(self, request: Request) -> None:
        """`request` was given its row; a matcher of its predecessor there is dropped."""
        self._matchers.pop(request.row, None)
        if request.params.json_schema is not None:
            output = request.output_token_ids
            self._matchers[request.row] = matcher = self._grammars.start(request.params.json_schema)
            _advance(matcher, output)
            self._num_consumed[request.row] = len(output)

    def apply(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Logits [num_reqs, vocab_size], for those who ask a copy that is -inf wherever a token may not come next."""
        asking = [index for index, request in enumerate(requests) if request.params.json_schema is not None]
        if not asking:
            return logits
        on_gpu = logits.device.type == "cuda"
        num_words = -(-self._vocab_size // _WORD_BITS)
        masks = torch.empty(len(asking), num_words, dtype=torch.int32, pin_memory=on_gpu)
        words = masks.numpy().view(np.uint32)
        for place, index in enumerate(asking):
            self._fill(requests[index], words[place])
        rows = torch.tensor(asking, pin_memory=on_gpu).to(logits.device, non_blocking=True)
        forbidden = ~unpack(masks.to(logits.device, non_blocking=True), self._vocab_size)
        return logits.index_copy(0, rows, logits[rows].masked_fill(forbidden, float("-inf")))

    def take_failures(self) -> dict[Request, str]:
        """Those whose schema could not be followed further since the last call, and why; their next token is void."""
        failures, self._failures = self._failures, {}
        return failures

    def _fill(self, request: Request, mask: Words) -> None:
        """Write the mask of the next token of `request`; when its text is complete, only EOS is left."""
        matcher, num_known = self._matchers[request.row], self._num_consumed[request.row]
        new = request.token_ids[request.num_prompt_tokens + num_known :]
        _advance(matcher, new)
        self._num_consumed[request.row] = num_known + len(new)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():  # beyond a limit of the library; the mask allows EOS
            self._failures[request] = f"json_schema cannot be followed any further: {_error_of(matcher)}"
        if num_known + len(new) < request.params.min_tokens:
            _withhold(mask, request.stop_token_ids)


def unpack(words: Tensor, num_bits: int) -> Tensor:
    """bool [n, num_bits] from int32 [n, ⌈num_bits / 32⌉], lowest bit first."""
    bits = torch.arange(_WORD_BITS, dtype=torch.int32, device=words.device)
    return (words[:, :, None] >> bits & 1).view(len(words), -1)[:, :num_bits].bool()


def _advance(matcher: "LLMatcher", token_ids: Sequence[int]) -> bool:
    """Take in `token_ids`; False if one of them may not come here. What follows the end of the text is ignored."""
    return all(matcher.is_stopped() or matcher.consume_token(token) for token in token_ids)


def _error_of(matcher: "LLMatcher") -> str:
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())


def _withhold(mask: Words, token_ids: frozenset[int]) -> None:
    """Clear the bits of `token_ids`, unless nothing else is left: what the schema says goes before `min_tokens`."""
    kept: Any = mask.copy()
    for token in token_ids:
        kept[token // _WORD_BITS] &= np.uint32(~(1 << token % _WORD_BITS) & 0xFFFFFFFF)
    if kept.any():
        mask[:] = kept
