"""Views over the wire: only for those who asked, for as long as they ask, at a bounded cost."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from engine_core import watching
from engine_core.watching import Pace
from minivllm import transport
from minivllm.engine_view import EngineView, RequestRow, StepRecord
from minivllm.protocol import EngineFacts, Explain, Explained, Stats, View, Watch, encode
from minivllm.sampling_params import SamplingParams
from tests.support.bare_frontend import Frontend, connected
from tests.support.engines import greedy
from tests.support.fake_runner import make_fake_engine
from tests.support.served_engine import ServedEngine

A, B = b"front--A", b"front--B"


@pytest.fixture
def served() -> Iterator[ServedEngine]:
    engine, _ = make_fake_engine(0, block_size=4, num_gpu_blocks_override=100, max_num_seqs=2, max_model_len=400)
    socket_dir = transport.make_socket_dir()
    facts = EngineFacts(1, "fake", "cpu", "float32", 5, 400, 2, 4, 100, 1, 1, [])
    with (
        patch.object(engine, "facts", return_value=facts),
        ServedEngine(engine, Path(socket_dir), heartbeat_seconds=0.05) as served,
    ):
        served.serve()
        yield served
    socket_dir.rmdir()


def watch(frontend: Frontend) -> None:
    frontend.send_frame(encode(Watch(frontend.frontend_id, at_once=True)))


def next_view(frontend: Frontend) -> EngineView:
    message = frontend.wait_for(lambda message: isinstance(message, View))
    assert isinstance(message, View)
    return message.view


def test_views_go_to_those_who_watch(served: ServedEngine) -> None:
    with connected(served.endpoints, A, B) as (watcher, other):
        watch(watcher)
        view = next_view(watcher)
        assert view.steps == []  # at once, although nothing happens
        has_blocks = view.blocks is not None  # not in every view: a map costs more than the rest
        other.add("r", [1] * 10, greedy(5))
        steps: list[StepRecord] = []
        requests: dict[str, RequestRow] = {}
        while "length" not in {row.finish_reason for row in requests.values()}:
            view = next_view(watcher)
            steps += view.steps
            has_blocks |= view.blocks is not None
            requests |= {row.request_id: row for row in view.requests}
        other.wait_finished("r")
        assert [step.kind for step in steps] == ["prefill"] + ["decode"] * 4
        assert steps[0].requests == steps[1].requests == [requests["r"].handle]
        assert [step.requests for step in steps if step.number > 2 and step.requests is not None] == []
        assert (requests["r"].num_tokens, view.generation_tokens, has_blocks) == (15, 5, True)


def test_watching_ends_unless_it_is_renewed(served: ServedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "WATCH_SECONDS", 0.2)
    with connected(served.endpoints, A) as (frontend,):
        watch(frontend)
        next_view(frontend)
        frontend.add("r", [1] * 10, SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True))
        frontend.wait_finished("r")
        frontend.wait_for(lambda message: isinstance(message, Stats) and not served.engine.records.recording, True)


def test_what_happened_to_a_request_can_be_asked_by_anybody(served: ServedEngine) -> None:
    with connected(served.endpoints, A, B) as (first, second):
        first.add("r", [1] * 10, greedy(5))
        first.wait_finished("r")
        for request_id, expected in (("r", "length"), ("nobody", None)):
            second.send_frame(encode(Explain(B, request_id)))
            answer = second.wait_for(lambda message: isinstance(message, Explained))
            assert isinstance(answer, Explained)
            assert answer.request_id == request_id
            assert (answer.timeline and answer.timeline.finish_reason) == expected


def test_waiting_requests_are_counted_and_the_first_described(
    served: ServedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_WAITING_ROWS", 3)
    with connected(served.endpoints, A) as (frontend,):
        watch(frontend)
        for index in range(10):
            frontend.add(str(index), [1] * 10, SamplingParams(temperature=0.0, max_tokens=390, ignore_eos=True))
        seen = frontend.wait_for(
            lambda message: isinstance(message, View) and message.view.num_running == 2 and message.view.num_waiting > 3
        )
        assert isinstance(seen, View)
        assert len([row for row in seen.view.requests if row.finish_reason is None]) == 5
        frontend.abort(*map(str, range(10)))
        frontend.wait_finished(*map(str, range(10)))


def test_what_costs_much_is_done_seldom() -> None:
    pace = Pace(min_interval=0.1, max_share=0.005)
    assert pace.is_due(50.0)
    pace.done(50.0, 50.0001)
    assert not pace.is_due(50.099)
    assert pace.is_due(50.101)
    pace.done(60.0, 60.01)
    assert not pace.is_due(61.9)
    assert pace.is_due(62.1)
