"""Every bad field is refused by name; what is accepted reaches the sampling parameters unchanged."""

import json
from typing import Any

import pytest

from frontend.request_body import parse_body
from frontend.request_preparation import fit_to_model
from frontend.schemas import DetokenizeRequest, GenerateRequest, TokenizeRequest
from minivllm.errors import InvalidRequestError
from minivllm.protocol import EngineFacts
from minivllm.sampling_params import SamplingParams

FACTS = EngineFacts(1, "m", "cpu", "float32", 1000, 100, 8, 16, 64, 1, 1, [])


def parse(**body: Any) -> GenerateRequest:
    return parse_body(GenerateRequest, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", ["prompt", "messages"]),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt", ["either"]),
        ({"prompt": 5}, "prompt", ["5"]),
        ({"prompt": []}, "prompt", ["at least 1"]),
        ({"prompt": [1, -2]}, "prompt", ["prompt[1]", "-2"]),
        ({"prompt": [1, "x"]}, "prompt", ["prompt[1]", "'x'"]),
        ({"messages": []}, "messages", ["at least 1"]),
        ({"messages": [{"role": "user"}]}, "messages", ["messages[0].content", "required"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", ["content[0]", "image_url"]),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages", ["messages[0].x"]),
        ({"prompt": "a", "unknown": 1}, "unknown", ["unknown"]),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", ["1", "got 0"]),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", ["integer", "'5'"]),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", ["1.5"]),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", ["True"]),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens", ["16", "17"]),
        ({"prompt": "a", "min_tokens": -1}, "min_tokens", ["-1"]),
        ({"prompt": "a", "temperature": -1}, "temperature", ["[0, 100]", "-1"]),
        ({"prompt": "a", "temperature": float("nan")}, "temperature", ["finite"]),
        ({"prompt": "a", "top_p": 0}, "top_p", ["(0, 1]", "0"]),
        ({"prompt": "a", "top_p": 1.5}, "top_p", ["(0, 1]", "1.5"]),
        ({"prompt": "a", "top_k": -2}, "top_k", ["-2"]),
        ({"prompt": "a", "min_p": 2}, "min_p", ["[0, 1]", "2"]),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", ["(0, 100]", "0"]),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", ["[-2, 2]", "3"]),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", ["[-2, 2]", "-3"]),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", ["[-100, 100]", "101"]),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", ["'x'"]),
        ({"prompt": "a", "seed": 2**64}, "seed", ["64 bits", str(2**64)]),
        ({"prompt": "a", "stop": ""}, "stop", ["empty"]),
        ({"prompt": "a", "stop": [1]}, "stop", ["stop[0]", "1"]),
        ({"prompt": "a", "stop": ["x"] * 65}, "stop", ["64", "65"]),
        ({"prompt": "a", "stop": "x" * 1025}, "stop", ["1024"]),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", ["-1"]),
        ({"prompt": "a", "include_stop_str_in_output": "yes"}, "include_stop_str_in_output", ["'yes'"]),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos", ["1"]),
        ({"prompt": "a", "skip_special_tokens": []}, "skip_special_tokens", ["[]"]),
        ({"prompt": "a", "stream": 1}, "stream", ["1"]),
        ({"prompt": "a", "request_id": "a b"}, "request_id", ["'a b'"]),
        ({"prompt": "a", "request_id": ""}, "request_id", ["''"]),
        ({"prompt": [1], "add_special_tokens": True}, "add_special_tokens", ["text"]),
    ],
)
def test_a_bad_field_is_named(body: dict[str, Any], param: str, words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(**body).params()
    assert caught.value.param == param
    for word in [param, *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "\\ud800"}']
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="not valid JSON"):
        parse_body(GenerateRequest, body)


def test_a_long_wrong_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(prompt="a", max_tokens="9" * 100_000)
    assert len(str(caught.value)) < 200


def test_every_field_reaches_the_parameters() -> None:
    given: dict[str, Any] = {
        "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 5,
        "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "ignore_eos": True,
        "include_stop_str_in_output": True, "skip_special_tokens": False,
    }  # fmt: skip
    body = parse(prompt="a", stop="x", stop_token_ids=[4], logit_bias={"3": 2}, json_schema={"b": 1, "a": {}}, **given)
    schema = '{"b":1,"a":{}}'
    assert body.params() == SamplingParams(
        stop=("x",), stop_token_ids=(4,), logit_bias={3: 2.0}, json_schema=schema, **given
    )


def test_null_means_default() -> None:
    fields = SamplingParams.__struct_fields__
    assert parse(prompt="a", **dict.fromkeys(fields)).params() == SamplingParams(max_tokens=16)
    assert parse(messages=[{"role": "user", "content": "a"}]).params().max_tokens is None


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = parse(messages=[{"role": "user", "content": parts, "name": "n"}]).messages
    assert messages is not None
    assert messages[0].as_template_input() == {"role": "user", "content": "a\nb", "name": "n"}


@pytest.mark.parametrize(
    ("body", "num_prompt_tokens", "param", "words"),
    [
        ({"prompt": "a", "max_tokens": 60}, 41, "max_tokens", ["41", "60", "101", "100"]),
        ({"prompt": "a"}, 100, "prompt", ["100"]),
        ({"messages": [{"role": "user", "content": "a"}]}, 120, "messages", ["120", "100"]),
        ({"prompt": "a", "stop_token_ids": [1000]}, 3, "stop_token_ids", ["1000"]),
        ({"prompt": "a", "logit_bias": {"1001": 1}}, 3, "logit_bias", ["1001", "1000"]),
    ],
)
def test_what_cannot_fit_is_named_with_the_numbers(
    body: dict[str, Any], num_prompt_tokens: int, param: str, words: list[str]
) -> None:
    request = parse(**body)
    with pytest.raises(InvalidRequestError) as caught:
        fit_to_model(request, request.params(), [1] * num_prompt_tokens, FACTS)
    assert caught.value.param == param
    for word in words:
        assert word in str(caught.value)


def test_a_prompt_of_unknown_ids_is_refused() -> None:
    request = parse(prompt=[1, 1000])
    with pytest.raises(InvalidRequestError, match="1000") as caught:
        fit_to_model(request, request.params(), [1, 1000], FACTS)
    assert caught.value.param == "prompt"


def test_a_chat_may_fill_the_context() -> None:
    request = parse(messages=[{"role": "user", "content": "a"}])
    assert fit_to_model(request, request.params(), [1] * 30, FACTS).max_tokens == 70


@pytest.mark.parametrize("kind", [TokenizeRequest, DetokenizeRequest])
def test_the_small_endpoints_refuse_unknown_fields(kind: type[TokenizeRequest] | type[DetokenizeRequest]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(kind, b'{"prompt": "a", "tokens": [1], "bad": 1}')
    assert "not a field" in str(caught.value)
