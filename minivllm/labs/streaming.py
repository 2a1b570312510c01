"""Lab streaming: where a token's time goes between sampling and the client's socket, and what buffering would do."""

import asyncio
import itertools
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from engine_core.model_loader import read_config
from engine_core.server import EngineServer
from frontend import sse
from frontend.detokenizer import IncrementalDetokenizer
from frontend.output_stream import OutputStream
from frontend.tokenizer import Tokenizer
from minivllm.bench.offline.machine import this_machine
from minivllm.bench.offline.stand_in_tokenizer import write_stand_in_tokenizer
from minivllm.errors import StartupError
from minivllm.labs.findings import Findings, Rows
from minivllm.labs.workbench import Workbench
from minivllm.local_server import LocalServer
from minivllm.model_store import resolve_tokenizer
from minivllm.plots import COLORS, new_figure
from minivllm.protocol import Outputs, decode_from_engine, encode
from minivllm.sampling_params import SamplingParams
from minivllm.units import TIME, duration, fitting, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STEP_SECONDS = re.compile(r'^minivllm:step_seconds_(sum|count)\{.*kind="decode".*\} (\S+)$', re.MULTILINE)
_OVERLAP = "While a token is on its way to the client, the engine runs the next pass."


class Served(NamedTuple):
    """One streamed request (the arrival of each token) and the same one whole. Seconds since it was sent."""

    streamed: list[float]
    whole: float
    decode_pass: float


class Way(NamedTuple):
    """Seconds of each part of a token's way, and what the sheet says of their sum."""

    parts: dict[str, float]
    sentence: str
    notes: list[str]


def run(bench: Workbench) -> Findings:
    """A real server for what the client sees; the parts of the way alone, for what each of them takes."""
    num_tokens = bench.pick(64, 12, gpu=512)
    bench.watch.plan(2)
    with tokenizer_directory(bench) as directory:
        served = bench.watch.run("a server and its client", lambda: _serve(bench, directory, num_tokens))
        tokenizer = Tokenizer.from_directory(directory)
    parts = bench.watch.run("the parts of the way", lambda: _parts(tokenizer))
    first, last = served.streamed[0], served.streamed[-1]
    mean = (last - first) / (num_tokens - 1)
    way = account(served.decode_pass, parts, mean)
    return Findings(
        number=f"A token comes every {duration(mean)}; {way.sentence}",
        broken=f"without streaming the first text comes after {duration(served.whole)} instead of {duration(first)}, "
        f"{number(served.whole / first)} times as late; the last token comes at the same time.",
        tables=[_part_table(way.parts, mean), _buffer_table(served.streamed)],
        figure=_draw(way.parts, served.streamed),
        code=(EngineServer, OutputStream, IncrementalDetokenizer.add, sse.send_events),
        notes=[f"One request of {num_tokens} tokens, streamed over HTTP from a server of its own.", *way.notes],
    )


def account(decode_pass: float, after: dict[str, float], mean: float) -> Way:
    """Compare the parts with `mean`, the time between two tokens: what is missing is the rest, or some overlap."""
    parts = {"forward pass and sampling": decode_pass, **after}
    rest = mean - sum(parts.values())
    if rest >= 0:
        sentence = (
            f"{duration(decode_pass)} of it are the forward pass, {duration(mean - decode_pass)} everything after it."
        )
        return Way(parts | {"sockets, event loops, the rest": rest}, sentence, [])
    after_it = duration(sum(after.values()))
    return Way(
        parts,
        f"a forward pass takes {duration(decode_pass)}, and the {after_it} after it overlap with the next one.",
        [f"The parts sum to {duration(-rest)} more than the time between two tokens: they overlap. {_OVERLAP}"],
    )


@contextmanager
def tokenizer_directory(bench: Workbench) -> Iterator[Path]:
    """The model's tokenizer; for a configuration that has none, of random weights, one that is made up."""
    options = bench.options
    if options.load_format != "dummy" or options.tokenizer or (bench.directory / "tokenizer.json").is_file():
        yield resolve_tokenizer(options)
        return
    with tempfile.TemporaryDirectory(prefix="minivllm-tokenizer-") as temporary:
        write_stand_in_tokenizer(Path(temporary), read_config(bench.directory).get_text_config().vocab_size)
        yield Path(temporary)


def _serve(bench: Workbench, tokenizer: Path, num_tokens: int) -> Served:
    config = bench.config()
    options = ("--device", config.device, "--load-format", config.load_format, "--tokenizer", str(tokenizer))
    with LocalServer(str(bench.directory), *options, "--api-server-count", "1") as server:
        bench.machine = this_machine(bench.device)
        return asyncio.run(_request(server.url, num_tokens))


