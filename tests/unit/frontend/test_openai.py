"""OpenAI's endpoints on the wire, rule by rule, over a real server and real sockets, with a fake engine core behind."""

import json
import socket
import sys
from collections import defaultdict
from typing import Any

import httpx
import pytest

from frontend.tokenizer import Tokenizer
from minivllm.json_schema import check_json_schema
from minivllm.protocol import Outputs
from tests.support.fake_engine import FakeEngine, logprobs_of
from tests.unit.frontend.running import RunningFrontend, read_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}
BODIES: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "hello"}, CHAT: {"messages": [USER], "max_tokens": 16}}
both = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


def ask(frontend: RunningFrontend, path: str, **fields: Any) -> Any:
    """The whole answer, which must be a 200."""
    response = frontend.http.post(path, json=BODIES[path] | fields)
    assert response.status_code == 200, response.text
    return response.json()


def chunks_of(frontend: RunningFrontend, path: str, **fields: Any) -> list[Any]:
    """The chunks of a whole stream, which must have ended properly and share what all chunks share."""
    events = frontend.events(path, **BODIES[path] | {"stream": True} | fields)
    assert events.pop() == "[DONE]"
    for name in ("id", "created", "model", "object"):
        assert len({event[name] for event in events}) == 1
    return events


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def texts_of(chunks: list[Any]) -> dict[int, str]:
    """Text by index of the choice; each must have one finish reason, in its last chunk."""
    texts: defaultdict[int, str] = defaultdict(str)
    ended = set()
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert choice["index"] not in ended
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"]["content"]
            if choice["finish_reason"] is not None:
                ended.add(choice["index"])
    assert ended == set(texts)
    return dict(texts)


