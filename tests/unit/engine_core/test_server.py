"""The engine core's sockets: handshake, routing, garbage, and every way in which a frontend goes away."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from engine_core.engine import EngineCore, RequestOutput
from minivllm import transport
from minivllm.config import EngineConfig
from minivllm.protocol import (
    Add,
    ChannelState,
    Dead,
    EngineMessage,
    Error,
    Outputs,
    Ping,
    Released,
    Stats,
    encode,
)
from minivllm.sampling_params import SamplingParams
from tests.support.bare_frontend import Frontend, connected
from tests.support.engines import greedy
from tests.support.served_engine import ServedEngine

A, B = b"front--A", b"front--B"
ENDLESS = SamplingParams(temperature=0.0, max_tokens=50_000, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with a context so long that requests never end by themselves."""
    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=60_000, eos_token_id=None,
    ).save_pretrained(directory)  # fmt: skip
    return directory


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    directory = transport.make_socket_dir()
    yield directory
    directory.rmdir()  # fails where a socket file was left behind


@pytest.fixture
def served(model_dir: Path, socket_dir: Path) -> Iterator[ServedEngine]:
    """Bound, loaded, not serving yet."""
    with serve_engine(model_dir, socket_dir) as served:
        yield served


def serve_engine(model_dir: Path, socket_dir: Path, **options: Any) -> ServedEngine:
    config = EngineConfig(
        model=str(model_dir), load_format="dummy", device="cpu", num_gpu_blocks_override=4000, max_num_seqs=8
    )
    return ServedEngine(EngineCore(config, model_dir), socket_dir, heartbeat_seconds=0.05, **options)


def idle_after(num_aborted: int) -> Callable[[EngineMessage], bool]:
    """Statistics that say: so many requests were aborted, none ended otherwise, nothing is left."""

    def condition(message: EngineMessage) -> bool:
        if not isinstance(message, Stats) or message.stats.num_requests_finished != {"abort": num_aborted}:
            return False
        stats = message.stats
        return (stats.num_requests_running, stats.num_requests_waiting, stats.kv_blocks_used) == (0, 0, 0)

    return condition


def test_hello_may_come_before_the_model_is_loaded(served: ServedEngine) -> None:
    frontend = Frontend(served.endpoints, A)
    frontend.hello()
    frontend.add("early", [1, 2, 3], greedy(3))
    served.serve()
    assert frontend.wait_ready().facts == served.engine.facts(1)
    frontend.wait_finished("early")
    assert len(frontend.tokens["early"]) == 3
    frontend.close()


def test_ready_needs_hello_and_subscription(served: ServedEngine) -> None:
    served.serve()
    greeted, subscribed = Frontend(served.endpoints, A, subscribe=False), Frontend(served.endpoints, B)
    greeted.hello()
    assert subscribed.receive(200) is None, "READY without a hello"
    subscribed.hello()
    subscribed.wait_ready()
    greeted.subscribe()
    greeted.wait_ready()
    greeted.close()
    subscribed.close()


def test_each_frontend_gets_its_own_tokens_only(served: ServedEngine) -> None:
    served.serve()
    with connected(served.endpoints, A, B) as (first, second):
        for index in range(5):
            first.add(f"a{index}", [1 + index] * 5, greedy(10))
            second.add(f"b{index}", [1 + index] * 5, greedy(10))
        first.wait_finished(*(f"a{index}" for index in range(5)))
        second.wait_finished(*(f"b{index}" for index in range(5)))
        assert first.tokens.keys() == {f"a{index}" for index in range(5)}
        assert [*first.tokens.values()] == [*second.tokens.values()]
        assert set(first.reasons.values()) == {"length"}


def test_garbage_is_logged_and_does_no_harm(served: ServedEngine, caplog: pytest.LogCaptureFixture) -> None:
    served.serve()
    with connected(served.endpoints, A) as (frontend,):
        for frame in (b"", b"\x00", b"garbage" * 100, b"\x01\xdd\xff\xff\xff\xff", b"\x01" + b"\x91" * 10_000):
            frontend.send_frame(frame)
        stranger = transport.frontend_input(frontend._context, served.endpoints, b"odd")
        frontend.add("after", [1, 2], greedy(2))
        frontend.wait_finished("after")
        frontend.wait_for(lambda _: "dropped a subscription of 4 bytes" in caplog.text)
        stranger.close()
    assert caplog.text.count("dropped a frame of") == 5


