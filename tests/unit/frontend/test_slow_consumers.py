"""Who reads slowly, a frontend or one client of many, waits alone; what waits for it is kept once, and merged."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from minivllm.protocol import EngineFacts
from tests.support.events import parse_events
from tests.support.fake_engine import FakeEngine
from tests.support.fake_runner import VOCAB_SIZE, continuation, make_fake_engine
from tests.support.served_engine import ServedEngine
from tests.unit.frontend.running import TIMEOUT, RunningFrontend

SECONDS_PER_MESSAGE = 0.01  # far more than the engine core needs for one
NUM_TOKENS = 300
PROMPT = [1, 2, 3]


@pytest.fixture
def served(socket_dir: Path) -> Iterator[ServedEngine]:
    """The real engine core and its server, on a device that only pretends."""
    engine, _ = make_fake_engine(1, block_size=4, num_gpu_blocks_override=400, max_num_seqs=8, max_model_len=400)
    facts = EngineFacts(1, "fake", "cpu", "float32", VOCAB_SIZE, 400, 8, 4, 400, 1, 1, [])
    engine.facts = lambda pid: facts  # type: ignore[method-assign]
    with ServedEngine(engine, socket_dir, heartbeat_seconds=0.05) as served:
        served.serve()
        yield served


def test_a_slow_frontend_delays_its_own_clients_only(
    served: ServedEngine, start_frontend: Callable[..., RunningFrontend]
) -> None:
    slow = start_frontend(enable_debug=True, inject_faults=f"slow={SECONDS_PER_MESSAGE}")
    fast = start_frontend()
    slow.wait_until_ready()
    fast.wait_until_ready()
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    expected = continuation(PROMPT, len(PROMPT) + NUM_TOKENS, frozenset())
    with slow.http.stream("POST", "/generate", json=body) as response:
        events = parse_events(response.iter_lines())
        first = list(islice(events, 3))  # it writes while it reads
        answers = [fast.generate(**body, stream=False).json()["token_ids"] for _ in range(3)]
        assert answers == [expected] * 3
        channels = [frontend.channel for frontend in served.server._frontends.values()]
        assert sum(channel.state.num_sent for channel in channels) == 4 * NUM_TOKENS  # the engine core did not wait
        assert max(len(channel._unconfirmed) for channel in channels) > NUM_TOKENS / 4
        assert slow.http.get("/health").status_code == 200
        *rest, done = events
    assert done == "[DONE]"
    assert [token for event in (*first, *rest) for token in event["token_ids"]] == expected
    slow.wait_for("/ready", 200)
    wait_until_confirmed(served, slow, fast)


def wait_until_confirmed(served: ServedEngine, *frontends: RunningFrontend) -> None:
    """The engine core keeps no message any more: each was read, and a ping said so."""
    for frontend in frontends:
        assert frontend.is_idle()
    served.wait_for(lambda: not any(f.channel._unconfirmed for f in served.server._frontends.values()))


def test_one_client_that_does_not_read_among_many_that_do(engine: FakeEngine, frontend: RunningFrontend) -> None:
    """Its answer is larger than all buffers of the system: the rest waits in its mailbox, merged."""
    num_steps, per_step = 1000, 2000
    whole = [70 + number % 50 for number in range(num_steps * per_step)]
    engine.tokens_per_step = per_step
    engine.script = lambda add: whole if add.request_id == "slow" else add.prompt_token_ids * 2000
    with frontend.open_raw(prompt=[70], request_id="slow", max_tokens=200) as slow:
        engine.wait_for(engine.is_under_way)
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda n: frontend.generate(prompt=[70 + n], stream=False).json(), range(24))
            assert {len(answer["token_ids"]) for answer in answers} == {2000}
        engine.wait_for(lambda: not engine._requests)
        received = read_all(slow)
    events = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert [token for event in events for token in event["token_ids"]] == whole
    assert len(events) < num_steps / 2
    assert frontend.is_idle()


def read_all(connection: socket.socket) -> bytes:
    pieces: list[bytes] = []
    connection.settimeout(TIMEOUT)
    while not pieces or b"[DONE]" not in pieces[-1][-100:]:
        pieces.append(connection.recv(2**20))
        assert pieces[-1]
    return b"".join(pieces)
