"""Options of `minivllm bench frontend`."""

from pathlib import Path

from pydantic import Field

from minivllm.bench.serving.endpoints import EndpointName
from minivllm.config import ModelConfig, Positive


class FrontendBenchOptions(ModelConfig):
    """MODEL is only needed for its tokenizer."""

    endpoint: EndpointName = Field("generate", description="completions, chat or generate")
    streams: Positive = Field(256, description="requests that stream at once")
    output_len: Positive = Field(512, description="tokens of each")
    tokens_per_second: float = Field(
        60_000.0, gt=0, description="what the stub engine offers, one token per stream and step"
    )
    frontends: Positive = Field(1, description="frontend processes that share the port")
    num_processes: Positive = Field(1, description="load processes")
    repeats: Positive = Field(3, description="measurements; the median is shown")
    json_: Path | None = Field(None, description="write the numbers there too")
