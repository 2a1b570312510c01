"""From a validated body to what the engine core takes: token ids that fit the context and complete parameters."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import msgspec

from frontend.batch_encoder import BatchEncoder
from frontend.schemas import Inputs
from frontend.tokenizer import Tokenizer
from minivllm.errors import InvalidRequestError
from minivllm.json_schema import check_json_schema
from minivllm.protocol import EngineFacts
from minivllm.sampling_params import SamplingParams

INLINE_CHARACTERS = 4096  # about a millisecond of work; longer text would hold up every other stream

T = TypeVar("T")


class NamesItsInput(Protocol):
    """Says which field an error about the prompt is about."""

    @property
    def param(self) -> str: ...


class Prompt(msgspec.Struct, frozen=True, eq=False):
    """What the model reads, and the text it came as, if it came as text."""

    token_ids: list[int]
    text: str | None = None


async def run_for_size(num_characters: int, work: Callable[[], T]) -> T:
    """`work()` here when it is short, in a thread when it is long."""
    return work() if num_characters <= INLINE_CHARACTERS else await asyncio.to_thread(work)


async def check_schema(schema: str | None, param: str) -> None:
    """Raises `InvalidRequestError` naming `param` for a schema that is wrong or not supported."""
    if schema is None:
        return
    try:
        await run_for_size(len(schema), lambda: check_json_schema(schema))
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{param}{str(error).removeprefix('json_schema')}", param) from None


async def prepare_prompts(inputs: Inputs, encoder: BatchEncoder, max_model_len: int | None) -> list[Prompt]:
    """The token ids of every prompt, or of the chat. Raises `InvalidRequestError` when one has none.

    Text that cannot be `max_model_len` tokens or less, however well it is tokenized, is refused at once.
    """
    given = [await _chat_text(inputs, encoder.tokenizer)] if inputs.messages else inputs.prompts
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    for text in texts:
        _check_size(inputs.param, text, encoder.tokenizer.max_token_bytes, max_model_len)
    encoded = iter(await encoder.encode(texts, inputs.add_special_tokens) if texts else ())
    prompts = [Prompt(next(encoded), each) if isinstance(each, str) else Prompt(each) for each in given]
    if not all(prompt.token_ids for prompt in prompts):
        raise InvalidRequestError(f"{inputs.param} holds no token", inputs.param)
    return prompts


async def _chat_text(inputs: Inputs, tokenizer: Tokenizer) -> str:
    chat = [message.as_template_input() for message in inputs.messages]
    size = sum(len(message["content"]) for message in chat)
    return await run_for_size(size, lambda: tokenizer.apply_chat_template(chat))


def _check_size(param: str, text: str, max_token_bytes: int | None, max_model_len: int | None) -> None:
    if max_token_bytes is None or max_model_len is None:
        return
    most = max_model_len * max_token_bytes
    if len(text) > most:
        raise InvalidRequestError(
            f"{param} has {len(text)} characters, but {max_model_len} tokens (max_model_len) hold at most {most}", param
        )


def fit_to_model(
    body: NamesItsInput, params: SamplingParams, prompt_token_ids: list[int], facts: EngineFacts
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
