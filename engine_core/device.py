"""What an engine core runs on: a model, the memory for its K/V, and who runs its passes.

`load_device` brings the real one. Whoever has no model, a simulation or a replay, hands the engine core a `Device` with
a runner of its own: everything above, from admission to preemption, is then the very same code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine_core.admission import choose_max_model_len
from engine_core.grammar import Grammars
from engine_core.kv_pool import KVLayout, KVPool, choose_num_blocks
from engine_core.model_loader import LoadedModel, ModelFacts, load_model, measure_activation_bytes
from engine_core.model_runner import ModelRunner
from engine_core.out_of_memory import explained_at_startup
from engine_core.request import Request
from engine_core.scheduler import Batch
from minivllm.config import EngineConfig
from minivllm.protocol import Logprobs

_DEFAULT_BATCHED_TOKENS = {"cuda": 8192, "cpu": 512}

Report = Callable[[str], None]


class LaunchedTokens(Protocol):
    """Tokens of a launched pass."""

    @property
    def failures(self) -> Mapping[Request, str]:
        """Requests that cannot go on, and why; their token is void."""

    def collect(self) -> list[int]:
        """Wait for the pass, then one id per request of `Batch.sampled`."""

    def read_logprobs(self, batch: Batch) -> dict[Request, Logprobs]:
        """After `collect`: log-probabilities of the sampled tokens of `Batch.with_logprobs`."""

    def read_prompt_logprobs(self, batch: Batch) -> dict[Request, Logprobs]:
        """After `collect`: log-probabilities of the prompt tokens of `Batch.prompt_spans`."""


class ModelFreeTokens:
    """Base for launched passes of a device that has no model, and so no probabilities."""

    __slots__ = ()

    @property
    def failures(self) -> Mapping[Request, str]:
        """None."""
        return {}

    def read_logprobs(self, batch: Batch) -> dict[Request, Logprobs]:
        """None."""
        return {}

    def read_prompt_logprobs(self, batch: Batch) -> dict[Request, Logprobs]:
        """None."""
        return {}


class Runner(Protocol):
    """Runs the scheduler's batches; see `ModelRunner`."""

    def launch(self, batch: Batch) -> LaunchedTokens:
        """Start `batch` and return without waiting for it. Raises when the device has no memory for it."""

    def release_memory(self) -> None:
        """Give back all memory that was allocated on demand. Only while no request runs."""


@dataclass(slots=True)
class WatchedRunner:
    """Tells `on_launch` of every batch before `runner` gets it."""

    runner: Runner
    on_launch: Callable[[Batch], None]

    def launch(self, batch: Batch) -> LaunchedTokens:
        """See `Runner`."""
        self.on_launch(batch)
        return self.runner.launch(batch)

    def release_memory(self) -> None:
        """See `Runner`."""
        self.runner.release_memory()


@dataclass(slots=True)
class Device:
    """`depth` is the number of passes in flight between two steps; without a model there are no `grammars`."""

    model: ModelFacts
    kv_pool: KVPool
    runner: Runner
    max_model_len: int
    max_num_batched_tokens: int
    depth: int
    grammars: Grammars | None = None


def load_device(config: EngineConfig, directory: Path, report: Report) -> Device:
    """Load the model in `directory` and warm it up. `report` is told what goes on. Raises `StartupError`."""
    report("loading the weights")
    with explained_at_startup("the weights", "choose a smaller model or --dtype"):
        model = load_model(config, directory)
    device = model.device
    max_num_batched_tokens = config.max_num_batched_tokens or _DEFAULT_BATCHED_TOKENS[device.type]
    report("sizing the KV cache")
    num_blocks = _choose_num_blocks(config, model, max_num_batched_tokens)
    max_model_len = choose_max_model_len(config, model, num_blocks)
    with explained_at_startup(
        f"{num_blocks} KV cache blocks", "lower --gpu-memory-utilization, --kv-cache-memory-bytes or --max-num-seqs"
    ):
        kv_pool = KVPool(model.layout, num_blocks, config.block_size, device)
        grammars = Grammars(config, model.vocab_size, model.eos_token_ids)
        runner = _make_runner(config, model, kv_pool, max_model_len, grammars)
    with explained_at_startup("compiled layers", "lower --gpu-memory-utilization or choose --enforce-eager"):
        runner.warm_up(report)
    depth = 1 if device.type == "cuda" else 0
    return Device(model, kv_pool, runner, max_model_len, max_num_batched_tokens, depth, grammars)


def model_free_device(
    runner: Runner,
    *,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    depth: int = 0,
    vocab_size: int = 2**31,
    eos_token_ids: tuple[int, ...] = (),
) -> Device:
    """A device of these sizes without a model; its pool has addresses, but nobody reads them."""
    cpu = torch.device("cpu")
    layout = KVLayout(1, 1, 1, torch.float32)
    model = ModelFacts(
        layout=layout,
        device=cpu,
        eos_token_ids=eos_token_ids,
        max_positions=max_model_len,
        vocab_size=vocab_size,
        weight_bytes=0,
    )
    kv_pool = KVPool(layout, num_blocks, block_size, cpu)
    return Device(model, kv_pool, runner, max_model_len, max_num_batched_tokens, depth)


def _choose_num_blocks(config: EngineConfig, model: LoadedModel, max_num_batched_tokens: int) -> int:
    with explained_at_startup(
        f"a pass of {max_num_batched_tokens} tokens",
        f"lower --max-num-batched-tokens ({max_num_batched_tokens}) or --max-num-seqs ({config.max_num_seqs})",
    ):
        activation_bytes = measure_activation_bytes(model, max_num_batched_tokens, config.max_num_seqs)
    return choose_num_blocks(config, model.layout, model.device, activation_bytes)


def _make_runner(
    config: EngineConfig, model: LoadedModel, kv_pool: KVPool, max_model_len: int, grammars: Grammars
) -> ModelRunner:
    if model.device.type != "cuda":
        if model.layout.dtype != torch.float32:
            return ModelRunner(model, kv_pool, config.max_num_seqs, max_model_len, grammars)
        from engine_core.cpu_runner import CpuRunner  # numba takes a while to import, and a GPU needs none

        return CpuRunner(model, kv_pool, config.max_num_seqs, max_model_len, grammars)
    from engine_core.cuda_runner import CudaRunner  # needs triton, which a CPU does not

    return CudaRunner(model, kv_pool, config.max_num_seqs, max_model_len, grammars, eager=config.enforce_eager)
