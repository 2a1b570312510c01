"""Bounds of every sampling field, with the field's name in the refusal, in Python and on the wire."""

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.errors import InvalidRequestError
from minivllm.sampling_params import SamplingParams

INFINITY, NAN = float("inf"), float("nan")
BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {  # field: (accepted, refused)
    "temperature": ([0, 0.0, 1e-9, 100.0], [-0.1, 100.1, INFINITY, NAN]),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31, 2**64]),
    "top_p": ([1e-9, 1.0], [0.0, 1.0001, -1.0, NAN]),
    "min_p": ([0.0, 1.0], [-0.1, 1.1, NAN]),
    "repetition_penalty": ([0.01, 1.0, 100.0], [0.0, -1.0, 100.1, INFINITY, NAN]),
    "presence_penalty": ([-2.0, 2.0], [-2.1, 2.1, NAN]),
    "frequency_penalty": ([-2.0, 2.0], [-2.1, 2.1, NAN]),
    "logit_bias": ([{}, {5: 100.0, 6: -100.0}], [{5: 100.1}, {5: 0.0, 6: NAN}]),
    "seed": ([None, 0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1]),
    "stop": ([(), ("a", "\n")], [("",), ("a", "")]),
    "max_tokens": ([None, 1, 2**31 - 1], [0, -1, 2**31]),
    "min_tokens": ([0, 16], [-1, 17]),
    "logprobs": ([None, 0, 20], [-1, 21]),
    "prompt_logprobs": ([None, 0, 20], [-1, 21]),
}
CASES = [(field, value) for field, (accepted, _) in BOUNDS.items() for value in accepted]
BAD_CASES = [(field, value) for field, (_, refused) in BOUNDS.items() for value in refused]


@pytest.mark.parametrize(("field", "value"), CASES)
def test_values_within_bounds_survive_the_wire(field: str, value: Any) -> None:
    params = SamplingParams(**{field: value})
    assert getattr(params, field) == value
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(("field", "value"), BAD_CASES)
def test_values_out_of_bounds_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(("field", "value"), BAD_CASES)
def test_the_wire_refuses_what_python_refuses(field: str, value: Any) -> None:
    fields = list(msgspec.structs.astuple(SamplingParams()))
    fields[SamplingParams.__struct_fields__.index(field)] = value
    try:
        frame = msgspec.msgpack.encode(fields)
    except OverflowError:  # does not even fit into msgpack's integers
        return
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(frame, type=SamplingParams)


def test_min_tokens_is_bounded_without_max_tokens_too() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=1000).min_tokens == 1000
    with pytest.raises(InvalidRequestError, match="min_tokens must be between 0 and max_tokens"):
        SamplingParams(max_tokens=None, min_tokens=2**31)


def test_all_wire_integers_fit() -> None:
    """What is accepted can always be sent."""
    for field, value in CASES:
        assert msgspec.msgpack.encode(SamplingParams(**{field: value}))


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0.0, True), (9e-6, True), (1e-5, False), (1.0, False)])
def test_tiny_temperatures_are_greedy(temperature: float, is_greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy is is_greedy


@pytest.mark.parametrize(
    ("changes", "has_penalties"),
    [
        ({}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logit_bias": {1: 1.0}}, False),
    ],
)
def test_penalties_are_noticed(changes: dict[str, Any], has_penalties: bool) -> None:
    assert SamplingParams(**changes).has_penalties is has_penalties


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(BOUNDS)), st.floats() | st.integers(-(2**70), 2**70), max_size=3))
def test_numbers_are_accepted_or_refused_by_the_name_of_a_given_field(fields: dict[str, Any]) -> None:
    numeric = {name: value for name, value in fields.items() if name not in {"logit_bias", "stop"}}
    with suppress(InvalidRequestError):
        params = SamplingParams(**numeric)
        assert {name: getattr(params, name) for name in numeric} == numeric
        return
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(**numeric)
    assert refused.value.param in {*numeric, "min_tokens"}  # whose upper bound is max_tokens


def test_parameters_cannot_change() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().seed = 1  # type: ignore[misc]