def test_a_refused_request_is_answered_with_the_field(served: ServedEngine) -> None:
    served.serve()
    with connected(served.endpoints, A) as (frontend,):
        frontend.add("bad", [64], greedy(2))
        error = frontend.wait_for(lambda message: isinstance(message, Error))
        assert isinstance(error, Error)
        assert (error.request_id, error.code, error.param) == ("bad", "invalid_request", "prompt")
        assert "token id 64, the vocabulary has 64" in error.message
        frontend.add("good", [63], greedy(2))
        frontend.wait_finished("good")


def test_an_id_in_use_by_another_frontend_is_refused(served: ServedEngine) -> None:
    served.serve()
    with connected(served.endpoints, A, B) as (first, second):
        first.add("same", [1], ENDLESS)
        first.wait_token("same")
        second.add("same", [1], ENDLESS)
        error = second.wait_for(lambda message: isinstance(message, Error))
        assert isinstance(error, Error)
        assert error.param == "request_id"
        first.abort("same")
        first.wait_finished("same")
        assert not second.tokens


def test_any_frontend_may_abort_and_the_owner_is_told(served: ServedEngine) -> None:
    served.serve()
    with connected(served.endpoints, A, B) as (owner, other):
        owner.add("r", [1, 2], ENDLESS)
        owner.wait_token("r")
        other.abort("r", "unknown")
        owner.wait_finished("r")
        assert owner.reasons == {"r": "abort"}
        other.wait_for(idle_after(1))
        assert not other.tokens


def test_a_lost_message_of_a_frontend_is_asked_for_and_order_is_kept(served: ServedEngine) -> None:
    served.serve()
    with connected(served.endpoints, A) as (frontend,):
        lost = frontend.channel.send(lambda seq: Add(A, seq, "r", [1], ENDLESS))
        frontend.abort("r")  # must not overtake its add, or the request would run for ever
        asked = frontend.wait_for(lambda message: isinstance(message, Stats) and message.channel.num_missing == 1)
        assert isinstance(asked, Stats)
        assert frontend.channel.update(asked.channel) == [lost]
        frontend.send_frame(lost)
        frontend.wait_finished("r")
        frontend.send_frame(lost)  # once more: ignored
        frontend.wait_for(idle_after(1))


def test_the_last_message_of_a_frontend_is_missed_when_it_pings(served: ServedEngine) -> None:
    served.serve()
    with connected(served.endpoints, A) as (frontend,):
        lost = frontend.channel.send(lambda seq: Add(A, seq, "r", [1], greedy(2)))
        frontend.ping()
        frontend.wait_for(lambda message: isinstance(message, Stats) and message.channel.num_missing == 1)
        frontend.send_frame(lost)
        frontend.wait_finished("r")


def test_what_a_frontend_misses_is_sent_again(served: ServedEngine) -> None:
    served.serve()
    with connected(served.endpoints, A) as (frontend,):
        frontend.add("r", [1], greedy(3))
        first = frontend.wait_for(lambda message: isinstance(message, Outputs))
        assert isinstance(first, Outputs)
        frontend.wait_finished("r")
        frontend.send_frame(encode(Ping(A, ChannelState(1, first.seq, 1))))  # as if the first had not come
        frontend.channel._num_received = first.seq
        frontend.reasons.clear()
        assert frontend.wait_for(lambda message: isinstance(message, Outputs)) == first


def test_a_session_the_engine_core_does_not_know_is_told_so(served: ServedEngine) -> None:
    served.serve()
    frontend = Frontend(served.endpoints, A)
    while (message := frontend.receive(100)) is None:
        frontend.ping()
    assert isinstance(message, Dead)
    assert "does not know this session" in message.reason
    frontend.add("r", [1], ENDLESS)
    frontend.hello()
    frontend.wait_ready()
    assert not served.engine.has_work
    frontend.close()


def test_a_frontend_that_disconnects_frees_its_requests(served: ServedEngine) -> None:
    served.serve()
    with connected(served.endpoints, A) as (stays,):
        with connected(served.endpoints, B) as (leaves,):
            for index in range(12):  # more than run at once: some are waiting
                leaves.add(f"b{index}", [1, 2, index], ENDLESS)
            leaves.wait_token("b0")
            assert served.engine.has_work
        stays.wait_for(idle_after(12))


