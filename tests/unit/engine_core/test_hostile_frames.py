"""Frames that no frontend sends, at the engine core's socket: dropped or refused, and another frontend goes on."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from minivllm import transport
from minivllm.protocol import Abort, Add, ChannelState, EngineFacts, Explain, Hello, Ping, Watch, encode
from minivllm.sampling_params import SamplingParams
from tests.support.bare_frontend import connected
from tests.support.engines import greedy
from tests.support.fake_runner import VOCAB_SIZE, continuation, make_fake_engine
from tests.support.hostile_frames import hostile_frames
from tests.support.served_engine import ServedEngine

GOOD, BAD = b"front--A", b"front--X"
NUM_MESSAGES, PER_ROUND = 1000, 50
MAX_GROWTH = 8 * 2**20
LEASE = 1.0
HONEST = [
    bytes(encode(message))
    for message in (
        Hello(BAD),
        Add(BAD, 0, "x", [1, 2, 3], SamplingParams(max_tokens=5, stop=("a",), logit_bias={1: 2.0})),
        Add(BAD, 1, "y", [1], SamplingParams(temperature=0.5, seed=3, logprobs=1), [2, 3]),
        Abort(BAD, 2, ["x", "z"]),
        Ping(BAD, ChannelState(3, 0, 0)),
        Watch(BAD, at_once=True),
        Explain(BAD, "x"),
    )
]


@pytest.fixture
def served() -> Iterator[ServedEngine]:
    engine, _ = make_fake_engine(1, block_size=4, num_gpu_blocks_override=100, max_num_seqs=4, max_model_len=100)
    facts = EngineFacts(1, "fake", "cpu", "float32", VOCAB_SIZE, 100, 4, 4, 100, 1, 1, [])
    socket_dir = transport.make_socket_dir()
    engine.facts = lambda pid: facts  # type: ignore[method-assign]
    with ServedEngine(engine, Path(socket_dir), heartbeat_seconds=0.05, lease_seconds=LEASE) as served:
        served.serve()
        yield served
    socket_dir.rmdir()


def test_a_thousand_hostile_messages_are_dropped_and_others_are_served(served: ServedEngine) -> None:
    rng = random.Random(1)
    process = psutil.Process()
    memory = 0
    with connected(served.endpoints, GOOD) as (good,), connected(served.endpoints, BAD) as (bad,):
        for start in range(0, NUM_MESSAGES, PER_ROUND):
            if start == NUM_MESSAGES // 4:  # warmed up
                memory = process.memory_info().rss
            for _ in range(PER_ROUND):
                bad.send_frames(hostile_frames(rng, HONEST))
            name = f"good-{start}"
            good.add(name, [1, 2, start % VOCAB_SIZE], greedy(8))
            good.ping()
            good.wait_finished(name)
            assert good.tokens.pop(name) == continuation([1, 2, start % VOCAB_SIZE], 11, frozenset())
        assert process.memory_info().rss < memory + MAX_GROWTH
        assert served.error is None
    wait_until_forgotten(served)


def wait_until_forgotten(served: ServedEngine) -> None:
    """Nobody is left who spoke, or was spoken of, once the lease is over."""
    deadline = time.monotonic() + 10 * LEASE
    with connected(served.endpoints, GOOD) as (good,):
        while served.server._frontends.keys() != {GOOD}:
            assert time.monotonic() < deadline, served.server._frontends
            good.ping()
            good.receive()


def test_a_frame_with_company_is_dropped(served: ServedEngine, caplog: pytest.LogCaptureFixture) -> None:
    with connected(served.endpoints, GOOD) as (good,):
        add = encode(Add(GOOD, 0, "twice", [1], greedy(2)))
        good.send_frames([bytes(add), bytes(add)])
        good.send_frames([b"", bytes(add)])
        good.add("once", [1], greedy(2))
        good.wait_finished("once")
        assert good.reasons == {"once": "length"}
    assert caplog.text.count("dropped a message of 2 frames") == 2


def test_numbers_beyond_all_counting_do_no_harm(served: ServedEngine) -> None:
    with connected(served.endpoints, BAD) as (bad,), connected(served.endpoints, GOOD) as (good,):
        for number in (2**62, 2**63 - 1, 2**63, 2**64 - 1):
            for message in (Ping(BAD, ChannelState(number, 0, number)), Abort(BAD, number, [])):
                bad.send_frame(encode(message))
        good.add("a", [1], greedy(2))
        good.wait_finished("a")
    assert served.error is None
