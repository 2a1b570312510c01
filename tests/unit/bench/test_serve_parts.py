"""The parts of the load generator: arrivals, percentiles, datasets, options, the reader of events."""

import json
import math
import random
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from minivllm.bench.offline.work import nano_work
from minivllm.bench.serving.arrivals import arrival_offsets
from minivllm.bench.serving.client import EventStream
from minivllm.bench.serving.datasets import RandomPrompts, nano_requests, read_requests
from minivllm.bench.serving.endpoints import ENDPOINTS
from minivllm.bench.serving.messages import Sample
from minivllm.bench.serving.options import Point, ServeBenchOptions
from minivllm.bench.serving.summary import percentile, summarize
from minivllm.bench.serving.target import Address, Target
from minivllm.errors import StartupError
from minivllm.options import load_options


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float, variation: float) -> None:
    offsets = arrival_offsets(20_001, 50.0, burstiness, random.Random(1))
    gaps = [after - before for before, after in pairwise(offsets)]
    assert offsets[0] == 0.0
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) * 50 == pytest.approx(variation, rel=0.1)
    assert arrival_offsets(20, 50.0, burstiness, random.Random(1)) == offsets[:20]


def test_no_rate_means_at_once() -> None:
    assert arrival_offsets(3, math.inf, 1.0, random.Random(1)) == [0.0, 0.0, 0.0]


def test_latencies_are_defined_as_in_vllm() -> None:
    one = Sample(10.0, 10.7, [10.1, 10.2, 10.4, 10.6], num_output_tokens=6, num_prompt_tokens=3, has_usage=True)
    other = Sample(10.5, 11.0, [11.0], num_output_tokens=1, num_prompt_tokens=2, has_usage=True)
    bad = Sample(10.0, 12.0, [], error="no")
    summary = summarize([one, other, bad], {"ttft": 200.0, "tpot": 150.0})
    assert (summary.num_completed, summary.num_failed, summary.errors) == (2, 1, {"no": 1})
    assert summary.seconds == pytest.approx(2.0)
    assert summary.output_tokens_per_second == pytest.approx(7 / 2)
    assert summary.total_tokens_per_second == pytest.approx(12 / 2)
    assert summary.ttft.mean == pytest.approx((100 + 500) / 2)
    assert summary.itl.mean == pytest.approx((100 + 200 + 200) / 3)
    assert summary.tpot.mean == pytest.approx(500 / 5)
    assert summary.e2e.max == pytest.approx(600)
    assert summary.goodput == pytest.approx(1 / 2)  # the other one's first token came too late
    assert summary.tokens_per_event == pytest.approx(7 / 5)


def test_percentiles_are_interpolated() -> None:
    values = [float(value) for value in range(1, 102)]
    assert [percentile(values, p) for p in (0, 50, 90, 100)] == [1.0, 51.0, 91.0, 101.0]
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([3.0], 99) == 3.0


def test_random_prompts_share_prefixes() -> None:
    prompts = RandomPrompts(random.Random(3), 99, as_text=False)
    requests = prompts.requests(20, 10, 50, range_ratio=0.5, prefix_len=6, num_prefixes=2)
    assert {tuple(request.prompt[:6]) for request in requests[::2]} == {tuple(requests[0].prompt[:6])}
    assert requests[0].prompt[:6] != requests[1].prompt[:6]
    assert {len(request.prompt) for request in requests} <= set(range(11, 22))
    assert {request.max_tokens for request in requests} <= set(range(25, 76))
    assert len({request.max_tokens for request in requests}) > 5


def test_nano_requests_are_nano_vllms() -> None:
    work = nano_work(256, (100, 1024), (100, 1024), 49_152)
    requests = nano_requests(256, RandomPrompts(random.Random(0), 9, as_text=False))
    assert [request.prompt for request in requests] == work.prompts
    assert [request.max_tokens for request in requests] == work.output_lens


