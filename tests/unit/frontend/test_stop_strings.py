"""Stop strings end the text at the same place however it arrives, and no part of one ever gets out."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.detokenizer import IncrementalDetokenizer
from frontend.stop_strings import StopStringMatcher
from frontend.tokenizer import Tokenizer
from minivllm.sampling_params import SamplingParams

letters = st.text("ab.", max_size=20)
stops = st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3)


def reference(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """Letter by letter over the whole text: the first moment at which it ends with a stop string."""
    for end in range(1, len(text) + 1):
        matches = [each for each in stop if text[:end].endswith(each)]
        if matches:
            longest = max(matches, key=len)
            return (text[:end] if include else text[: end - len(longest)]), longest
    return text, None


@settings(max_examples=400, deadline=None)
@given(text=letters, stop=stops, cuts=st.lists(st.integers(0, 20), max_size=6), include=st.booleans())
def test_equals_the_reference_for_every_cut(text: str, stop: list[str], cuts: list[int], include: bool) -> None:
    matcher, shown = StopStringMatcher(stop, include), ""
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(places):
        if matcher.matched is None:
            shown += matcher.push(text[start:end])
        expected, _ = reference(text, stop, include)
        assert expected.startswith(shown), "part of a stop string got out"
    shown += matcher.flush()
    assert (shown, matcher.matched) == reference(text, stop, include)


def test_text_that_cannot_become_a_stop_string_is_not_held() -> None:
    matcher = StopStringMatcher(["END"])
    assert [matcher.push(piece) for piece in ("abcE", "N", "x", "EN", "D")] == ["abc", "", "ENx", "", ""]
    assert matcher.matched == "END"


@pytest.mark.parametrize("bundle", [1, 2, 100])
@pytest.mark.parametrize("include", [False, True])
def test_tokens_after_the_stop_string_do_not_count(tokenizer: Tokenizer, bundle: int, include: bool) -> None:
    token_ids = tokenizer.encode("hello wörld stop hello hello")
    params = SamplingParams(stop=("rld st",), include_stop_str_in_output=include)
    detokenizer, text = IncrementalDetokenizer(tokenizer, params), ""
    for start in range(0, len(token_ids), bundle):
        text += detokenizer.add(token_ids[start : start + bundle])
    text += detokenizer.finish()
    assert (text, detokenizer.stopped) == ("hello wörld st" if include else "hello wö", True)
    shown = tokenizer.decode(token_ids[: detokenizer.num_tokens])
    assert "rld st" in shown
    assert "rld st" not in tokenizer.decode(token_ids[: detokenizer.num_tokens - 1])


def test_min_tokens_puts_the_stop_string_off(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("stop") + tokenizer.encode(" hello stop")
    params = SamplingParams(stop=("stop",), min_tokens=len(tokenizer.encode("stop")))
    detokenizer = IncrementalDetokenizer(tokenizer, params)
    assert detokenizer.add(token_ids) + detokenizer.finish() == "stop hello "
