"""The engine core on a device that computes nothing: its passes take the time that a cost model says.

host    schedule launch N+1 ·····collect N····· │     takes no time of its own: a fitted cost model includes it
device  [ pass N  base + context … ][ pass N+1 ]      one pass after the other, as launched
"""

from dataclasses import dataclass
from pathlib import Path

from engine_core.device import Device, ModelFreeTokens, Report, model_free_device
from engine_core.engine import EngineCore
from engine_core.scheduler import Batch
from minivllm.config import EngineConfig
from minivllm.simulate.cost_model import CostModel
from minivllm.simulate.trace import FILLER_TOKEN


class VirtualClock:
    """Seconds that pass only when somebody waits."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def wait_until(self, time: float) -> None:
        """It is `time` now, or later if it was."""
        self._now = max(self._now, time)


@dataclass(slots=True)
class _Pass(ModelFreeTokens):
    clock: VirtualClock
    end: float
    num_sampled: int

    def collect(self) -> list[int]:
        self.clock.wait_until(self.end)
        return [FILLER_TOKEN] * self.num_sampled


class SimulatedRunner:
    """Stands in for `ModelRunner`: every sampled token is the same, and nobody looks at it."""

    def __init__(self, cost_model: CostModel, clock: VirtualClock) -> None:
        self._cost_model = cost_model
        self._clock = clock
        self._free_at = 0.0

    def launch(self, batch: Batch) -> _Pass:
        """The device is busy with `batch` as soon as it is done with the one before."""
        self._free_at = max(self._free_at, self._clock()) + self._cost_model.seconds(batch)
        return _Pass(self._clock, self._free_at, len(batch.sampled))

    def release_memory(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Options of the engine that a simulation may vary; None: as the cost model was measured."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    max_model_len: int | None = None


def make_simulated_engine(cost_model: CostModel, policy: Policy, clock: VirtualClock) -> EngineCore:
    """A real `EngineCore` in virtual time. By default its KV cache holds as many tokens as the measured one."""
    block_size = policy.block_size or cost_model.block_size
    num_blocks = policy.num_blocks or max(1, cost_model.num_blocks * cost_model.block_size // block_size)
    config = EngineConfig(
        model="simulated",
        max_num_seqs=policy.max_num_seqs,
        block_size=block_size,
        enable_prefix_caching=policy.enable_prefix_caching,
    )

    def load(config: EngineConfig, directory: Path, report: Report) -> Device:
        return model_free_device(
            SimulatedRunner(cost_model, clock),
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=min(policy.max_model_len or cost_model.max_model_len, num_blocks * block_size),
            max_num_batched_tokens=policy.max_num_batched_tokens or cost_model.max_num_batched_tokens,
            depth=cost_model.depth,
        )

    return EngineCore(config, Path(), load=load, clock=clock)