async def _request(url: str, num_tokens: int) -> Served:
    async with httpx.AsyncClient(base_url=url, timeout=300.0) as http:
        await _stream(http, 7, 4)  # warms up
        before = await _decode_seconds(http)
        streamed = await _stream(http, 8, num_tokens)
        after = await _decode_seconds(http)
        start = time.perf_counter()
        (await http.post("/generate", json=_body(9, num_tokens) | {"stream": False})).raise_for_status()
        whole = time.perf_counter() - start
    return Served(streamed, whole, (after[0] - before[0]) / max(1.0, after[1] - before[1]))


def _body(token_id: int, num_tokens: int) -> dict[str, Any]:
    return {"prompt": [token_id] * 16, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


async def _stream(http: httpx.AsyncClient, token_id: int, num_tokens: int) -> list[float]:
    """When each token arrived, in seconds since the request was sent. Raises `StartupError` when some are missing."""
    start, times, line = time.perf_counter(), list[float](), ""
    async with http.stream("POST", "/generate", json=_body(token_id, num_tokens)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                times += [time.perf_counter() - start] * len(event.get("token_ids", ()))
    if len(times) != num_tokens:
        raise StartupError(f"a request for {num_tokens} tokens brought {len(times)}: {line}")
    return times


async def _decode_seconds(http: httpx.AsyncClient) -> tuple[float, float]:
    """Sum and count of all decode passes so far; the engine core publishes them once a second."""
    await asyncio.sleep(1.2)
    found = dict(_STEP_SECONDS.findall((await http.get("/metrics")).text))
    if found.keys() != {"sum", "count"}:
        raise StartupError("the server's /metrics do not tell the seconds of decode passes")
    return float(found["sum"]), float(found["count"])


def _parts(tokenizer: Tokenizer) -> dict[str, float]:
    """Seconds per token of what happens after the pass, each alone."""
    frame = bytes(encode(Outputs(1, 1, ["gen-0123456789abcdef"], [1], [504], {})))
    event = {"request_id": "gen-0123456789abcdef", "text": " capital", "token_ids": [504], "finish_reason": None}
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    return {
        "wire: encode, decode": _seconds(lambda: decode_from_engine(frame), lambda: encode(decode_from_engine(frame))),
        "detokenizer": _seconds(lambda: detokenizer.add([504])),
        "event: JSON, SSE": _seconds(lambda: sse.event(json.dumps(event).encode())),
    }


def _seconds(*steps: Callable[[], object], repeats: int = 2000) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        for step in steps:
            step()
    return (time.perf_counter() - start) / repeats


def _part_table(parts: dict[str, float], mean: float) -> Rows:
    rows = [(name, number(1e6 * seconds), number(100 * seconds / mean)) for name, seconds in parts.items()]
    return Rows("One token's way", ("part", "µs", "% of the time between tokens"), rows)


def _buffer_table(streamed: Sequence[float]) -> Rows:
    rows = []
    unit = fitting(TIME, streamed)
    for size in (1, 4, 16, len(streamed)):
        shown = buffered(streamed, size)
        gaps = [after - before for before, after in itertools.pairwise(shown)]
        rows.append((str(size), unit.text(shown[0]), unit.text(max(gaps)) if gaps else ""))
    columns = ("tokens together", f"first text, {unit.name}", f"longest silence after it, {unit.name}")
    return Rows("Had somebody on the way buffered", columns, rows)


def buffered(streamed: Sequence[float], size: int) -> list[float]:
    """When text would appear, in seconds from the start, if tokens were passed on `size` at a time."""
    ends = [*range(size - 1, len(streamed), size)]
    if not ends or ends[-1] != len(streamed) - 1:
        ends.append(len(streamed) - 1)
    return [streamed[index] for index in ends]


def _draw(parts: dict[str, float], streamed: Sequence[float]) -> "Figure":
    figure, (top, bottom) = new_figure(2, height=2.6)
    names = list(parts)[::-1]
    top.barh(names, [max(1e6 * parts[name], 0.1) for name in names], color=COLORS[0])
    top.set(xscale="log", xlabel="µs per token", title="Where a token's time goes")
    unit = fitting(TIME, streamed)
    for size, color in zip((1, 16, len(streamed)), COLORS, strict=False):
        shown = buffered(streamed, size)
        counts: Sequence[int] = [min(size * (index + 1), len(streamed)) for index in range(len(shown))]
        label = "streamed" if size == 1 else f"{size} tokens together"
        bottom.step([0.0, *(time / unit.size for time in shown)], [0, *counts], where="post", color=color, label=label)
    bottom.set(xlabel=unit.name, ylabel="tokens on the screen", title="What buffering would do")
    bottom.legend(frameon=False)
    return figure