KILLED_FRONTEND = """
import sys
from pathlib import Path
from minivllm import transport
from minivllm.sampling_params import SamplingParams
from tests.support.bare_frontend import Frontend
frontend = Frontend(transport.Endpoints.in_directory(Path(sys.argv[1])), b"front--K")
frontend.hello()
frontend.wait_ready()
frontend.add("k", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=50_000, ignore_eos=True))
frontend.wait_token("k")
print("decoding", flush=True)
sys.stdin.read()
"""


def test_a_killed_frontend_frees_its_requests(served: ServedEngine, socket_dir: Path) -> None:
    served.serve()
    command = [sys.executable, "-c", KILLED_FRONTEND, str(socket_dir)]
    with (
        connected(served.endpoints, A) as (stays,),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
    ):
        assert child.stdout is not None
        assert child.stdout.readline() == "decoding\n"
        child.kill()
        stays.ping()
        stays.wait_for(idle_after(1))


def test_a_silent_frontend_loses_its_lease_and_learns_of_it(model_dir: Path, socket_dir: Path) -> None:
    with serve_engine(model_dir, socket_dir, lease_seconds=0.5) as served:
        served.serve()
        with connected(served.endpoints, A, B) as (silent, lively):
            silent.add("s", [1], ENDLESS)
            silent.wait_token("s")
            lively.wait_for(idle_after(1), keep_alive=True)
            released = silent.wait_for(lambda message: isinstance(message, Released))
            assert isinstance(released, Released)
            assert released.request_ids == ["s"]
            so_far = list(silent.tokens["s"])
            silent.add("s", [1], greedy(len(so_far) + 2), output_token_ids=so_far)
            silent.wait_finished("s")
            assert silent.reasons == {"s": "length"}
            assert len(silent.tokens["s"]) == len(so_far) + 2


def test_a_step_longer_than_the_lease_costs_nobody_theirs(
    model_dir: Path, socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = 1.0
    in_step = threading.Event()

    def slow_step(engine: EngineCore) -> list[RequestOutput]:
        if not in_step.is_set():
            in_step.set()
            time.sleep(1.5 * lease)  # the device is busy
        return step(engine)

    step = EngineCore.step
    monkeypatch.setattr(EngineCore, "step", slow_step)
    with serve_engine(model_dir, socket_dir, lease_seconds=lease) as served:
        served.serve()
        with connected(served.endpoints, A) as [frontend]:
            frontend.add("a", [1], greedy(2))
            assert in_step.wait(10)
            frontend.ping()
            frontend.wait_for(lambda _: "a" in frontend.reasons, keep_alive=True)
            assert frontend.reasons == {"a": "length"}


def test_strangers_that_never_subscribe_are_forgotten(model_dir: Path, socket_dir: Path) -> None:
    with serve_engine(model_dir, socket_dir, lease_seconds=0.3) as served:
        served.serve()
        strangers = [Frontend(served.endpoints, b"stranger"[:7] + bytes([i]), subscribe=False) for i in range(5)]
        with connected(served.endpoints, A) as (lively,):
            for stranger in strangers:
                stranger.hello()
                stranger.add(f"{stranger.frontend_id!r}", [1], ENDLESS)
            lively.wait_for(
                lambda message: isinstance(message, Stats) and message.stats.num_requests_submitted == 5, True
            )
            lively.wait_for(idle_after(5), keep_alive=True)
            assert served.server._frontends.keys() == {A}
        for stranger in strangers:
            stranger.close()


def test_a_failing_engine_is_announced_and_raised(served: ServedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    served.serve()
    with connected(served.endpoints, A) as (frontend,):
        with monkeypatch.context() as patch:

            def fail() -> None:
                raise RuntimeError("injected")

            patch.setattr(served.engine, "step", fail)
            frontend.add("r", [1], greedy(2))
            dead = frontend.wait_for(lambda message: isinstance(message, Dead))
            served.join()
        assert isinstance(dead, Dead)
        assert dead.reason == "the engine core failed: RuntimeError: injected"
        assert str(served.error) == "injected"


def test_a_stopped_engine_says_farewell(served: ServedEngine, socket_dir: Path) -> None:
    served.serve()
    with connected(served.endpoints, A) as (frontend,):
        frontend.add("r", [1], ENDLESS)
        frontend.wait_token("r")
        served.server.stop()
        dead = frontend.wait_for(lambda message: isinstance(message, Dead))
        assert isinstance(dead, Dead)
        assert dead.reason == "the engine core was stopped"
        served.join()
    assert list(socket_dir.iterdir()) == []
