"""Options of `minivllm bench serve`."""

import math
import random
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from minivllm.bench.serving.datasets import RandomPrompts, nano_requests, read_requests
from minivllm.bench.serving.endpoints import EndpointName, RequestSpec
from minivllm.bench.serving.summary import SLO_METRICS
from minivllm.bench.serving.target import Address
from minivllm.config import Options, Positive

_DEFAULT_NUM_PROMPTS = 256
_SEVERAL: dict[str, Any] = {"several": True}  # the flag takes several words

Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class Point(NamedTuple):
    """One load: requests per second (infinite: all at once) and requests in flight (None: no limit)."""

    rate: float
    concurrency: int | None

    def __str__(self) -> str:
        parts = [] if math.isinf(self.rate) else [f"{self.rate:g} requests/s"]
        parts += [] if self.concurrency is None else [f"{self.concurrency} in flight"]
        return ", ".join(parts) or "all at once"


class ServeBenchOptions(Options):
    """What is measured, with what load, and what becomes of the numbers."""

    model: str | None = Field(None, description="name to ask for; default: the first that the server lists")
    url: str = Field("http://127.0.0.1:8000", description="address of the server")
    endpoint: EndpointName = Field("completions", description="/v1/completions, /v1/chat/completions or /generate")
    api_key: str | None = Field(None, repr=False, description="key that is sent as a bearer token")

    dataset: Literal["random", "nano", "file"] = Field(
        "random", description="random tokens, nano-vllm's workload, or --dataset-path"
    )
    dataset_path: Path | None = Field(
        None, description="JSON or JSONL file of requests: ShareGPT conversations, or prompt and max_tokens"
    )
    num_prompts: Positive | None = Field(None, description="requests [256; of a file: all]")
    input_len: Positive = Field(128, description="tokens of a random prompt")
    output_len: Positive | None = Field(None, description="tokens of an answer [128; of a file: as it says]")
    range_ratio: float = Field(0.0, ge=0.0, lt=1.0, description="lengths vary by this fraction up and down")
    prefix_len: NotNegative = Field(0, description="tokens before a random prompt that others share")
    num_prefixes: Positive = Field(1, description="different prefixes of that length")
    max_token_id: Positive = Field(9999, description="highest id in a random prompt")
    seed: int = Field(0, description="of prompts and arrivals")

    request_rate: Rate = Field(math.inf, description="requests per second, whatever the server does; inf: all at once")
    burstiness: Rate = Field(1.0, description="1: Poisson arrivals; less: in bursts; more: evenly")
    max_concurrency: Positive | None = Field(None, description="most requests in flight")
    sweep: str | None = Field(
        None, description="several loads, one after the other: rate:1,2,4,inf or concurrency:1,8,64"
    )
    num_warmups: NotNegative = Field(8, description="small requests before the clock starts")
    num_processes: Positive | None = Field(None, description="load processes [a quarter of the cores, at most 8]")
    timeout: float = Field(600.0, gt=0, description="seconds after which a request counts as failed")

    temperature: float = Field(0.0, ge=0.0, description="of sampling; 0 is greedy")
    ignore_eos: bool = Field(True, description="ask for the full length (a field that not every server knows)")

    goodput: tuple[str, ...] = Field(
        (), description="limits in milliseconds that a good request meets: ttft:200 tpot:50 e2e:3000",
        json_schema_extra=_SEVERAL,
    )  # fmt: skip
    json_: Path | None = Field(None, description="write the numbers there too")
    plot: Path | None = Field(None, description="draw the latency–throughput curve there: FILE.png or FILE.svg")

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        Address.of(url)
        return url

    @field_validator("goodput")
    @classmethod
    def _check_goodput(cls, limits: tuple[str, ...]) -> tuple[str, ...]:
        _limits(limits)
        return limits

    @field_validator("sweep")
    @classmethod
    def _check_sweep(cls, sweep: str | None) -> str | None:
        _points(sweep)
        return sweep

    @field_validator("plot")
    @classmethod
    def _check_plot(cls, plot: Path | None) -> Path | None:
        if plot is not None and plot.suffix not in {".png", ".svg"}:
            raise ValueError("must end in .png or .svg")
        return plot

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.dataset == "file") != (self.dataset_path is not None):
            raise ValueError("--dataset file and --dataset-path FILE belong together")
        if self.plot is not None and len(self.points) < 2:
            raise ValueError("--plot draws a curve: it needs --sweep with at least two loads")
        return self

    @property
    def slo(self) -> dict[str, float] | None:
        """Limits in milliseconds."""
        return _limits(self.goodput) or None

    @property
    def points(self) -> list[Point]:
        """The loads to measure, in order."""
        swept = _points(self.sweep)
        if not swept:
            return [Point(self.request_rate, self.max_concurrency)]
        return [Point(point.rate, point.concurrency or self.max_concurrency) for point in swept]

    @property
    def sampling_fields(self) -> dict[str, Any]:
        """What every request asks for besides its prompt and length."""
        return {"temperature": self.temperature, **({"ignore_eos": True} if self.ignore_eos else {})}

    def requests(self, seed: int) -> list[RequestSpec]:
        """The requests of one run; `seed` makes random prompts of their own. Raises `StartupError`."""
        as_text = self.endpoint == "chat"
        prompts = RandomPrompts(random.Random(seed), self.max_token_id, as_text)
        if self.dataset_path is not None:
            return read_requests(self.dataset_path, self.output_len, as_text)[: self.num_prompts]
        num_prompts = self.num_prompts or _DEFAULT_NUM_PROMPTS
        if self.dataset == "nano":
            return nano_requests(num_prompts, prompts)
        return prompts.requests(
            num_prompts,
            self.input_len,
            self.output_len or 128,
            self.range_ratio,
            self.prefix_len,
            self.num_prefixes,
        )


def _limits(texts: tuple[str, ...]) -> dict[str, float]:
    """`("ttft:200",)` → `{"ttft": 200.0}`. Raises `ValueError`."""
    limits: dict[str, float] = {}
    for text in texts:
        name, _, limit = text.partition(":")
        if name not in SLO_METRICS:
            raise ValueError(f"a limit is ttft:MS, tpot:MS or e2e:MS, got {text!r}")
        limits[name] = _positive(limit)
    return limits


def _points(sweep: str | None) -> list[Point]:
    if sweep is None:
        return []
    kind, _, values = sweep.partition(":")
    numbers = [_positive(value) for value in values.split(",")]
    if kind == "rate":
        return [Point(number, None) for number in numbers]
    if kind != "concurrency" or any(number != int(number) for number in numbers if not math.isinf(number)):
        raise ValueError(f"must be rate:1,2,4 or concurrency:1,8,64, got {sweep!r}")
    return [Point(math.inf, None if math.isinf(number) else int(number)) for number in numbers]


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise ValueError(f"expected a number above 0, got {text!r}")
    return number
