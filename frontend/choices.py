"""The choices of one HTTP request: each is a request of its own to the engine core, all live and die together.

prompts × n ─▶ submit ─▶ Choice 0, 1, …   ─▶ arrivals: what their streams bring, in the order it comes
                                          ─▶ whole_answers: everything, choice by choice
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec

from frontend.engine_client import EngineClient
from frontend.live_request import LiveRequest
from frontend.output_stream import Chunk
from frontend.request_preparation import Prompt
from minivllm.errors import MiniVLLMError
from minivllm.sampling_params import SamplingParams

MAX_CHOICES = 2048  # of one HTTP request


class Choice(msgspec.Struct, frozen=True, eq=False):
    """One answer to one prompt. `number` counts the answers to the same prompt."""

    index: int
    number: int
    prompt: Prompt
    params: SamplingParams
    request: LiveRequest


Arrival = tuple[Choice, Chunk | None]  # None: nothing new, but the client should see that the server is alive


@contextmanager
def submit(
    engine: EngineClient,
    request_id: str,
    work: Sequence[tuple[Prompt, SamplingParams]],
    num_choices: int,
    arrival_time: float,
) -> Iterator[list[Choice]]:
    """`num_choices` answers to each prompt of `work`, while the response is written; what is unfinished is aborted."""
    choices: list[Choice] = []
    alone = len(work) * num_choices == 1
    with ExitStack() as live:
        for prompt, params in work:
            for number in range(num_choices):
                own = _with_own_seed(params, number)
                name = request_id if alone else part_id(request_id, len(choices))
                request = live.enter_context(engine.generate(name, prompt.token_ids, own, arrival_time))
                choices.append(Choice(len(choices), number, prompt, own, request))
        yield choices


def part_id(request_id: str, index: int) -> str:
    """The id of one of several choices at the engine core."""
    return f"{request_id}-{index}"


def all_ids(request_id: str) -> list[str]:
    """Every id that the engine core may know `request_id` by, so that any frontend can abort it."""
    return [request_id, *(part_id(request_id, index) for index in range(MAX_CHOICES))]


def _with_own_seed(params: SamplingParams, number: int) -> SamplingParams:
    """The first choice draws with the seed that was given, the others with the next ones."""
    if params.seed is None or number == 0:
        return params
    seed = (params.seed + number + 2**63) % 2**64 - 2**63  # as signed 64 bits
    return msgspec.structs.replace(params, seed=seed)


def arrivals(choices: Sequence[Choice]) -> AsyncGenerator[Arrival]:
    """What the streams bring until all have ended. Raises the error of the first that fails."""
    return _follow(choices[0]) if len(choices) == 1 else _follow_all(choices)


async def _follow_all(choices: Sequence[Choice]) -> AsyncGenerator[Arrival]:
    queue: asyncio.Queue[Arrival | MiniVLLMError] = asyncio.Queue(maxsize=1)  # what waits is merged in the streams
    tasks = [asyncio.create_task(_pump(choice, queue)) for choice in choices]
    num_open = len(choices)
    try:
        while num_open:
            arrival = await queue.get()
            if isinstance(arrival, MiniVLLMError):
                raise arrival
            num_open -= _is_last(arrival[1])
            yield arrival
    finally:
        for task in tasks:
            task.cancel()


async def whole_answers(choices: Sequence[Choice]) -> list[Chunk]:
    """All that each choice brings, in order. Raises the error of one that fails."""
    return [await _whole_answer(choice) for choice in choices]


async def _whole_answer(choice: Choice) -> Chunk:
    whole, texts = Chunk("", []), []
    async for _, chunk in _follow(choice):
        if chunk is not None:
            texts.append(chunk.text)
            whole.append(chunk)
    whole.text = "".join(texts)
    return whole


async def _follow(choice: Choice) -> AsyncGenerator[Arrival]:
    chunk = None
    while not _is_last(chunk):
        chunk = await choice.request.stream.get()
        yield choice, chunk


async def _pump(choice: Choice, queue: "asyncio.Queue[Arrival | MiniVLLMError]") -> None:
    try:
        async for arrival in _follow(choice):
            await queue.put(arrival)
    except MiniVLLMError as error:
        await queue.put(error)


def _is_last(chunk: Chunk | None) -> bool:
    return chunk is not None and chunk.finished is not None


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts so far. A prompt counts once, however many answers it gets."""
    prompts = [choice.request for choice in choices if choice.number == 0] or [choice.request for choice in choices]
    num_prompt_tokens = sum(request.num_prompt_tokens for request in prompts)
    num_output_tokens = sum(choice.request.num_output_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(request.num_cached_tokens for request in prompts)},
    }
