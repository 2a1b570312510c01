"""Options of `minivllm bench`: those of the engine core, and what to measure."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from minivllm.config import EngineConfig, ModelConfig, Positive

_Counts = tuple[Positive, ...]
_Range = tuple[Positive, Positive]


class ShapedConfig(ModelConfig):
    """Which model, or which published configuration. A `shape` or a cut one has random weights."""

    shape: Literal["qwen3-0.6b", "llama-3.1-8b"] | None = Field(
        None, description="published configuration to run on random weights, in place of MODEL"
    )
    vocab_size: Positive | None = Field(None, description="other vocabulary for a model of random weights")
    num_hidden_layers: Positive | None = Field(None, description="other number of layers for it")

    @model_validator(mode="after")
    def _check_random(self) -> Self:
        if self.shape is not None and "model" in self.model_fields_set:
            raise ValueError(f"--shape {self.shape} and MODEL {self.model}: give one of them")
        changed = self.vocab_size is not None or self.num_hidden_layers is not None
        if changed and self.shape is None and self.load_format != "dummy":
            raise ValueError("--vocab-size and --num-hidden-layers need --shape or --load-format dummy")
        return self


class BenchOptions(ShapedConfig, EngineConfig):
    """What all benchmarks take."""

    repeats: Positive = Field(3, description="measurements of each number; the median is shown")
    json_: Path | None = Field(None, description="write the numbers there too")


class ComparedOptions(BenchOptions):
    """For benchmarks that Hugging Face's `generate()` can run too."""

    temperature: float = Field(0.0, ge=0.0, le=100.0, description="of sampling; 0 is greedy")
    compare: Literal["hf"] | None = Field(
        None, description="hf: also run Hugging Face generate() on the same work, weights and device"
    )
    hf_batch_size: Positive = Field(256, description="requests in a static batch of Hugging Face")


class LatencyOptions(ComparedOptions):
    """`minivllm bench latency`."""

    batch_sizes: _Counts = Field((1, 8, 64), description="requests that decode together")
    prompt_len: Positive = Field(100, description="tokens of their prompts")
    output_lens: _Range = Field(
        (32, 544), description="short and long output; a step is the slope between the times of both"
    )
    ttft_prompt_lens: _Counts = Field((128, 1024, 3900), description="prompts to time to the first token, alone")
    prefill_shape: _Range = Field((128, 1024), description="number and tokens of prompts to prefill at once")
    compare_output_lens: _Range = Field((8, 40), description="output_lens for Hugging Face")

    @model_validator(mode="after")
    def _check_lens(self) -> Self:
        for name in ("output_lens", "compare_output_lens"):
            short, long = getattr(self, name)
            if short >= long:
                raise ValueError(f"{name} must be short,long, got {short},{long}")
        return self


class ThroughputOptions(ComparedOptions):
    """`minivllm bench throughput`: the defaults are nano-vllm's bench.py."""

    temperature: float = Field(0.6, ge=0.0, le=100.0, description="of sampling; 0 is greedy")
    num_requests: Positive = Field(256, description="requests, all submitted at once")
    input_lens: _Range = Field((100, 1024), description="shortest and longest prompt, in tokens")
    output_lens: _Range = Field((100, 1024), description="shortest and longest output, in tokens")
    warmups: Annotated[int, Field(ge=0)] = Field(1, description="runs before those that count")
    compare_requests: Positive | None = Field(None, description="how many of the requests Hugging Face gets [all]")
    compare_max_tokens: Positive | None = Field(
        None, description="longest output of the comparison, for both [as long as asked]"
    )
    profile: bool = Field(False, description="one more run under the profiler: how busy the GPU is, and with what")

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name in ("input_lens", "output_lens"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be shortest,longest, got {low},{high}")
        return self


class StartupOptions(BenchOptions):
    """`minivllm bench startup`."""

    repeats: Positive = Field(1, description="measurements of each number; the median is shown")


class FitOptions(BenchOptions):
    """`minivllm bench fit`."""

    repeats: Positive = Field(4, description="turns in which all passes are timed; the median is taken")
    batch_sizes: _Counts = Field((1, 2, 4, 8, 12, 16, 24, 32), description="requests that decode together")
    context_lens: _Range = Field((16, 512), description="shortest and longest prompt of decoding requests, in tokens")
    prefill_sizes: _Counts = Field(
        (8, 16, 32, 64, 128, 256, 512), description="tokens of a prefill pass; at most --max-num-batched-tokens"
    )
    chunked_prompt_len: Positive = Field(2048, description="tokens of a prompt that takes many passes")
    num_decode_steps: Positive = Field(24, description="decode steps of each batch size, in all turns together")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for name in ("batch_sizes", "prefill_sizes"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name} must ascend, got {','.join(map(str, sizes))}")
        if self.batch_sizes[-1] > self.max_num_seqs:
            raise ValueError(f"batch_sizes up to {self.batch_sizes[-1]}, but max_num_seqs is {self.max_num_seqs}")
        return self
