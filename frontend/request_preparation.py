"""From a validated body to what the engine core takes: token ids that fit the context and complete parameters."""

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from frontend.schemas import GenerateRequest, PromptFields
from frontend.tokenizer import Tokenizer
from minivllm.errors import InvalidRequestError
from minivllm.protocol import EngineFacts
from minivllm.sampling_params import SamplingParams

INLINE_CHARACTERS = 4096  # about a millisecond of tokenizing; longer text would hold up every other stream

T = TypeVar("T")


async def run_for_size(num_characters: int, work: Callable[[], T]) -> T:
    """`work()` here when it is short, in a thread when it is long."""
    return work() if num_characters <= INLINE_CHARACTERS else await asyncio.to_thread(work)


async def tokenize(body: PromptFields, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt or the chat. Raises `InvalidRequestError` when there are none."""
    if isinstance(body.prompt, list):
        return body.prompt
    if body.prompt is not None:
        prompt, add_special_tokens = body.prompt, body.add_special_tokens is not False
        token_ids = await run_for_size(len(prompt), lambda: tokenizer.encode(prompt, add_special_tokens))
    else:
        messages = [message.as_template_input() for message in body.messages or []]
        size = sum(len(message["content"]) for message in messages)
        token_ids = await run_for_size(
            size, lambda: tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
        )
    if not token_ids:
        raise InvalidRequestError(f"{body.param} holds no token", body.param)
    return token_ids


def fit_to_model(
    body: GenerateRequest, params: SamplingParams, prompt_token_ids: list[int], facts: EngineFacts
) -> SamplingParams:
    """Parameters with `max_tokens` filled in. Raises `InvalidRequestError` with the numbers for what cannot fit."""
    _check_token_ids(body.param, prompt_token_ids, facts.vocab_size)
    _check_token_ids("stop_token_ids", params.stop_token_ids, facts.vocab_size)
    _check_token_ids("logit_bias", params.logit_bias, facts.vocab_size)
    room = facts.max_model_len - len(prompt_token_ids)
    if room < 1:
        raise InvalidRequestError(
            f"{body.param} has {len(prompt_token_ids)} tokens, which leaves no room for output: "
            f"the context holds {facts.max_model_len} (max_model_len)",
            body.param,
        )
    if params.max_tokens is None:
        return msgspec.structs.replace(params, max_tokens=room)
    if params.max_tokens > room:
        raise InvalidRequestError(
            f"{len(prompt_token_ids)} prompt tokens + max_tokens {params.max_tokens} = "
            f"{len(prompt_token_ids) + params.max_tokens}, but the context holds {facts.max_model_len} (max_model_len)",
            "max_tokens",
        )
    return params


def _check_token_ids(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequestError(f"{param} holds token id {largest}, but the vocabulary has {vocab_size}", param)
