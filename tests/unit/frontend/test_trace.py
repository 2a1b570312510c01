"""Views → slices: every stage of a request once, without gaps, whatever happens to it."""

from collections import deque
from typing import Any

from frontend.engine_watch import HttpSpan
from frontend.trace import TraceBuilder, as_json
from minivllm.engine_view import EngineView
from minivllm.protocol import EngineFacts, View
from tests.support.views import decode, prefill, row, view

FACTS = EngineFacts(100, "m", "cpu", "float32", 10, 64, 4, 16, 8, 1, 1, [])


def trace(*views: EngineView, spans: tuple[HttpSpan, ...] = ()) -> list[dict[str, Any]]:
    builder = TraceBuilder(FACTS)
    events = builder.start()
    for one in views:
        events += builder.add(View(1, one), deque(spans))
    return events + builder.finish()


def slices(events: list[dict[str, Any]], name: str) -> list[tuple[str, float, float]]:
    """(what, from second, to second) on the track of that name."""
    tracks = {
        (event["pid"], event["tid"])
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name" and event["args"]["name"] == name
    }
    return [
        (event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event["ph"] == "X" and (event["pid"], event["tid"]) in tracks
    ]


def test_the_life_of_a_request() -> None:
    steps = [
        prefill(1, 2.0, 1, 0, 3, started=[1]),
        prefill(2, 3.0, 1, 3, 2, sampled=[1]),
        decode(3, 3.5, [1]),
        decode(4, 4.0, [2], preempted=[1]),
        prefill(5, 5.0, 1, 0, 6, sampled=[1]),
        decode(6, 6.0, [1, 2], finished={1: "length"}),
    ]
    ended = row(1, "r", finish_time=6.5, finish_reason="length")
    events = trace(view(1.0, [], [row(1, "r", status="waiting")]), view(7.0, steps, [ended]))
    assert slices(events, "r") == [
        ("queued", 1.0, 2.0),
        ("prefill 0:3", 2.0, 2.5),
        ("between chunks", 2.5, 3.0),
        ("prefill 3:5", 3.0, 3.5),
        ("decode", 3.5, 4.0),
        ("preempted", 4.0, 5.0),
        ("prefill 0:6", 5.0, 5.5),
        ("decode", 5.5, 6.5),
    ]
    assert [name for name, *_ in slices(events, "passes")] == [step.kind for step in steps]
    assert events[-1]["args"].get("outcome") is None or events[-1]["args"]["outcome"] == "length"


def test_what_began_before_and_what_goes_on_is_cut_off() -> None:
    events = trace(view(10.0, [decode(8, 9.0, [1])], [row(1, "r")]), view(12.0, [decode(9, 11.0, None)], [row(1, "r")]))
    assert slices(events, "r") == [("decode", 9.0, 12.0)]
    assert [event["args"]["outcome"] for event in events if "outcome" in event["args"]] == ["running"]


def test_a_request_that_was_never_scheduled_and_one_that_died_in_flight() -> None:
    first = row(1, "waiting", finish_time=3.0, finish_reason="abort", status="finished")
    second = row(2, "decoding", finish_time=3.2, finish_reason="abort", status="finished")
    events = trace(view(0.5, [], []), view(4.0, [prefill(1, 3.0, 2, 0, 5, sampled=[2])], [first, second]))
    assert slices(events, "waiting") == [("queued", 1.0, 3.0)]
    assert slices(events, "decoding") == [("queued", 2.0, 3.0), ("prefill 0:5", 3.0, 3.5)]


def test_what_this_frontend_saw_has_a_track_too() -> None:
    spans = (HttpSpan("r", 0.5, 1.5, 3.0, "stop"), HttpSpan("refused", 1.0, 0.0, 1.0, "error"))
    events = trace(view(4.0, [], [row(1, "r")]), spans=spans)
    requests = [event for event in events if event["name"] == "request"]
    assert [(event["tid"], event["ts"], event["dur"]) for event in requests] == [(1, 5e5, 2.5e6), (0, 1e6, 0.0)]
    assert requests[0]["args"] == {"finish_reason": "stop", "TTFT ms": 1000.0}


def test_counters() -> None:
    events = trace(view(4.0, [prefill(1, 2.0, 1, 0, 5, sampled=[1]), decode(2, 2.5, [1, 2])], []))
    values = {event["name"]: event["args"] for event in events if event["ph"] == "C"}
    assert values["batch"] == {"requests": 2}
    assert values["KV blocks"] == {"used": 3}
    assert values["tokens/s"] == {"generated": 3.0}
    assert as_json(events).count(b'"ph"') == len(events)
