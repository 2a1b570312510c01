"""Writes down every scheduling decision and everything that feeds it, one JSON line each: `--record FILE`.

engine   the sizes that decide                           tokens   what the device sampled, in the order of `sampled`
add      a request that was admitted                     fail     the launch before, or the oldest in flight, failed
abort    requests that were ended from outside           step     `EngineCore.step` begins; what follows is of that step
launch   the decision: who computes which tokens, and which blocks were given for them

`minivllm replay FILE` feeds add, abort, step, tokens and fail to the same engine core and compares every launch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from engine_core.device import Device, LaunchedTokens, Runner
from engine_core.request import Request
from engine_core.scheduler import Batch
from minivllm.config import EngineConfig
from minivllm.errors import StartupError
from minivllm.sampling_params import SamplingParams

VERSION = 1


class Recorded(Struct, frozen=True, tag_field="what", tag=lambda name: name.lower(), forbid_unknown_fields=True):
    """Base of all entries."""


class Engine(Recorded, frozen=True, kw_only=True):
    """The first line."""

    version: int = VERSION
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int
    enable_prefix_caching: bool
    depth: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Add(Recorded, frozen=True):
    """A request as it was admitted."""

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    params: SamplingParams


class Abort(Recorded, frozen=True):
    """Requests ended by the client."""

    request_ids: list[str]


class Step(Recorded, frozen=True):
    """`EngineCore.step` was called."""


class Launch(Recorded, frozen=True):
    """One pass: request i computes `counts[i]` tokens from `starts[i]` on; `blocks` are those of what is computed."""

    kind: Literal["prefill", "decode"]
    request_ids: list[str]
    starts: list[int]
    counts: list[int]
    sampled: list[str]
    blocks: dict[str, list[int]]

    @classmethod
    def of(cls, batch: Batch, block_size: int) -> "Launch":
        """The whole table of a request that starts (it may share a prefix), else only the blocks that are written."""
        starts = dict(zip(batch.requests, batch.starts, strict=True)) | dict.fromkeys(batch.started, 0)
        changed = [*batch.started, *(request for request in batch.grown if request not in batch.started)]
        return cls(
            batch.kind,
            [request.request_id for request in batch.requests],
            list(batch.starts),
            list(batch.counts),
            [request.request_id for request in batch.sampled],
            {request.request_id: request.block_table[starts[request] // block_size :] for request in changed},
        )


class Tokens(Recorded, frozen=True):
    """The oldest pass in flight was collected."""

    token_ids: list[int]


class Fail(Recorded, frozen=True):
    """The pass launched before could not be launched, or the oldest in flight not be collected."""

    error: str
    message: str
    at: Literal["launch", "collect"] = "launch"


Entry = Engine | Add | Abort | Step | Launch | Tokens | Fail


class DecisionLog:
    """Appends entries to a file; everything up to the last whole step survives a crash. Raises `StartupError`."""

    def __init__(self, path: Path, config: EngineConfig, device: Device) -> None:
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise StartupError(f"--record {path}: {error.strerror}") from error
        self._block_size = config.block_size
        self.write(
            Engine(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=device.max_num_batched_tokens,
                max_model_len=device.max_model_len,
                num_blocks=device.kv_pool.num_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
                depth=device.depth,
                vocab_size=device.model.vocab_size,
                eos_token_ids=tuple(device.model.eos_token_ids),
            )
        )

    def add(self, request: Request) -> None:
        """`request` was admitted."""
        self.write(Add(request.request_id, request.prompt_token_ids, request.output_token_ids, request.params))

    def abort(self, request_ids: list[str]) -> None:
        self.write(Abort(request_ids))

    def step(self) -> None:
        """A step begins: what the ones before wrote goes to the file."""
        self.write(Step())
        self._file.flush()

    def tokens(self, token_ids: list[int]) -> None:
        """The oldest pass in flight brought these."""
        self.write(Tokens(token_ids))

    def fail_collect(self, detail: str) -> None:
        """There was no memory to collect the oldest pass in flight."""
        self.write(Fail("MemoryError", detail, "collect"))

    def recorded(self, runner: Runner) -> "RecordedRunner":
        """`runner`, with every launch written down."""
        return RecordedRunner(runner, self, self._block_size)

    def write(self, entry: Entry) -> None:
        """One line."""
        self._file.write(msgspec.json.encode(entry) + b"\n")

    def close(self) -> None:
        """The end of the file."""
        self._file.close()


@dataclass(slots=True)
class RecordedRunner:
    """Writes down batches before `runner` gets them, and its failures."""

    runner: Runner
    log: DecisionLog
    block_size: int

    def launch(self, batch: Batch) -> LaunchedTokens:
        """See `Runner`."""
        self.log.write(Launch.of(batch, self.block_size))
        try:
            return self.runner.launch(batch)
        except Exception as error:
            self.log.write(Fail(type(error).__name__, str(error)))
            raise

    def release_memory(self) -> None:
        """See `Runner`."""
        self.runner.release_memory()
