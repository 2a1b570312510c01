"""POST /generate over a real server and real sockets, with a fake engine core behind."""

import json
import socket
from collections.abc import Callable

import pytest

from frontend.tokenizer import Tokenizer
from minivllm.protocol import Add, Outputs, encode
from tests.support.events import parse_events
from tests.support.fake_engine import FakeEngine
from tests.unit.frontend.running import RunningFrontend, read_until, text_of

StartFrontend = Callable[..., RunningFrontend]


def test_a_stream_has_the_text_the_reason_and_the_usage(frontend: RunningFrontend, tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("héllo 🦜 end")
    events = frontend.events(prompt=token_ids, max_tokens=len(token_ids))
    assert text_of(events) == "héllo 🦜 end"
    assert [token for event in events[:-1] for token in event["token_ids"]] == token_ids
    assert events[-2]["finish_reason"] == "length"
    assert events[-2]["usage"] == {
        "prompt_tokens": len(token_ids),
        "completion_tokens": len(token_ids),
        "total_tokens": 2 * len(token_ids),
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_without_stream_one_object_comes(frontend: RunningFrontend) -> None:
    response = frontend.generate(prompt="hello", stream=False, max_tokens=3, request_id="mine")
    body = response.json()
    assert (response.status_code, response.headers["x-request-id"], body["request_id"]) == (200, "mine", "mine")
    assert body["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == len(body["token_ids"]) == 3


def test_events_are_separated_in_time(frontend: RunningFrontend, engine: FakeEngine) -> None:
    """The engine emits the next token only when the client has seen the one before."""
    engine.num_allowed = 1
    with frontend.http.stream("POST", "/generate", json={"prompt": [70, 71, 72], "max_tokens": 3}) as response:
        seen = []
        for event in parse_events(response.iter_lines()):
            seen.append(event if event == "[DONE]" else event["token_ids"])
            engine.num_allowed = 1
    assert seen == [[70], [71], [72], "[DONE]"]


def test_response_headers(frontend: RunningFrontend) -> None:
    response = frontend.http.post("/generate", json={"prompt": "a"}, headers={"X-Request-Id": "from-header"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "from-header"


def test_messages_go_through_the_template_and_fill_the_context(frontend: RunningFrontend, engine: FakeEngine) -> None:
    frontend.events(messages=[{"role": "user", "content": "hello"}], request_id="chat", stop_token_ids=[3])
    add = engine.adds["chat"]
    expected = frontend.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hello"}]}).json()
    assert add.prompt_token_ids == expected["tokens"]
    assert add.params.max_tokens == 256 - len(add.prompt_token_ids)


def test_a_seed_is_chosen_where_none_is_given(frontend: RunningFrontend, engine: FakeEngine) -> None:
    frontend.events(prompt="a", request_id="one")
    frontend.events(prompt="a", request_id="two")
    frontend.events(prompt="a", request_id="given", seed=5)
    seeds = [engine.adds[name].params.seed for name in ("one", "two", "given")]
    assert seeds[2] == 5
    assert None not in seeds
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_stream_and_the_engines_work(
    stream: bool, frontend: RunningFrontend, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode("hello world stop the end")
    engine.script = lambda add: token_ids * 8
    body = {"prompt": "a", "max_tokens": 200, "stop": ["ld st"], "request_id": "s", "stream": stream}
    response = frontend.generate(**body)
    events = list(parse_events(iter(response.text.splitlines()))) if stream else [response.json(), "[DONE]"]
    assert text_of(events) == "hello wor"
    assert events[-2]["finish_reason"] == "stop"
    assert "ld st" in tokenizer.decode([token for event in events[:-1] for token in event["token_ids"]])
    engine.wait_for(lambda: engine.aborted == ["s"])


def test_a_schema_that_cannot_be_followed_is_a_400(frontend: RunningFrontend, engine: FakeEngine) -> None:
    response = frontend.http.post("/generate", json={"prompt": "a", "json_schema": {"type": "objekt"}})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "json_schema")
    assert error["message"] == "json_schema cannot be followed: Invalid type: objekt"
    assert not engine.adds


def test_a_refusal_by_the_engine_is_a_400(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.refusal = ("needs 9 blocks, there are 4", "prompt")
    response = frontend.generate(prompt="a")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "needs 9 blocks, there are 4"
    assert response.json()["error"]["param"] == "prompt"


def test_the_context_is_named_with_the_numbers(frontend: RunningFrontend, engine: FakeEngine) -> None:
    response = frontend.generate(prompt=[1] * 200, max_tokens=100)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, "max_tokens", "invalid_request_error")
    assert all(number in error["message"] for number in ("200", "100", "300", "256"))
    assert not engine.adds


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b""])
def test_a_body_that_is_not_json_is_a_400(content: bytes, frontend: RunningFrontend) -> None:
    response = frontend.http.post("/generate", content=content)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_long_prompt_is_tokenized_off_the_loop(frontend: RunningFrontend) -> None:
    response = frontend.generate(prompt="hello " * 3000)
    assert response.status_code == 400
    assert "max_model_len" in response.json()["error"]["message"]


def test_a_live_id_cannot_be_used_twice(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.holding = True
    with frontend.open_raw(prompt="a", request_id="twin"):
        engine.wait_for(lambda: "twin" in engine.adds)
        response = frontend.generate(prompt="a", request_id="twin")
        assert (response.status_code, response.json()["error"]["param"]) == (409, "request_id")
    engine.wait_for(lambda: engine.aborted == ["twin"])
    engine.holding = False
    while (response := frontend.generate(prompt="a", request_id="twin", stream=False)).status_code == 409:
        pass  # until the engine core has confirmed the abort
    assert response.json()["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_delete_ends_a_request(stream: bool, frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.holding = True
    with frontend.open_raw(prompt="a", request_id="away", stream=stream) as connection:
        engine.wait_for(lambda: "away" in engine.adds)
        assert frontend.http.delete("/v1/requests/away").status_code == 202
        response = read_until(connection, b'"finish_reason"')
    assert b'"finish_reason":"abort"' in response


def test_delete_reaches_requests_of_other_frontends(
    engine: FakeEngine, frontend: RunningFrontend, start_frontend: StartFrontend
) -> None:
    other = start_frontend()
    other.wait_until_ready()
    engine.holding = True
    with frontend.open_raw(prompt="a", request_id="elsewhere", stream=False) as connection:
        engine.wait_for(lambda: "elsewhere" in engine.adds)
        assert other.http.delete("/v1/requests/elsewhere").status_code == 202
        assert b"200 OK" in connection.recv(65536)


def test_a_waiting_stream_is_kept_alive(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend(stream_ping_interval=0.05)
    frontend.wait_until_ready()
    engine.holding = True
    with frontend.http.stream("POST", "/generate", json={"prompt": "a", "max_tokens": 2}) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ping"
        engine.holding = False
        assert text_of(list(parse_events(lines)))


# Clients that leave: the engine core must hear of it at once, and nothing may stay behind.


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_the_queue_is_aborted(
    stream: bool, frontend: RunningFrontend, engine: FakeEngine
) -> None:
    engine.holding = True  # nothing was answered yet, not even headers
    with frontend.open_raw(prompt="a", request_id="gone", stream=stream):
        engine.wait_for(lambda: "gone" in engine.adds)
    engine.wait_for(lambda: engine.aborted == ["gone"])
    assert frontend.is_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_during_decoding_is_aborted(
    stream: bool, frontend: RunningFrontend, engine: FakeEngine
) -> None:
    engine.script = lambda add: [70] * 200
    with frontend.open_raw(prompt="a", request_id="gone", stream=stream, max_tokens=200) as connection:
        engine.wait_for(lambda: "gone" in engine.adds)
        if stream:
            assert connection.recv(10)
        engine.step_seconds = 0.05
    engine.wait_for(lambda: engine.aborted == ["gone"])


def test_a_client_that_leaves_before_its_body_is_complete_costs_nothing(
    frontend: RunningFrontend, engine: FakeEngine
) -> None:
    with socket.create_connection(frontend.address) as connection:
        connection.sendall(b'POST /generate HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\n{"prompt"')
    assert frontend.generate(prompt="a", stream=False).status_code == 200
    assert len(engine.adds) == 1


def test_a_slow_reader_gets_everything_and_delays_nobody(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.step_seconds = 0.0
    with frontend.open_raw(prompt=[70], request_id="slow", max_tokens=250) as slow:
        engine.wait_for(lambda: "slow" in engine.adds)
        for _ in range(5):
            assert frontend.generate(prompt=[70], max_tokens=250, stream=False).status_code == 200
        received = read_until(slow, b"[DONE]", 100)
    ids = [
        token
        for line in received.splitlines()
        if line.startswith(b"data: {")
        for token in json.loads(line[6:])["token_ids"]
    ]
    assert ids == [70] * 250


# The engine core misbehaves (what is lost, and what dies: test_resume.py)


def test_garbage_and_stale_messages_are_ignored(frontend: RunningFrontend, engine: FakeEngine) -> None:
    for frame in (b"", b"\x01", b"\x63garbage", bytes(encode(Outputs(1, 0, ["x"], [1], [70])))):
        engine.send_raw(frame)
    assert text_of(frontend.events(prompt=[70, 71], max_tokens=2))


def test_an_error_of_the_engine_is_a_500(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.failure = "out of memory: 9 blocks"
    response = frontend.generate(prompt="a")
    assert (response.status_code, response.json()["error"]["message"]) == (500, "out of memory: 9 blocks")


# Too much, too early, too late


def test_a_full_queue_is_a_429(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend(max_num_queued_reqs=1)
    frontend.wait_until_ready()
    engine.holding = True
    with frontend.open_raw(prompt="a", request_id="first"):
        engine.wait_for(lambda: "first" in engine.adds)
        response = frontend.generate(prompt="a")
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert "1" in response.json()["error"]["message"]
        assert frontend.wait_for("/ready", 503)["status"] == "queue_full"
    engine.wait_for(lambda: engine.aborted == ["first"])
    frontend.wait_until_ready()


def test_without_an_engine_it_is_loading(start_frontend: StartFrontend) -> None:
    frontend = start_frontend()
    assert frontend.wait_for("/ready", 503)["status"] == "loading"
    assert frontend.http.get("/health").status_code == 200
    response = frontend.generate(prompt="a")
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    assert frontend.http.delete("/v1/requests/x").status_code == 503


@pytest.mark.parametrize("with_length", [True, False])
def test_a_large_body_is_a_413(with_length: bool, engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend(max_request_bytes=1000)
    content = b"x" * 100_000
    response = frontend.http.post("/generate", content=content if with_length else iter([content] * 3))
    assert response.status_code == 413
    assert "1000" in response.json()["error"]["message"]


def test_draining_finishes_what_runs_and_admits_nothing(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend()
    frontend.wait_until_ready()
    engine.holding = True
    with frontend.open_raw(prompt=[70], max_tokens=3, request_id="last") as connection:
        engine.wait_for(lambda: "last" in engine.adds)
        frontend.call(frontend.frontend.stop)
        assert frontend.wait_for("/ready", 503)["status"] == "draining"
        assert frontend.generate(prompt="a").status_code == 503
        engine.holding = False
        received = read_until(connection, b"[DONE]")
        assert b'"finish_reason":"length"' in received
    frontend.join()


def test_draining_aborts_what_does_not_end_in_time(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend(shutdown_timeout=0.1)
    frontend.wait_until_ready()
    engine.holding = True
    with frontend.open_raw(prompt=[70], request_id="late") as connection:
        engine.wait_for(lambda: "late" in engine.adds)
        frontend.call(frontend.frontend.stop)
        received = read_until(connection, b"[DONE]")
        assert b'"finish_reason":"abort"' in received
    engine.wait_for(lambda: engine.aborted == ["late"])
    frontend.join()


def test_hundred_streams_at_once_get_their_own_tokens(frontend: RunningFrontend, engine: FakeEngine) -> None:
    def script(add: Add) -> list[int]:
        return [add.prompt_token_ids[0]] * 20

    engine.script = script
    connections = [frontend.open_raw(prompt=[10 + i], max_tokens=20) for i in range(100)]
    for i, connection in enumerate(connections):
        received = read_until(connection, b"[DONE]")
        lines = [json.loads(line[6:]) for line in received.splitlines() if line.startswith(b"data: {")]
        assert [token for line in lines for token in line["token_ids"]] == [10 + i] * 20
        connection.close()
    assert frontend.is_idle()
