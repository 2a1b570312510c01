"""The openai package as its users call it, on the real default model."""

import asyncio
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

from frontend.tokenizer import Tokenizer
from tests.support.models import hf_model
from tests.support.server import ServerProcess

MODEL = "smol"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


class City(BaseModel):
    """What is asked for."""

    name: str = Field(max_length=20)
    is_capital: bool
    neighbours: list[Literal["Lyon", "Reims"]] = Field(max_length=2)


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", timeout=60, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "minivllm"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-5")


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=32)
    (choice,) = answer.choices
    assert "Paris" in (choice.message.content or "")
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_that_goes_on(client: openai.OpenAI) -> None:
    """The answer is sent back as the library gives it."""
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, stream_options={"include_usage": True}
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert "".join(deltas) == message.content
    assert "Paris" in (message.content or "")
    assert final.usage is not None
    follow_up: list[Any] = [*QUESTION, message.model_dump(), {"role": "user", "content": "And of Italy?"}]
    answer = client.chat.completions.create(model=MODEL, messages=follow_up, temperature=0, max_tokens=32)
    assert "Rome" in (answer.choices[0].message.content or "")


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Italy"]},
        "population_in_millions": {"type": "number", "minimum": 0, "maximum": 50},
    },
    "required": ["city", "country", "population_in_millions"],
    "additionalProperties": False,
}


def check_city(text: str | None) -> None:
    city = json.loads(text or "")
    assert list(city) == SCHEMA["required"]
    assert len(city["city"]) <= 20
    assert city["country"] in {"France", "Italy"}
    assert 0 <= city["population_in_millions"] <= 50


def test_answers_that_follow_a_schema(client: openai.OpenAI) -> None:
    """Several at once, greedy and sampled, whole and streamed, beside a free one that they leave alone."""
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    free = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(
            lambda: client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
        )
        answers = client.chat.completions.create(
            model=MODEL, messages=QUESTION, n=3, seed=1, max_tokens=200, response_format=response_format
        )
        assert beside.result().choices[0].message.content == free.choices[0].message.content
    for choice in answers.choices:
        assert choice.finish_reason == "stop"
        check_city(choice.message.content)
    events = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, max_tokens=200, response_format=response_format
    )
    check_city("".join(event.choices[0].delta.content or "" for event in events))


def test_any_object(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="A city as JSON:", temperature=0, max_tokens=150,
        extra_body={"response_format": {"type": "json_object"}},
    )  # fmt: skip
    (choice,) = answer.choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.text), dict)
    else:
        assert choice.text.lstrip().startswith("{")


def test_a_schema_as_a_class(client: openai.OpenAI) -> None:
    """`parse` sends the schema of a pydantic model and reads the answer back into one."""
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=200, response_format=City
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, response_format=bad, stream=True)


def test_completions_in_every_form(client: openai.OpenAI, default_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_directory(default_model_dir)
    texts = ["The capital of France is", "One, two, three,"]
    ids = [tokenizer.encode(text) for text in texts]
    forms: list[Any] = [texts[0], ids[0], texts, ids]
    answers = [
        client.completions.create(model=MODEL, prompt=form, temperature=0, max_tokens=4, n=1).choices for form in forms
    ]
    first = [choice.text for choice in answers[2]]
    assert "Paris" in first[0]
    assert [[choice.text for choice in choices] for choices in answers] == [first[:1], first[:1], first, first]
    stream = client.completions.create(model=MODEL, prompt=texts, temperature=0, max_tokens=4, stream=True)
    streamed = ["", ""]
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == first


def test_seeds_make_choices_that_can_be_had_again(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=1.2, seed=seed, n=3, max_tokens=12, extra_body={"top_k": 50}
        )
        return [choice.message.content for choice in answer.choices]

    first = draw(7)
    assert len(set(first)) > 1
    assert draw(7) == first


def test_echoed_log_probabilities_are_those_of_hugging_face(client: openai.OpenAI, default_model_dir: Path) -> None:
    """What an evaluation harness does: score a text by its tokens."""
    ids = Tokenizer.from_directory(default_model_dir).encode("The capital of France is Paris. It lies on the Seine.")
    with torch.inference_mode():
        expected = hf_model(default_model_dir)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = client.completions.create(
        model=MODEL, prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    token_logprobs: list[float | None] = list(logprobs.token_logprobs)
    assert len(token_logprobs) == len(ids) + 1
    assert token_logprobs[0] is None
    for place, token in enumerate(ids[1:]):
        logprob = token_logprobs[place + 1]
        assert logprob == pytest.approx(expected[place, token].item(), abs=1e-3)
        is_greedy = expected[place].argmax().item() == token
        assert (logprob == max(logprobs.top_logprobs[place + 1].values())) == is_greedy


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for token in logprobs.content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # greedy
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) < 1.0001
        assert token.bytes is not None
        assert bytes(token.bytes).decode() == token.token


def test_errors_are_the_librarys_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )
    assert tools.value.param == "tools"


def test_many_at_once_and_some_that_leave(base_url: str, server: ServerProcess) -> None:
    async def one(client: openai.AsyncOpenAI, leaves: bool) -> int:
        stream = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, stream=True, max_tokens=24, n=2, extra_body={"ignore_eos": True}
        )
        num_chunks = 0
        async for _ in stream:
            num_chunks += 1
            if leaves:
                await stream.close()
                break
        return num_chunks

    async def all_of_them() -> list[int]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=60, max_retries=0) as client:
            return await asyncio.gather(*(one(client, index % 2 == 0) for index in range(6)))

    before = server.settle().finished
    counts = asyncio.run(all_of_them())
    assert counts[::2] == [1, 1, 1]
    assert min(counts[1::2]) >= 4
    after = server.settle().finished
    assert after.get("length", 0) - before.get("length", 0) == 6
    assert after.get("abort", 0) - before.get("abort", 0) == 6
