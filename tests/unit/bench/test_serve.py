"""`minivllm bench serve` against a small OpenAI server: the load it makes, what it counts, what it says of failures."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from minivllm import cli
from tests.unit.bench.openai_server import API_KEY, BREAKS, CANNOT, OpenAIServer


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


def bench(server: OpenAIServer, *arguments: str) -> int:
    common = ("--url", server.url, "--api-key", API_KEY, "--num-warmups", "0", "--input-len", "5")
    return cli.main(["bench", "serve", *common, *arguments])


def test_closed_loop_over_two_processes(
    server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"
    arguments = ["--num-prompts", "12", "--output-len", "6", "--max-concurrency", "3", "--num-processes", "2"]
    goodput = ["--goodput", "ttft:60000", "tpot:60000", "--json", str(file), "--num-warmups", "2"]
    assert bench(server, *arguments, *goodput) == 0
    assert len(server.bodies) == 14
    assert 2 <= server.in_flight_peak <= 3
    body = server.bodies[-1]
    assert body["model"] == "the-model"
    assert (len(body["prompt"]), body["max_tokens"], body["temperature"], body["ignore_eos"]) == (5, 6, 0.0, True)
    content = json.loads(file.read_text())
    (result,) = content["results"]
    assert (result["num_completed"], result["num_failed"], result["errors"]) == (12, 0, {})
    assert (result["num_prompt_tokens"], result["num_output_tokens"], result["num_cached_tokens"]) == (84, 72, 12)
    assert result["output_tokens_per_second"] * result["seconds"] == pytest.approx(72)
    assert result["goodput"] == pytest.approx(result["requests_per_second"])
    assert result["e2e"]["max"] >= result["e2e"]["percentiles"]["99"] >= result["ttft"]["percentiles"]["50"] > 0
    assert API_KEY not in file.read_text()
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("TTFT", "ITL", "TPOT", "E2E", "p99", "goodput", "tokens/s"))


def test_sweep_of_chats_draws_a_curve(server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "curve.svg"
    arguments = ["--endpoint", "chat", "--num-prompts", "4", "--output-len", "3"]
    assert bench(server, *arguments, "--sweep", "rate:200,inf", "--plot", str(file), "m") == 0
    assert server.bodies[0]["model"] == "m"
    assert len(server.bodies[0]["messages"][0]["content"].split()) == 5
    assert server.bodies[0] != server.bodies[4], "the second load must not find the first one's prompts in a cache"
    shown = capsys.readouterr().out
    assert "200 requests/s" in shown
    assert "all at once" in shown
    assert ET.parse(file).getroot().tag.endswith("svg")


@pytest.mark.parametrize(("max_tokens", "words"), [(CANNOT, "HTTP 400: this cannot be"), (BREAKS, "it broke")])
def test_failed_requests_are_counted_and_shown(
    server: OpenAIServer, max_tokens: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(server, "--num-prompts", "3", "--output-len", str(max_tokens)) == 1
    shown = capsys.readouterr().out
    assert f"3 requests failed: {words}" in shown
    assert "0 / 3" in shown


def test_without_usage_events_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    with OpenAIServer(with_usage=False) as server:
        assert bench(server, "--num-prompts", "2", "--output-len", "4", "--json", str(file)) == 0
    assert json.loads(file.read_text())["results"][0]["num_output_tokens"] == 8
    assert "no usage" in capsys.readouterr().out


def test_nothing_works(server: OpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve", "--url", server.url, "--num-prompts", "1", "m"]) == 1
    assert "no request succeeded: HTTP 401: wrong key" in capsys.readouterr().err
    assert cli.main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    assert "lists no model" in capsys.readouterr().err


def test_requests_of_a_file(server: OpenAIServer, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "Hi?"},
        {"from": "gpt", "value": "Hello you."},
    ]
    file.write_text(json.dumps({"conversations": turns}) + "\n" + json.dumps({"prompt": "Go", "max_tokens": 3}) + "\n")
    assert bench(server, "--dataset", "file", "--dataset-path", str(file), "--max-concurrency", "1") == 0
    assert [(body["prompt"], body["max_tokens"]) for body in server.bodies] == [("Hi?", 2), ("Go", 3)]


def test_plot_without_matplotlib(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minivllm.plots.find_spec", lambda name: None)
    assert bench(server, "--sweep", "rate:1,2", "--plot", str(tmp_path / "a.png")) == 1
    assert "pip install 'mini-vllm[plot]'" in capsys.readouterr().err
    assert server.bodies == []
