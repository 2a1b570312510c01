"""POST /generate through every process, on the real default model: what is streamed, when, and to whom."""

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest

from tests.support.events import parse_events
from tests.support.server import WAIT, ServerProcess, token_ids_of

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}
STORY: dict[str, Any] = {"prompt": "Once upon a time there was a lighthouse keeper who", "ignore_eos": True}
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
CLIENT = """
import json, sys, urllib.request

body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32, "temperature": 0}
request = urllib.request.Request(sys.argv[1] + "/generate", json.dumps(body).encode())
with urllib.request.urlopen(request) as response:
    for line in response:
        if line.startswith(b"data: ") and line != b"data: [DONE]\\n":
            print(json.loads(line[6:])["text"], end="", flush=True)
"""


def stream(server: ServerProcess, **body: Any) -> list[Any]:
    with server.stream(**body) as events:
        return list(events)


def text_of(events: list[Any]) -> str:
    return "".join(event["text"] for event in events[:-1])


def test_streams_an_answer_with_paris(server: ServerProcess) -> None:
    body = json.dumps({**QUESTION, "temperature": 0})
    form = {"content-type": "application/x-www-form-urlencoded"}  # what `curl -d` says
    response = server.http.post("/generate", content=body, headers=form)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = parse_events(iter(response.text.splitlines()))
    assert last == "[DONE]"
    assert "Paris" in "".join(event["text"] for event in events)
    assert events[-1]["finish_reason"] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == sum(len(event["token_ids"]) for event in events)


def test_answer_is_the_same_without_streaming(server: ServerProcess) -> None:
    answer = server.generate(**QUESTION)
    events = stream(server, **QUESTION)
    assert answer["text"] == text_of(events)
    assert answer["token_ids"] == token_ids_of(events)
    assert answer["finish_reason"] == events[-2]["finish_reason"] == "stop"


def test_client_with_nothing_but_the_standard_library(server: ServerProcess) -> None:
    result = subprocess.run(
        [sys.executable, "-I", "-c", CLIENT, server.url], capture_output=True, text=True, timeout=WAIT, check=True
    )
    assert "Paris" in result.stdout


def test_tokens_arrive_one_by_one_while_the_rest_is_not_made_yet(server: ServerProcess) -> None:
    """A whole other request fits between two events of a stream, again and again: they cannot come in one burst."""
    num_tokens = 0
    with server.stream(**STORY, max_tokens=2000) as events:
        for _ in range(3):
            server.generate(prompt="Two and two is", max_tokens=3, ignore_eos=True)
            for event in islice(events, 5):
                assert event["finish_reason"] is None
                num_tokens += len(event["token_ids"])
        assert server.http.delete(f"/v1/requests/{event['request_id']}").status_code == 202
        rest = list(events)
    assert rest[-2]["finish_reason"] == "abort"
    assert 15 <= num_tokens <= rest[-2]["usage"]["completion_tokens"] < 2000


def test_32_clients_at_once_each_get_their_own_answer(server: ServerProcess) -> None:
    bodies = [
        {"prompt": f"The number after {n} is", "max_tokens": 4 + n % 13, "ignore_eos": True} for n in range(100, 132)
    ]
    before = server.settle()
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: stream(server, **body), bodies))
    after = server.settle()
    assert after.num_submitted - before.num_submitted == len(bodies)
    assert after.finished["length"] - before.finished.get("length", 0) == len(bodies)
    for body, events in zip(bodies, together, strict=True):
        assert len(token_ids_of(events)) == body["max_tokens"]
        assert events[-2]["usage"]["completion_tokens"] == body["max_tokens"]
    for body, events in list(zip(bodies, together, strict=True))[::8]:
        assert token_ids_of(stream(server, **body)) == token_ids_of(events)


@pytest.mark.parametrize("params", [{"temperature": 0}, SEEDED], ids=["greedy", "seeded"])
def test_request_joins_mid_decode_and_changes_nobody(server: ServerProcess, params: dict[str, Any]) -> None:
    long, joining = {**STORY, **params, "max_tokens": 40}, {**QUESTION, **params}
    alone = token_ids_of(stream(server, **long))
    joining_alone = token_ids_of(stream(server, **joining))
    with server.stream(**long) as events:
        first = list(islice(events, 5))
        assert token_ids_of(stream(server, **joining)) == joining_alone
        assert token_ids_of([*first, *events]) == alone


def test_requests_really_share_batches(server: ServerProcess) -> None:
    before = server.settle()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: stream(server, prompt=f"{n} men", max_tokens=24, ignore_eos=True), range(8)))
    after = server.settle()
    steps = after["minivllm:decode_batch_size_count"] - before["minivllm:decode_batch_size_count"]
    rows = after["minivllm:decode_batch_size_sum"] - before["minivllm:decode_batch_size_sum"]
    assert rows == 8 * 23
    assert rows / steps > 4


def test_delete_ends_a_stream_with_abort(server: ServerProcess) -> None:
    with server.stream(**STORY, max_tokens=500, request_id="to-delete") as events:
        first = list(islice(events, 2))
        assert server.http.delete("/v1/requests/to-delete").status_code == 202
        rest = list(events)
    assert rest[-1] == "[DONE]"
    assert rest[-2]["finish_reason"] == "abort"
    assert rest[-2]["usage"]["completion_tokens"] == len(token_ids_of([*first, *rest])) < 500


def test_stop_strings_are_cut_off(server: ServerProcess) -> None:
    events = stream(server, **QUESTION, stop=[" Paris"])
    assert text_of(events) == "The capital of France is"
    assert events[-2]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "x", "max_tokens": 9000}, "max_tokens", "the context holds 8192"),
        ({"prompt": [49152]}, "prompt", "token id 49152, but the vocabulary has 49152"),
        ({"prompt": "x", "temperature": -1}, "temperature", "must be in [0, 100], got -1"),
        ({"prompt": "x", "colour": "red"}, "colour", "colour is not a field"),
        ({"prompt": "x", "messages": []}, "messages", "messages"),
        ({"max_tokens": 3}, "prompt", "give either prompt or messages"),
    ],
)
def test_wrong_fields_are_named(server: ServerProcess, body: dict[str, Any], param: str, message: str) -> None:
    response = server.http.post("/generate", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_broken_json_is_a_400(server: ServerProcess) -> None:
    response = server.http.post("/generate", content='{"prompt": ')
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


def test_slow_reader_does_not_hold_up_the_others(server: ServerProcess) -> None:
    with server.connect(**STORY, max_tokens=60) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert slow.recv(1)
        assert server.generate(**QUESTION)["finish_reason"] == "stop"
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += slow.recv(65536)
    assert b'"completion_tokens":60' in received
