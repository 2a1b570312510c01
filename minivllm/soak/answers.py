"""What is asked, and what came: a whole answer that can be compared with that of an undisturbed run."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from minivllm.errors import MiniVLLMError
from minivllm.event_stream import ServerError, post_events

_RETRY_STATUS = (httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.TOO_MANY_REQUESTS)
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


class NoAnswerError(MiniVLLMError):
    """The stream ended with an error, or without an end."""


class RefusedError(NoAnswerError):
    """An honest refusal, for now: loading, restarting, too much to do. The client comes again."""


@dataclass(frozen=True)
class Answer:
    """All that a client can compare; the number of events and their bundling may differ from run to run."""

    text: str
    token_ids: list[int] = field(repr=False)
    finish_reason: str
    completion_tokens: int


def make_bodies(num: int, max_tokens: int, seed: int) -> list[dict[str, Any]]:
    """`num` different requests: greedy and seeded, with and without penalties and stop strings, short and long."""
    random_ = random.Random(seed)
    bodies: list[dict[str, Any]] = []
    for index in range(num):
        body = {
            "prompt": f"{index}: " + " ".join(random_.choices(_WORDS, k=random_.randint(3, 40))),
            "max_tokens": random_.randint(max_tokens // 2, max_tokens),
            "min_tokens": max_tokens // 4,
            **({"temperature": 0} if index % 2 else {"temperature": 0.9, "seed": index, "top_p": 0.95}),
        }
        if index % 4 >= 2:
            body |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
        body |= {"stop": [" never said", "\n\n\n"]} if index % 3 == 0 else {"ignore_eos": True}
        bodies.append(body)
    return bodies


async def ask(http: httpx.AsyncClient, body: dict[str, Any], on_event: Callable[[float], None]) -> Answer:
    """Stream one answer; `on_event` gets the time (monotonic) of each event. Raises `NoAnswerError`, `RefusedError`."""
    text: list[str] = []
    token_ids: list[int] = []
    try:
        async for event in post_events(http, "/generate", body):
            on_event(time.monotonic())
            text.append(event["text"])
            token_ids += event["token_ids"]
            if event["finish_reason"] is not None:
                usage = event["usage"]["completion_tokens"]
                return Answer("".join(text), token_ids, event["finish_reason"], usage)
    except ServerError as error:
        kind = RefusedError if error.status in _RETRY_STATUS else NoAnswerError
        raise kind(f"after {len(token_ids)} tokens: {error}") from error
    raise NoAnswerError(f"the stream ended after {len(token_ids)} tokens without an end")
