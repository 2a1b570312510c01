"""Options of `minivllm simulate`: the traffic, the policy of the engine, and what is asked."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from minivllm.config import EngineConfig, Options, Positive
from minivllm.simulate.capacity import SLO
from minivllm.simulate.cost_model import DEFAULT_COST_MODEL
from minivllm.simulate.engine import Policy
from minivllm.simulate.trace import Arrivals, Lengths, TraceShape

_Range = tuple[Positive, Positive]
_ENGINE = EngineConfig.model_fields
_MAX_NUM_SEQS: int = _ENGINE["max_num_seqs"].default


class SimulateOptions(Options):
    """`minivllm simulate`. Engine options that are not given are those of the engine that was measured."""

    cost_model: str = Field(DEFAULT_COST_MODEL, description="packaged name, or file of `minivllm bench fit --json`")
    arrivals: Arrivals = Field("poisson", description="how requests come")
    trace: Path | None = Field(None, description="JSONL file of requests, instead of random ones")
    num_requests: Positive = Field(1000, description="requests of a random trace")
    rate: float = Field(1.0, gt=0, allow_inf_nan=False, description="requests per second")
    burst_size: Positive = Field(32, description="requests that come together, with --arrivals burst")
    lengths: Lengths = Field("uniform", description="distribution of prompt and output lengths between their limits")
    input_lens: _Range = Field((20, 200), description="shortest and longest prompt, in tokens")
    output_lens: _Range = Field((64, 128), description="shortest and longest output, in tokens")
    num_prefixes: Positive = Field(1, description="different shared prefixes, chosen at random")
    prefix_tokens: int = Field(0, ge=0, description="tokens of a shared prefix, before each prompt")
    seed: int = Field(0, description="seed of the random trace")
    max_num_seqs: Positive = Field(_MAX_NUM_SEQS, description=_ENGINE["max_num_seqs"].description)
    max_num_batched_tokens: Positive | None = Field(None, description="most prompt tokens in one prefill step")
    block_size: Positive | None = Field(None, description=_ENGINE["block_size"].description)
    num_gpu_blocks_override: Positive | None = Field(None, description="number of KV cache blocks")
    enable_prefix_caching: bool = Field(True, description=_ENGINE["enable_prefix_caching"].description)
    max_model_len: Positive | None = Field(None, description="longest prompt + output in tokens")
    slo: tuple[str, ...] = Field(
        (), description="find the highest rate that keeps ttft:MS,tpot:MS,itl:MS,e2e:MS (any of them)"
    )
    slo_percentile: Literal["50", "90", "99"] = Field("99", description="of which percentile --slo speaks")
    traffic: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="with --slo: say how many servers so many requests per second need"
    )
    plot: Path | None = Field(None, description="draw queue, batch and KV cache over time there (.svg or .png)")
    json_: Path | None = Field(None, description="write the numbers there too")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("input_lens", "output_lens"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be shortest,longest, got {low},{high}")
        if self.slo and (self.trace is not None or self.arrivals == "at-once"):
            raise ValueError("slo looks for a rate, so it needs arrivals poisson or burst, and no trace")
        if self.traffic is not None and not self.slo:
            raise ValueError("traffic needs --slo: what the servers must keep")
        SLO.parse(self.slo, self.percentile)
        return self

    @property
    def percentile(self) -> int:
        return int(self.slo_percentile)

    @property
    def shape(self) -> TraceShape:
        names = TraceShape.__dataclass_fields__
        return TraceShape(**{name: getattr(self, name) for name in names})

    @property
    def policy(self) -> Policy:
        return Policy(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            num_blocks=self.num_gpu_blocks_override,
            enable_prefix_caching=self.enable_prefix_caching,
            max_model_len=self.max_model_len,
        )
