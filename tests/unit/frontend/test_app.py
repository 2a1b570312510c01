"""The other endpoints, the key, CORS and the metrics page, over a real server."""

import json
import re
import socket
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from frontend.openai.schemas import ChatCompletionRequest, CompletionRequest
from frontend.schemas import GenerateRequest
from minivllm import __version__
from minivllm.control import ControlChannel
from tests.support.fake_engine import FakeEngine
from tests.support.server import wait_until
from tests.unit.frontend.running import RunningFrontend

StartFrontend = Callable[..., RunningFrontend]

METRICS = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "minivllm:decode_batch_size": "histogram",
    "minivllm:prefill_batch_tokens": "histogram",
    "minivllm:tokens_per_second": "gauge",
    "minivllm:gpu_memory_bytes": "gauge",
    "minivllm:process_rss_bytes": "gauge",
    "minivllm:process_cpu_seconds": "counter",
    "minivllm:step_seconds": "histogram",
    "minivllm:kv_blocks": "gauge",
    "minivllm:kv_blocks_leaked": "gauge",
    "minivllm:engine_restarts": "counter",
    "minivllm:requests_resumed": "counter",
    "minivllm:oom_recoveries": "counter",
}


def samples(frontend: RunningFrontend) -> dict[tuple[str, str], float]:
    """(sample name, value of its own label) → value. Checks that the page parses and what labels it has."""
    found = {}
    for family in text_string_to_metric_families(frontend.http.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "test-model"
            assert sample.labels["engine"] == "0"
            own = [value for name, value in sample.labels.items() if name not in ("model_name", "engine")]
            found[sample.name, own[0] if len(own) == 1 else ""] = sample.value
    return found


def test_every_metric_is_there(frontend: RunningFrontend) -> None:
    wait_until("heard from the engine core", lambda: ("vllm:prompt_tokens_total", "") in samples(frontend))
    families = text_string_to_metric_families(frontend.http.get("/metrics").text)
    kinds = {family.name: family.type for family in families}
    assert {name: kinds.get(name) for name in METRICS} == METRICS


def test_metrics_count_requests(frontend: RunningFrontend) -> None:
    assert frontend.generate(prompt=[70, 71], max_tokens=5, stream=False).status_code == 200
    found = samples(frontend)
    assert found["vllm:request_success_total", "length"] == 1
    assert found["vllm:time_to_first_token_seconds_count", ""] == 1
    assert found["vllm:inter_token_latency_seconds_count", ""] == 4
    assert found["vllm:request_prompt_tokens_sum", ""] == 2
    assert found["vllm:request_generation_tokens_sum", ""] == 5
    assert found["vllm:request_queue_time_seconds_sum", ""] == 0.01
    assert found["vllm:request_inference_time_seconds_sum", ""] == pytest.approx(0.05)


def test_metrics_show_the_engines_numbers(frontend: RunningFrontend) -> None:
    wait_until("heard from the engine core", lambda: ("vllm:prompt_tokens_total", "") in samples(frontend))
    found = samples(frontend)
    assert found["vllm:prompt_tokens_total", ""] == 11
    assert found["vllm:num_requests_running", ""] == 3
    assert found["vllm:kv_cache_usage_perc", ""] == 0.25
    assert found["minivllm:kv_blocks", "free"] == 2
    assert found["vllm:iteration_tokens_total_bucket", "8.0"] == 3
    assert found["vllm:iteration_tokens_total_count", ""] == 6
    assert found["vllm:iteration_tokens_total_sum", ""] == 40


def test_clients_that_leave_are_counted_as_abort(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.holding = True
    with frontend.open_raw(prompt="a", request_id="gone"):
        engine.wait_for(lambda: "gone" in engine.adds)
    assert frontend.is_idle()
    assert samples(frontend)["vllm:request_success_total", "abort"] == 1


def test_the_launcher_feeds_process_metrics(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    ours, theirs = socket.socketpair()
    with theirs, ours:
        frontend = start_frontend(control=ControlChannel(theirs))
        frontend.wait_until_ready()
        with ours.makefile() as lines:
            report = json.loads(lines.readline())
        assert report == {"state": "ready", "url": f"http://127.0.0.1:{frontend.address[1]}"}
        usage = {"name": "engine_core", "pid": 7, "rss": 1000, "cpu_seconds": 1.5}
        ours.sendall(json.dumps({"processes": [usage]}).encode() + b"\n")
        while (found := samples(frontend)).get(("minivllm:process_rss_bytes", "engine_core")) != 1000:
            pass
        assert found["minivllm:process_cpu_seconds_total", "engine_core"] == 1.5
        ours.shutdown(socket.SHUT_RDWR)  # what a dead launcher looks like
        frontend.join()


def test_tokenize_and_detokenize_are_inverse(frontend: RunningFrontend) -> None:
    answer = frontend.http.post("/tokenize", json={"prompt": "héllo 🦜"}).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert frontend.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "héllo 🦜"}


def test_probes_and_version(frontend: RunningFrontend) -> None:
    assert frontend.http.get("/health").json() == {"status": "ok"}
    assert frontend.http.get("/ping").status_code == 200
    assert frontend.http.get("/ready").json() == {"status": "ready"}
    assert frontend.http.get("/version").json() == {"version": __version__}


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/generate", 405)])
def test_errors_of_http_have_the_same_shape(method: str, path: str, status: int, frontend: RunningFrontend) -> None:
    response = frontend.http.request(method, path, headers={"X-Request-Id": "echoed"})
    assert (response.status_code, response.headers["x-request-id"]) == (status, "echoed")
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "secret", "Bearer secre", "Bearer ключ"])
def test_without_the_key_nothing_but_the_probes_is_served(header: str | None, guarded: RunningFrontend) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    served = guarded.routes()
    assert len(served) > 12
    for method, path in {*served, ("post", "/nope"), ("get", "/health/")}:
        response = guarded.http.request(method, path.replace("{", "").replace("}", ""), headers=headers)
        if path in {"/health", "/ready", "/ping", "/"}:
            assert response.status_code == 200, path
        else:
            assert response.status_code == 401, path
            assert response.json()["error"]["type"] == "authentication_error"


