"""How a request enters the engine: it fits the model and the KV cache, or it is refused by the name of the field."""

import logging
import random
import time
from collections.abc import Callable, Sequence

from engine_core.grammar import Grammars
from engine_core.model_loader import ModelFacts
from engine_core.request import Request
from minivllm.config import EngineConfig
from minivllm.errors import InvalidRequestError, StartupError
from minivllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class Admission:
    """Turns what a client asks for into a `Request`, numbered in the order of arrival."""

    def __init__(
        self,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
        grammars: Grammars | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._grammars = grammars
        self._num_arrived = 0

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        output_token_ids: Sequence[int] = (),
    ) -> Request:
        """A request that fits this engine, not queued yet. Raises `InvalidRequestError` naming the field."""
        self._check(prompt_token_ids, params, output_token_ids)
        num_prompt = len(prompt_token_ids)
        max_tokens = self._max_model_len - num_prompt if params.max_tokens is None else params.max_tokens
        eos = () if params.ignore_eos else self._eos_token_ids
        self._num_arrived += 1
        return Request(
            request_id=request_id,
            token_ids=[*prompt_token_ids, *output_token_ids],
            num_prompt_tokens=num_prompt,
            params=params,
            stop_token_ids=frozenset((*params.stop_token_ids, *eos)),
            max_total_tokens=num_prompt + max_tokens,
            seed=random.getrandbits(63) if params.seed is None else params.seed,
            arrival_index=self._num_arrived,
            arrival_time=self._clock(),
            num_prompt_logprobs=num_prompt - 1 if output_token_ids else 0,  # they came before the first of these
        )

    def _check(self, prompt: Sequence[int], params: SamplingParams, output: Sequence[int]) -> None:
        if not prompt:
            raise InvalidRequestError("prompt must hold at least one token", "prompt")
        self._check_ids("prompt", prompt)
        self._check_ids("output_token_ids", output)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", tuple(params.logit_bias))
        room = self._max_model_len - len(prompt)
        if room < 1 or (params.max_tokens or 0) > room:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}, but max_model_len is "
                f"{self._max_model_len}",
                "prompt" if room < 1 else "max_tokens",
            )
        if len(output) >= (params.max_tokens or room):
            raise InvalidRequestError(f"{len(output)} output tokens leave nothing to generate", "output_token_ids")
        if params.json_schema is not None and self._grammars is not None:
            self._grammars.check(params.json_schema, output)

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        vocab_size = self._vocab_size
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
            bad = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise InvalidRequestError(f"{name} holds token id {bad}, the vocabulary has {vocab_size}", name)


def choose_max_model_len(config: EngineConfig, model: ModelFacts, num_blocks: int) -> int:
    """The length asked for if model and KV cache can hold it, else as much as they can. Raises `StartupError`."""
    capacity = num_blocks * config.block_size
    if config.max_model_len is None:
        if capacity < model.max_positions:
            logger.warning(
                "max_model_len is %d: the KV cache holds no more (the model allows %d)", capacity, model.max_positions
            )
        return min(model.max_positions, capacity)
    if config.max_model_len > model.max_positions:
        raise StartupError(f"--max-model-len {config.max_model_len}, but the model allows {model.max_positions}")
    if config.max_model_len > capacity:
        needed = config.max_model_len * model.layout.bytes_per_token
        raise StartupError(
            f"--max-model-len {config.max_model_len} needs {needed / 2**20:.0f} MiB of KV cache, but it holds "
            f"{capacity} tokens: lower it, or raise --kv-cache-memory-bytes or --gpu-memory-utilization"
        )
    return config.max_model_len
