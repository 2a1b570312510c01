"""Every option, declared once: this one declaration serves the flag, the environment, the config file and the help.

`ServeConfig` is what `minivllm serve` takes. The engine core and the frontends are started with the same options and
each reads its own part: `EngineConfig` or `FrontendConfig`. Spelling follows vLLM.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minivllm.faults import Faults

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

Positive = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """Base: immutable, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Options):
    """Which model, and how to read it."""

    model: str = Field(DEFAULT_MODEL, description="local directory or Hugging Face hub id")
    tokenizer: str | None = Field(None, description="directory or hub id of the tokenizer, if not the model's")
    revision: str | None = Field(None, description="branch, tag or commit of the hub repository")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto reads the weights; dummy makes random ones of the model's configuration"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class EngineConfig(ModelConfig):
    """What the engine core needs."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the model's own on a GPU, float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU if there is one")
    max_model_len: Positive | None = Field(
        None, description="longest prompt + output in tokens; default: what the model allows and the KV cache holds"
    )
    max_num_seqs: Positive = Field(256, description="most requests that run at once")
    max_num_batched_tokens: Positive | None = Field(
        None, description="most prompt tokens in one prefill step; default 8192 on a GPU, 512 on a CPU"
    )
    block_size: Positive = Field(16, description="tokens per KV cache block")
    gpu_memory_utilization: float = Field(0.9, gt=0.0, le=1.0, description="fraction of GPU memory this engine may use")
    kv_cache_memory_bytes: Positive | None = Field(
        None, description="bytes for the KV cache; default: from --gpu-memory-utilization, 1 GiB on a CPU"
    )
    num_gpu_blocks_override: Positive | None = Field(None, description="number of KV cache blocks, whatever the memory")
    enable_prefix_caching: bool = Field(True, description="reuse the KV cache of equal prompt prefixes")
    seed: int = Field(0, description="seed of dummy weights")
    enforce_eager: bool = Field(False, description="no compilation and no CUDA graphs")
    record: Path | None = Field(
        None, description="write every scheduling decision there, with token ids, for `minivllm replay`"
    )
    log_step_composition: bool = Field(False, description="log the batch of every step")


class FrontendConfig(ModelConfig):
    """What a frontend needs."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    uds: Path | None = Field(None, description="listen on this Unix socket instead of host and port")
    served_model_name: str | None = Field(None, description="name of the model in the API; default: the model argument")
    chat_template: Path | None = Field(None, description="file with a Jinja chat template, if not the model's")
    max_num_queued_reqs: Positive = Field(
        4096, description="most unfinished requests of one frontend; more are refused with 429"
    )
    max_request_bytes: Positive = Field(16 * 1024 * 1024, description="largest request body; larger ones get 413")
    request_timeout: float = Field(
        30.0, gt=0, description="seconds for a client to send the headers of a request, and as many for its body"
    )
    limit_concurrency: Positive = Field(
        8192,
        description="most open connections of one frontend, as far as there are file descriptors; more are refused "
        "with 503",
    )
    api_key: str | None = Field(None, repr=False, description="key that clients must send as a bearer token")
    allowed_origins: tuple[str, ...] = Field((), description="origins that browsers may call from (CORS)")
    trace_file: Path | None = Field(
        None, description="write what the engine does to this file, in the format of Perfetto and Chrome"
    )
    enable_access_log: bool = Field(
        False, description="log a line for each HTTP request: id, method, path, status, milliseconds, tokens"
    )
    enable_log_requests: bool = Field(False, description="log each request's id and sizes (never its text)")


class ServeConfig(EngineConfig, FrontendConfig):
    """Options of `minivllm serve`, `python -m engine_core` and `python -m frontend`."""

    api_server_count: Positive | None = Field(
        None,
        description="number of frontend processes that share the port; default: 1 on a CPU, with a GPU one for every "
        "four cores, at most 4",
    )
    socket_dir: Path | None = Field(None, description="private directory of the ZeroMQ sockets; default: a fresh one")
    startup_timeout: float = Field(600.0, gt=0, description="seconds until every process must be ready")
    shutdown_timeout: float = Field(30.0, ge=0, description="seconds for running requests to finish after SIGTERM")
    step_timeout: float = Field(
        60.0, gt=0, description="seconds after which a step counts as stuck and the engine core is restarted"
    )
    max_engine_restarts: int = Field(
        10, ge=0, description="crashes of the engine core within 10 minutes that the server survives"
    )
    frontend_lease: float = Field(
        10.0, gt=0, description="seconds without a word of a frontend after which its requests are freed"
    )
    resume_timeout: float = Field(
        300.0, ge=0, description="seconds that running requests wait for a new engine core when theirs has died"
    )
    enable_debug: bool = Field(False, description="serve /debug/*, check the engine core at every heartbeat")
    inject_faults: str = Field(
        "", description="with --enable-debug: faults to inject, e.g. drop=0.01,stall=30@step:100 (minivllm/faults.py)"
    )
    disable_log_stats: bool = Field(False, description="no statistics line every 10 s")
    log_format: Literal["text", "json"] = Field("text", description="format of the log lines")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len must hold a prompt token and an output token, got {self.max_model_len}")
        if self.inject_faults and not self.enable_debug:
            raise ValueError("--inject-faults needs --enable-debug")
        try:
            Faults.parse(self.inject_faults)
        except ValueError as error:
            raise ValueError(f"--inject-faults: {error}") from error
        return self

    @property
    def faults(self) -> Faults:
        """What to inject."""
        return Faults.parse(self.inject_faults)

    @property
    def heartbeat_seconds(self) -> float:
        """How often either side says that it is there."""
        return min(1.0, self.frontend_lease / 3)

    @property
    def silence_timeout(self) -> float:
        """Seconds without a word after which the engine core is given up: it cannot speak during a step."""
        return self.step_timeout + 5.0