def test_with_the_key_everything_is_served(guarded: RunningFrontend) -> None:
    headers = {"Authorization": "Bearer secret"}
    response = guarded.http.post("/generate", json={"prompt": "a", "stream": False}, headers=headers)
    assert response.status_code == 200


def test_browsers_of_allowed_origins_may_call(guarded: RunningFrontend) -> None:
    preflight = {"Origin": "http://page.test", "Access-Control-Request-Method": "POST"}
    response = guarded.http.options("/generate", headers=preflight)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "http://page.test")
    refused = guarded.http.post("/generate", headers={"Origin": "http://page.test"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://page.test")
    other = guarded.http.get("/health", headers={"Origin": "http://other.test"})
    assert "access-control-allow-origin" not in other.headers


@pytest.fixture
def guarded(engine: FakeEngine, start_frontend: StartFrontend) -> RunningFrontend:
    frontend = start_frontend(api_key="secret", allowed_origins=("http://page.test",))
    frontend.wait_until_ready()
    return frontend


def test_openapi_lists_every_route_and_every_field(frontend: RunningFrontend) -> None:
    document = frontend.http.get("/openapi.json").json()
    listed = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert listed == frontend.routes()
    schemas = document["components"]["schemas"]
    for model in (GenerateRequest, CompletionRequest, ChatCompletionRequest):
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(schemas)


def test_invariants_are_shown_only_for_debugging(
    frontend: RunningFrontend, engine: FakeEngine, start_frontend: StartFrontend
) -> None:
    assert frontend.http.get("/debug/invariants").status_code == 404
    debugging = start_frontend(enable_debug=True)
    debugging.wait_until_ready()
    engine.stats.integrity = "ok"
    while (body := debugging.http.get("/debug/invariants").json())["engine"]["integrity"] != "ok":
        pass
    assert body["frontend"] | {"num_sent": 0, "requests": 0, "waiting_for_engine": 0} == body["frontend"]
    engine.stats.integrity = "1 block belongs to nobody"
    assert debugging.wait_for("/debug/invariants", 500)["engine"]["integrity"] == "1 block belongs to nobody"
