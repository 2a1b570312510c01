"""Frames that no engine core sends, at a frontend's socket: dropped, or a new session begins; clients are answered."""

import random
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from minivllm.protocol import (
    ChannelState,
    Dead,
    EngineStats,
    Error,
    Explained,
    Finished,
    Outputs,
    Ready,
    Released,
    Stats,
    View,
    encode,
)
from tests.support import views
from tests.support.fake_engine import FakeEngine
from tests.support.hostile_frames import hostile_frames
from tests.unit.frontend.running import RunningFrontend

NUM_MESSAGES, PER_ROUND = 1000, 100
MAX_GROWTH = 16 * 2**20


def honest_frames(engine: FakeEngine) -> list[bytes]:
    """Of each kind, about a request that nobody sent."""
    epoch = engine.epoch
    messages = (
        Ready(epoch, engine.facts),
        Outputs(epoch, 0, ["nobody's"], [2], [5, 6], {"nobody's": Finished("stop", 6, 4, 0.1)}),
        Error(epoch, 1, "nobody's", "invalid_request", "max_tokens is …", "max_tokens"),
        Released(epoch, 2, ["nobody's"]),
        Stats(epoch, ChannelState(3), EngineStats(num_requests_running=2)),
        Dead(epoch, "stopped"),
        View(epoch, views.view(3.0, [views.prefill(1, 2.0, 7, 0, 5)], [views.row(7, "r")])),
        Explained(epoch, "nobody's", None),
    )
    return [bytes(encode(message)) for message in messages]


def test_a_thousand_hostile_messages_are_dropped_and_clients_are_answered(
    engine: FakeEngine, frontend: RunningFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    rng, honest, process = random.Random(1), honest_frames(engine), psutil.Process()
    engine.step_seconds = 0.01
    memory = 0

    def ask(_: int) -> int:
        response = frontend.generate(prompt="hello world", max_tokens=20, stream=False)
        assert response.status_code in {200, 503}, response.text
        return response.status_code

    statuses = []
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, NUM_MESSAGES, PER_ROUND):
            if start == 2 * PER_ROUND:  # warmed up
                memory = process.memory_info().rss
            answers = pool.map(ask, range(4))
            for _ in range(PER_ROUND):
                engine.send_raw(*hostile_frames(rng, honest))
            statuses += list(answers)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
    assert statuses.count(200) > len(statuses) / 2
    assert process.memory_info().rss < memory + MAX_GROWTH
    frontend.wait_until_ready()
    assert frontend.generate(prompt="hello", max_tokens=5, stream=False).json()["usage"]["completion_tokens"] == 5
    assert frontend.is_idle()


def test_a_message_of_more_or_fewer_frames_is_dropped(
    engine: FakeEngine, frontend: RunningFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    dead = bytes(encode(Dead(engine.epoch, "stopped")))
    engine.send_raw()
    engine.send_raw(b"", dead)
    engine.send_raw(dead, dead, dead)
    assert frontend.generate(prompt="hello", max_tokens=5, stream=False).status_code == 200
    assert [caplog.text.count(f"dropped a message of {count} frames") for count in (1, 3, 4)] == [1, 1, 1]
