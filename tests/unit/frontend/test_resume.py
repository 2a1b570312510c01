"""Streams over lost messages and dead engine cores: they pause, then continue with no token lost or repeated."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minivllm.protocol import Add
from tests.support.events import parse_events
from tests.support.fake_engine import FakeEngine
from tests.unit.frontend.running import RunningFrontend, read_until

StartFrontend = Callable[..., RunningFrontend]
TOKENS = [70 + i % 50 for i in range(120)]


@contextmanager
def begun(frontend: RunningFrontend, engine: FakeEngine, **body: Any) -> Iterator[Iterator[Any]]:
    """A stream of `TOKENS` whose first event has come; `tokens_of` the rest must be the rest."""
    engine.script = lambda add: TOKENS
    engine.step_seconds = 0.01
    request = {"prompt": "a", "max_tokens": len(TOKENS), **body}
    with frontend.http.stream("POST", "/generate", json=request) as response:
        events = parse_events(response.iter_lines())
        assert next(events)["token_ids"] == TOKENS[:1]
        yield events


def tokens_of(events: Iterator[Any]) -> list[int]:
    """The tokens of a stream that ends well; usage must count each once."""
    *middle, last, done = events
    assert (done, last["finish_reason"]) == ("[DONE]", "length")
    assert last["usage"]["completion_tokens"] == len(TOKENS)
    return [token for event in (*middle, last) for token in event["token_ids"]]


def engine_like(socket_dir: Path) -> FakeEngine:
    engine = FakeEngine(socket_dir)
    engine.script = lambda add: TOKENS
    return engine


@pytest.mark.parametrize("num_lost", [1, 7])
def test_lost_messages_are_repaired(num_lost: int, frontend: RunningFrontend, engine: FakeEngine) -> None:
    with begun(frontend, engine) as events:
        engine.lose_next = num_lost
        assert tokens_of(events) == TOKENS[1:]
    assert len(engine.adds) == 1
    assert engine.aborted == []


def test_a_lost_end_is_repaired(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.num_allowed = 2
    with begun(frontend, engine, max_tokens=2, request_id="short") as events:
        engine.script = lambda add: TOKENS
        engine.lose_next = 10  # all that comes from here on, until it is sent again
        assert next(events)["token_ids"] == TOKENS[1:2]


def test_a_stream_continues_on_a_new_engine_core(
    engine: FakeEngine, frontend: RunningFrontend, socket_dir: Path
) -> None:
    with begun(frontend, engine, request_id="r", seed=5, stop=["never"]) as events:
        engine.stop()
        assert frontend.wait_for("/health", 503)["status"] == "engine_restarting"
        assert frontend.wait_for("/ready", 503)["status"] == "engine_restarting"
        response = frontend.generate(prompt="a")
        assert (response.status_code, "retry-after" in response.headers) == (503, True)
        with engine_like(socket_dir) as successor:
            assert tokens_of(events) == TOKENS[1:]
            again, first = successor.adds["r"], engine.adds["r"]
            assert (again.prompt_token_ids, again.params) == (first.prompt_token_ids, first.params)
            assert again.output_token_ids == TOKENS[: len(again.output_token_ids)] != []
            assert frontend.http.get("/health").status_code == 200
            metrics = frontend.http.get("/metrics").text
    assert 'minivllm:engine_restarts_total{engine="0",model_name="test-model"} 1.0' in metrics
    assert 'minivllm:requests_resumed_total{engine="0",model_name="test-model"} 1.0' in metrics


def test_a_whole_answer_continues_too(engine: FakeEngine, frontend: RunningFrontend, socket_dir: Path) -> None:
    engine.script = lambda add: TOKENS
    engine.num_allowed = 5
    with frontend.open_raw(prompt="a", max_tokens=len(TOKENS), stream=False, request_id="r") as connection:
        engine.wait_for(lambda: engine.num_allowed == 0)
        engine.stop()
        with engine_like(socket_dir) as successor:
            answer = read_until(connection, b'"finish_reason":"length"')
            assert str(TOKENS).replace(" ", "").encode() in answer
            assert successor.adds["r"].output_token_ids == TOKENS[:5]


def test_a_waiting_client_sees_pings(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend(stream_ping_interval=0.05)
    frontend.wait_until_ready()
    engine.num_allowed = 1
    with frontend.open_raw(prompt="a", max_tokens=2) as connection:
        read_until(connection, b"data: ")
        engine.stop()
        frontend.wait_for("/health", 503)
        assert b": ping" in read_until(connection, b": ping\n\n")


def test_a_restart_that_nobody_noticed_resumes(engine: FakeEngine, frontend: RunningFrontend) -> None:
    """The new engine core is there before a ping could fail: its epoch tells."""
    with begun(frontend, engine, request_id="r") as events:
        engine.epoch += 1
        engine._requests.clear()
        assert tokens_of(events) == TOKENS[1:]
        assert engine.adds["r"].output_token_ids


def test_a_silent_engine_core_is_given_up_and_found_again(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend(engine_timeout=0.5)
    frontend.wait_until_ready()
    with begun(frontend, engine) as events:
        engine.silent = True
        assert "silent for" in frontend.wait_for("/health", 503)["message"]
        engine.silent = False
        assert tokens_of(events) == TOKENS[1:]
        frontend.wait_until_ready()


def test_released_requests_are_added_again(frontend: RunningFrontend, engine: FakeEngine) -> None:
    with begun(frontend, engine, request_id="r") as events:
        engine.release_all()
        assert tokens_of(events) == TOKENS[1:]
    assert engine.adds["r"].output_token_ids
    assert frontend.http.get("/health").status_code == 200


def test_a_farewell_tells_the_reason(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.say_dead("out of disk")
    assert frontend.wait_for("/ready", 503)["message"] == "out of disk"


def test_nobody_waits_longer_than_the_resume_timeout(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend(resume_timeout=0.3)
    frontend.wait_until_ready()
    with begun(frontend, engine) as events:
        engine.stop()
        *_, error, done = events
    assert done == "[DONE]"
    assert error["error"]["code"] == "engine_gone"
    assert frontend.is_idle()


def test_a_client_that_leaves_meanwhile_is_not_resumed(
    engine: FakeEngine, frontend: RunningFrontend, socket_dir: Path
) -> None:
    with begun(frontend, engine, request_id="left"):
        engine.stop()
        frontend.wait_for("/health", 503)
    with begun_on_successor(frontend, socket_dir) as successor:
        assert successor.adds.keys() == {"other"}


def test_delete_works_meanwhile(engine: FakeEngine, frontend: RunningFrontend) -> None:
    with begun(frontend, engine, request_id="mine") as events:
        engine.stop()
        frontend.wait_for("/health", 503)
        assert frontend.http.delete("/v1/requests/mine").status_code == 202
        assert frontend.http.delete("/v1/requests/unknown").status_code == 503
        assert list(events)[-2]["finish_reason"] == "abort"


def test_another_model_does_not_continue_a_text(
    engine: FakeEngine, frontend: RunningFrontend, socket_dir: Path
) -> None:
    with begun(frontend, engine) as events:
        engine.stop()
        with FakeEngine(socket_dir, vocab_size=999):
            *_, error, _ = events
    assert "came back with another model" in error["error"]["message"]


@contextmanager
def begun_on_successor(frontend: RunningFrontend, socket_dir: Path) -> Iterator[FakeEngine]:
    with engine_like(socket_dir) as successor:
        frontend.wait_until_ready()
        frontend.events(prompt="a", max_tokens=2, request_id="other")
        yield successor


class DeadlyEngines:
    """Engine cores, one after the other, each of which dies of the request "poison" as soon as it has it."""

    def __init__(self, socket_dir: Path) -> None:
        self._socket_dir = socket_dir
        self.num_deaths = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.is_set():
            with FakeEngine(self._socket_dir) as engine:
                engine.script = partial(self._script, engine)
                while not self._done.is_set() and "poison" not in engine.adds:
                    self._done.wait(0.01)
                self.num_deaths += "poison" in engine.adds

    def _script(self, engine: FakeEngine, add: Add) -> list[int]:
        engine.holding = engine.holding or add.request_id == "poison"  # not a token comes after it
        return TOKENS

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()


@pytest.mark.parametrize("num_others", [0, 4])
def test_poison_is_failed_alone(num_others: int, socket_dir: Path, start_frontend: StartFrontend) -> None:
    frontend, engines = start_frontend(), DeadlyEngines(socket_dir)
    with engines.running(), ThreadPoolExecutor(num_others + 1) as pool:
        frontend.wait_until_ready()
        bodies = [{"prompt": "a", "max_tokens": len(TOKENS), "request_id": f"r{i}"} for i in range(num_others)]
        others = [pool.submit(frontend.generate, **body, stream=False) for body in bodies]
        poison = frontend.generate(prompt="a", max_tokens=5, request_id="poison", stream=False)
        assert poison.status_code == 500
        assert poison.json()["error"]["code"] == "engine_crashed_repeatedly"
        for other in others:
            assert other.result().json()["token_ids"] == TOKENS
    assert engines.num_deaths <= 4


def test_many_streams_over_several_deaths(frontend: RunningFrontend, engine: FakeEngine, socket_dir: Path) -> None:
    def script(add: Add) -> list[int]:
        return [(add.prompt_token_ids[0] + i) % 200 for i in range(150)]

    engine.script = script
    engine.step_seconds = 0.01
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(frontend.generate, prompt=[first], max_tokens=150, stream=False) for first in range(20)]
        engine.wait_for(lambda: len(engine.adds) == 20)
        for _ in range(3):
            engine.stop()
            frontend.wait_for("/health", 503)
            engine = FakeEngine(socket_dir).start()
            engine.script, engine.step_seconds = script, 0.01
            engine.wait_for(engine.is_under_way)
        for first, answer in enumerate(answers):
            assert answer.result().json()["token_ids"] == [(first + i) % 200 for i in range(150)]
        engine.stop()