def test_a_workload_file(tmp_path: Path) -> None:
    file = tmp_path / "work.json"
    file.write_text(json.dumps({"requests": [{"text": "Hi", "ids": [1, 2], "max_tokens": 5}]}))
    assert read_requests(file, None, as_text=False) == [([1, 2], 5)]
    assert read_requests(file, 9, as_text=True) == [("Hi", 9)]


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "no request in it"), ("[3]", "must be an object"), ('[{"prompt": "a"}]', "without an output length"),
     ('[{"max_tokens": 1}]', "without a prompt"), ("{", "Expecting"), ('{"a": 1}', "requests")],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "work.json"
    file.write_text(content)
    with pytest.raises(StartupError, match=f"{file}.*{words}"):
        read_requests(file, None, as_text=False)


def options(*argv: str) -> ServeBenchOptions:
    return load_options(ServeBenchOptions, argv, "bench", {})


def test_options() -> None:
    chosen = options("--goodput", "ttft:200", "tpot:50", "--sweep", "concurrency:1,8,inf")
    assert chosen.slo == {"ttft": 200.0, "tpot": 50.0}
    assert chosen.points == [Point(math.inf, 1), Point(math.inf, 8), Point(math.inf, None)]
    assert options("--request-rate", "3", "--max-concurrency", "4").points == [Point(3.0, 4)]
    assert options("--sweep", "rate:1,2", "--max-concurrency", "4").points == [Point(1.0, 4), Point(2.0, 4)]
    environ = {"MINIVLLM_GOODPUT": "e2e:9,ttft:1"}
    assert load_options(ServeBenchOptions, [], "bench", environ).slo == {"e2e": 9.0, "ttft": 1.0}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--goodput", "speed:9"], "ttft:MS"),
        (["--goodput", "ttft:fast"], "expected a number above 0, got 'fast'"),
        (["--sweep", "rate:0"], "above 0"),
        (["--sweep", "users:1,2"], "rate:1,2,4 or concurrency:1,8,64"),
        (["--plot", "a.gif"], "must end in .png or .svg"),
        (["--plot", "a.png"], "--sweep"),
        (["--url", "ftp://x"], "not an http"),
        (["--dataset", "file"], "--dataset-path"),
        (["--request-rate", "0"], "--request-rate"),
    ],
)
def test_bad_options_are_named(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        options(*argv)
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err


def test_addresses() -> None:
    assert Address.of("https://a.b/v1") == Address("a.b", 443, True, "")
    assert Address.of("localhost:8000/prefix/") == Address("localhost", 8000, False, "/prefix")
    payload = Target("http://[::1]:80/x", "generate", {"seed": 1}, api_key="k").payload(
        options("--num-prompts", "1", "--input-len", "1").requests(0)[0]
    )
    head, _, body = payload.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /x/generate HTTP/1.1\r\nHost: [::1]:80\r\n")
    assert b"Authorization: Bearer k" in head
    assert json.loads(body)["seed"] == 1


def read(name: str, *pieces: bytes) -> tuple[EventStream, list[int]]:
    counts: list[int] = []
    stream = EventStream(ENDPOINTS[name].decode, counts.append)
    stream.on_status(200)
    for piece in pieces:
        stream.feed(piece)
    stream.finish()
    return stream, counts


def test_events_may_be_cut_anywhere() -> None:
    events: list[dict[str, Any]] = [{"text": "a", "token_ids": [1, 2]}, {"text": "", "token_ids": [3]}]
    events.append({"text": "", "token_ids": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}})
    data = b": ping\n\n" + b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
    data += b"data: [DONE]\n\n"
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))], [data.replace(b"\n", b"\r\n")]):
        stream, counts = read("generate", *pieces)
        assert counts == [2, 1]
        assert len(stream.event_times) == 2
        assert stream.error is None
        assert stream.usage is not None
        assert stream.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'data: {"choices":[{}]}\n\n', "without [DONE]"),
        (b"data: [DONE]\n\n", "no output"),
        (b"data: {]\n\ndata: [DONE]\n\n", "cannot be read"),
        (b'data: {"error": "odd"}\n\ndata: [DONE]\n\n', "odd"),
    ],
)
def test_what_is_wrong_with_a_stream(data: bytes, words: str) -> None:
    stream, _ = read("completions", data)
    assert stream.error is not None
    assert words in stream.error
