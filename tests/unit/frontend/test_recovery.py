"""Who is suspected of having killed the engine core, and what it takes to be convicted."""

from unittest.mock import Mock

from frontend import recovery
from frontend.live_request import LiveRequest
from minivllm.sampling_params import SamplingParams


def make_requests(names: str) -> dict[str, LiveRequest]:
    requests = {name: LiveRequest(name, [1], SamplingParams(), Mock(), Mock(), 0.0, 0.0) for name in names}
    for request in requests.values():
        request.submitted = True
    return requests


def resubmit(requests: dict[str, LiveRequest]) -> str:
    """The names of those that went."""
    names = []

    def submit(request: LiveRequest) -> None:
        request.submitted = True
        names.append(request.request_id)

    recovery.resubmit(requests.values(), submit)
    return "".join(names)


def bring_token(request: LiveRequest) -> None:
    request.num_crashes = request.num_trials_lost = 0


def test_after_one_death_all_go_at_once() -> None:
    requests = make_requests("abc")
    assert recovery.on_engine_gone(requests.values()) is None
    assert resubmit(requests) == "abc"


def test_deaths_with_progress_between_them_suspect_nobody() -> None:
    requests = make_requests("abc")
    for _ in range(20):
        assert recovery.on_engine_gone(requests.values()) is None
        assert resubmit(requests) == "abc"
        for request in requests.values():
            bring_token(request)


def test_the_only_one_without_progress_at_two_deaths_is_convicted() -> None:
    requests = make_requests("abc")
    recovery.on_engine_gone(requests.values())
    assert resubmit(requests) == "abc"
    bring_token(requests["a"])
    bring_token(requests["c"])
    assert recovery.on_engine_gone(requests.values()) is None, "it may have been killed from outside"
    assert resubmit(requests) == "ac"
    bring_token(requests["a"])
    bring_token(requests["c"])
    assert resubmit(requests) == "b"
    assert recovery.on_engine_gone(requests.values()) is requests["b"]


def test_a_token_clears_of_all_suspicion() -> None:
    requests = make_requests("a")
    for _ in range(5):
        assert recovery.on_engine_gone(requests.values()) is None
        resubmit(requests)
        assert recovery.on_engine_gone(requests.values()) is None
        resubmit(requests)
        bring_token(requests["a"])


def test_several_suspects_are_tried_one_at_a_time_after_the_others_run() -> None:
    requests = make_requests("abcd")
    recovery.on_engine_gone(requests.values())
    resubmit(requests)
    bring_token(requests["d"])
    assert recovery.on_engine_gone(requests.values()) is None
    assert resubmit(requests) == "d"
    assert resubmit(requests) == "", "d has not shown yet that it is harmless"
    bring_token(requests["d"])
    assert resubmit(requests) == "a"
    assert resubmit(requests) == ""
    bring_token(requests["a"])
    assert resubmit(requests) == "b"
    assert recovery.on_engine_gone(requests.values()) is None
    assert resubmit(requests) == "ad"
    bring_token(requests["a"])
    bring_token(requests["d"])
    assert resubmit(requests) == "c", "b comes after all others"
    bring_token(requests["c"])
    assert resubmit(requests) == "b"
    assert recovery.on_engine_gone(requests.values()) is requests["b"]


def test_what_waits_is_not_suspected() -> None:
    requests = make_requests("ab")
    requests["b"].submitted = False
    recovery.on_engine_gone(requests.values())
    assert (requests["a"].num_crashes, requests["b"].num_crashes) == (1, 0)