def test_a_completion(frontend: RunningFrontend, tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("héllo 🦜 end")
    body = ask(frontend, COMPLETIONS, prompt=token_ids, max_tokens=len(token_ids), model="test-model")
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "test-model",
        "choices": [{"index": 0, "text": "héllo 🦜 end", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": len(token_ids),
            "completion_tokens": len(token_ids),
            "total_tokens": 2 * len(token_ids),
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_a_chat(frontend: RunningFrontend, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = lambda add: tokenizer.encode("hi there")
    body = ask(frontend, CHAT)
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": "hi there", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    (add,) = engine.adds.values()
    assert tokenizer.decode(add.prompt_token_ids, False) == tokenizer.apply_chat_template([USER])


@both
def test_a_stream_says_what_the_whole_answer_says(path: str, frontend: RunningFrontend) -> None:
    whole = ask(frontend, path, max_tokens=9)["choices"][0]
    text = whole["text"] if path == COMPLETIONS else whole["message"]["content"]
    chunks = chunks_of(frontend, path, max_tokens=9)
    assert texts_of(chunks) == {0: text}
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-1:]] == ["length"]


def test_the_role_comes_with_the_first_token_and_once(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.num_allowed = 1
    body = BODIES[CHAT] | {"stream": True, "max_tokens": 3}
    with frontend.http.stream("POST", CHAT, json=body) as response:
        deltas = []
        for line in response.iter_lines():
            if line.startswith("data: {"):
                deltas.append(httpx.Response(200, content=line[6:]).json()["choices"][0]["delta"])
                engine.num_allowed = 1
    assert [set(delta) for delta in deltas] == [{"role", "content"}, {"content"}, {"content"}]
    assert deltas[0]["role"] == "assistant"


@both
def test_usage_comes_last_where_it_is_asked_for(path: str, frontend: RunningFrontend) -> None:
    *chunks, last = chunks_of(frontend, path, stream_options={"include_usage": True}, max_tokens=4)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == ask(frontend, path, max_tokens=4)["usage"]


@both
def test_usage_in_every_chunk(path: str, frontend: RunningFrontend) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(frontend, path, stream_options=options, max_tokens=4)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1


def test_headers_and_ids(frontend: RunningFrontend) -> None:
    body = BODIES[CHAT] | {"stream": True, "request_id": "mine"}
    response = frontend.http.post(CHAT, json=body, headers={"X-Request-Id": "trace-7"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "trace-7"
    assert '"id":"chatcmpl-mine"' in response.text
    response = frontend.http.post(CHAT, json=BODIES[CHAT])
    assert response.headers["x-request-id"] == response.json()["id"]


def test_two_requests_of_one_trace_do_not_collide(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.holding = True
    with frontend.open_raw(CHAT, **BODIES[CHAT]):
        engine.wait_for(lambda: engine.adds)
        engine.holding = False
        headers = {"X-Request-Id": next(iter(engine.adds))}
        assert frontend.http.post(CHAT, json=BODIES[CHAT], headers=headers).status_code == 200


@both
def test_n_choices_with_seeds_of_their_own(path: str, frontend: RunningFrontend, engine: FakeEngine) -> None:
    body = ask(frontend, path, n=3, seed=2**63 - 1, best_of=3) if path == COMPLETIONS else ask(frontend, path, n=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    seeds = [add.params.seed for add in engine.adds.values()]
    assert len(set(seeds)) == 3
    if path == COMPLETIONS:
        assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]
    (add, *_) = engine.adds.values()
    assert body["usage"]["prompt_tokens"] == len(add.prompt_token_ids)
    assert body["usage"]["completion_tokens"] == 48


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(stream: bool, frontend: RunningFrontend, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """Choices of one prompt stand together, and each has its own text, whatever the order of arrival."""
    prompts = ["hello", "world end", "stop"]
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    for forms in (prompts, [tokenizer.encode(prompt) for prompt in prompts]):
        fields: dict[str, Any] = {"prompt": forms, "n": 2, "max_tokens": max(lengths)}
        if stream:
            *chunks, last = chunks_of(frontend, COMPLETIONS, stream_options={"include_usage": True}, **fields)
            texts, usage = texts_of(chunks), last["usage"]
        else:
            body = ask(frontend, COMPLETIONS, **fields)
            texts, usage = {choice["index"]: choice["text"] for choice in body["choices"]}, body["usage"]
        assert sorted(texts) == list(range(6))
        for index, text in texts.items():
            assert text.startswith(prompts[index // 2])
        assert usage["prompt_tokens"] == sum(lengths)
        assert usage["completion_tokens"] == 6 * max(lengths)


def test_echo(frontend: RunningFrontend, tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("hello world")
    for prompt in ("hello world", token_ids):
        fields = {"prompt": prompt, "echo": True, "max_tokens": len(token_ids)}
        assert ask(frontend, COMPLETIONS, **fields)["choices"][0]["text"] == "hello world" * 2
        assert texts_of(chunks_of(frontend, COMPLETIONS, **fields, n=2)) == {0: "hello world" * 2, 1: "hello world" * 2}


def logprob_columns(frontend: RunningFrontend, stream: bool, **fields: Any) -> dict[str, list[Any]]:
    if not stream:
        columns: dict[str, list[Any]] = ask(frontend, COMPLETIONS, **fields)["choices"][0]["logprobs"]
        return columns
    joined: defaultdict[str, list[Any]] = defaultdict(list)
    for chunk in chunks_of(frontend, COMPLETIONS, **fields):
        for name, column in chunk["choices"][0]["logprobs"].items():
            joined[name] += column
    return dict(joined)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_log_probabilities_of_a_completion(
    stream: bool, echo: bool, frontend: RunningFrontend, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode("héllo wörld — 🦜!")
    shown = token_ids * (1 + echo)
    columns = logprob_columns(frontend, stream, prompt=token_ids, max_tokens=len(token_ids), logprobs=1, echo=echo)
    expected: list[float | None] = [-0.25 - token % 2 for token in shown]
    if echo:
        expected[0] = None
        assert columns["top_logprobs"][0] is None
    assert columns["token_logprobs"] == expected
    for token, logprob, top in list(zip(shown, expected, columns["top_logprobs"], strict=True))[echo:]:
        assert logprob is not None
        assert (logprob == max(top.values())) == (token % 2 == 0)
        assert len(top) in (1, 2)  # the token itself stands beside the most probable one
    text = "héllo wörld — 🦜!" * (1 + echo)
    offsets = columns["text_offset"]
    assert offsets == sorted(offsets)
    for token, offset, name in zip(shown, offsets, columns["tokens"], strict=True):
        assert "\ufffd" in name or text[offset : offset + len(name)] == name == tokenizer.decode([token])


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(
    stream: bool, frontend: RunningFrontend, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = lambda add: tokenizer.encode("hé 🦜")
    fields = {"logprobs": True, "top_logprobs": 3}
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks_of(frontend, CHAT, **fields)]
    else:
        parts = [ask(frontend, CHAT, **fields)["choices"][0]["logprobs"]]
    entries = [entry for part in parts for entry in part["content"]]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "hé 🦜"
    assert [entry["logprob"] for entry in entries] == [-0.25 - token % 2 for token in tokenizer.encode("hé 🦜")]
    assert all([top["logprob"] for top in entry["top_logprobs"]] == [-0.25, -1.25, -2.25] for entry in entries)
    assert ask(frontend, CHAT)["choices"][0]["logprobs"] is None


def test_log_probabilities_stop_with_the_text(
    frontend: RunningFrontend, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = lambda add: tokenizer.encode("hello world stop the end")
    engine.tokens_per_step = 100
    choice = ask(frontend, COMPLETIONS, logprobs=0, stop=" stop", max_tokens=100)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "stop")
    assert "".join(choice["logprobs"]["tokens"]).startswith("hello world")
    assert "end" not in "".join(choice["logprobs"]["tokens"])


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"n": 0}, "n"),
        (COMPLETIONS, {"n": 129}, "n"),
        (COMPLETIONS, {"n": 128, "prompt": ["a"] * 17}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": [[999_999]]}, "prompt"),
        (COMPLETIONS, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (COMPLETIONS, {"temperature": 101}, "temperature"),
        (COMPLETIONS, {"response_format": {"type": "grammar"}}, "response_format"),
        (COMPLETIONS, {"response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        (CHAT, {"response_format": schema_format({"type": "objekt"})}, "response_format"),
        (CHAT, {"response_format": schema_format({"not": {}})}, "response_format"),
        (COMPLETIONS, {"response_format": schema_format({"description": "x" * 40_000})}, "response_format"),
        (COMPLETIONS, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"functions": []}, "functions"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"prompt": "a"}, "prompt"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    path: str, fields: dict[str, Any], param: str, frontend: RunningFrontend, engine: FakeEngine
) -> None:
    error = refusal(frontend.http.post(path, json=BODIES[path] | fields))
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param in error["message"]
    assert not engine.adds


def test_every_sampling_field_reaches_the_engine(frontend: RunningFrontend, engine: FakeEngine) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 5, "min_tokens": 2, "ignore_eos": True,
        "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }  # fmt: skip
    for path in (COMPLETIONS, CHAT):
        engine.adds.clear()
        more = {"stop": ["x"], "stop_token_ids": [4], "logit_bias": {"3": 2}, "max_completion_tokens": 7, "user": "u"}
        ask(frontend, path, **fields, **more, max_tokens=99, n=1, response_format={"type": "text"}, stream=False)
        (add,) = engine.adds.values()
        assert {name: getattr(add.params, name) for name in fields} == fields
        assert (add.params.stop, add.params.stop_token_ids, add.params.logit_bias) == (("x",), (4,), {3: 2.0})
        assert add.params.max_tokens == 7


@both
def test_a_response_format_reaches_the_engine(path: str, frontend: RunningFrontend, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"enum": ["é", 1]}}, "required": ["z"]}
    for asked, expected in (
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (schema_format(schema), schema),
    ):
        engine.adds.clear()
        ask(frontend, path, response_format=asked, n=2)
        for add in engine.adds.values():
            text = add.params.json_schema
            assert text == (
                None if expected is None else json.dumps(expected, separators=(",", ":"), ensure_ascii=False)
            )


def test_a_schema_that_cannot_be_followed_is_explained(frontend: RunningFrontend) -> None:
    body = BODIES[CHAT] | {"response_format": schema_format({"type": "string", "pattern": "("}), "stream": True}
    error = refusal(frontend.http.post(CHAT, json=body))
    assert error["message"].startswith("response_format cannot be followed: regex parse error")


def test_a_response_format_without_the_extra(frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    check_json_schema.cache_clear()
    error = refusal(frontend.http.post(CHAT, json=BODIES[CHAT] | {"response_format": {"type": "json_object"}}))
    assert "pip install 'mini-vllm[grammar]'" in error["message"]
    assert error["param"] == "response_format"
    assert ask(frontend, CHAT)["choices"]


@both
def test_null_means_absent(path: str, frontend: RunningFrontend, engine: FakeEngine) -> None:
    names = ("model", "n", "stop", "stream", "stream_options", "logprobs", "seed", "max_completion_tokens", "user")
    ask(frontend, path, **dict.fromkeys(names))
    (add,) = engine.adds.values()
    assert add.params.max_tokens == 16


@both
def test_an_unknown_model_is_a_404(path: str, frontend: RunningFrontend) -> None:
    error = refusal(frontend.http.post(path, json=BODIES[path] | {"model": "gpt-5"}), 404)
    assert error["message"] == "The model `gpt-5` does not exist."
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_models(frontend: RunningFrontend) -> None:
    (model,) = frontend.http.get("/v1/models").json()["data"]
    assert model.pop("created") > 1_700_000_000
    assert model == {
        "id": "test-model", "object": "model", "owned_by": "minivllm", "root": frontend.config.model, "parent": None,
        "max_model_len": 256,
    }  # fmt: skip
    assert frontend.http.get("/v1/models/test-model").json()["id"] == "test-model"
    assert refusal(frontend.http.get("/v1/models/org/other"), 404)["param"] == "model"


def test_http_errors_have_openais_shape(frontend: RunningFrontend) -> None:
    response = frontend.http.get(CHAT)
    refusal(response, 405)
    assert "POST" in response.headers["allow"]
    refusal(frontend.http.post("/v1/nothing"), 404)
    refusal(frontend.http.post(CHAT, content=b"x" * (frontend.config.max_request_bytes + 1)), 413)
    form = {"content-type": "application/x-www-form-urlencoded"}
    refusal(frontend.http.post(CHAT, content=b"{}", headers=form), 415)
    json_with_charset = {"content-type": "Application/JSON; charset=utf-8"}
    assert refusal(frontend.http.post(CHAT, content=b"{", headers=json_with_charset))["param"] is None


@both
def test_an_error_in_a_stream_is_its_last_event(path: str, frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.num_allowed = 2
    body = BODIES[path] | {"stream": True, "n": 2}
    with frontend.http.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data: {"))
        engine.failure, engine.num_allowed = "no memory", None
        *_, error, done = [line for line in lines if line.startswith("data: ")]
    assert done == "data: [DONE]"
    assert httpx.Response(200, content=error[6:]).json()["error"] == {
        "message": "no memory", "type": "server_error", "param": None, "code": "generation_failed",
    }  # fmt: skip


@both
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_all_its_choices(
    path: str, stream: bool, frontend: RunningFrontend, engine: FakeEngine
) -> None:
    engine.num_allowed = 1
    connection = frontend.open_raw(path, **BODIES[path], n=4, stream=stream)
    engine.wait_for(lambda: len(engine.adds) == 4 and not engine.num_allowed)
    if stream:
        read_until(connection, b"data: {")
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    engine.wait_for(lambda: set(engine.aborted) == set(engine.adds))
    assert frontend.is_idle()


def test_delete_ends_all_choices(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.holding = True
    with frontend.open_raw(CHAT, **BODIES[CHAT], n=2, request_id="x") as connection:
        engine.wait_for(lambda: len(engine.adds) == 2)
        assert frontend.http.delete("/v1/requests/chatcmpl-x").status_code == 202
        assert read_until(connection, b'"usage"').count(b'"finish_reason":"abort"') == 2


def test_one_refused_choice_refuses_the_request(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.refusal = ("needs 9 blocks, there are 4", "prompt")
    assert refusal(frontend.http.post(COMPLETIONS, json={"prompt": ["a", "b"], "stream": True}))["param"] == "prompt"
    assert frontend.is_idle()


def test_prompt_log_probabilities_that_come_twice_count_once(
    frontend: RunningFrontend, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    """As when a prompt is computed again after the engine core was restarted."""
    prompt = tokenizer.encode("hello world")
    engine.holding = True
    with frontend.open_raw(COMPLETIONS, prompt=prompt, echo=True, logprobs=0, max_tokens=1) as connection:
        engine.wait_for(lambda: engine.adds)
        (request_id,) = engine.adds
        (owner,) = engine._channels
        again = logprobs_of(prompt[1:2], 0, 1)
        frame = engine._channels[owner].send(
            lambda seq: Outputs(engine.epoch, seq, [request_id], [0], [], {}, {}, {request_id: again})
        )
        engine.send_raw(bytes(frame))
        engine.holding = False
        response = read_until(connection, b'"usage"')
    assert response.count(b"-0.25") + response.count(b"-1.25") >= len(prompt)
    payload = httpx.Response(200, content=response.split(b"\r\n\r\n", 1)[1].split(b',"usage"')[0] + b"}").json()
    columns = payload["choices"][0]["logprobs"]
    assert columns["token_logprobs"] == [None, *(-0.25 - token % 2 for token in [*prompt[1:], prompt[0]])]
