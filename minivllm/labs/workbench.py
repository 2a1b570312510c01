"""What every lab works with: engines of the chosen model, tokens to feed them, progress, and how much to do."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine_core.engine import EngineCore
from engine_core.model_loader import choose_device
from minivllm.bench.offline.machine import Machine, this_machine
from minivllm.bench.offline.watch import Watch
from minivllm.config import EngineConfig
from minivllm.labs.devices import Devices
from minivllm.labs.options import LabOptions
from minivllm.simulate.drive import WallClock, run_trace
from minivllm.simulate.metrics import Metrics, measure
from minivllm.simulate.trace import Arrival

_GPU_KV_BYTES = 4 << 30  # enough for every lab, and another pool fits beside it

AnyT = TypeVar("AnyT")


class Workbench:
    """Made once for a lab. `quick` labs show the same with as little work as possible."""

    def __init__(self, options: LabOptions, directory: Path, devices: Devices, watch: Watch) -> None:
        """`directory` is that of the model; what `devices` has loaded is used again."""
        self.options = options
        self.watch = watch
        self.directory = directory
        self.source = random.Random(0)
        self.machine: Machine | None = None
        self._devices = devices

    def config(self, **changes: Any) -> EngineConfig:
        """The options of an engine."""
        asked = self.options.model_dump(include=set(EngineConfig.model_fields) & self.options.model_fields_set)
        config = EngineConfig(**(asked | {"model": self.options.model, "device": self.options.device} | changes))
        if choose_device(config).type == "cuda":
            config = config.model_copy(update={"kv_cache_memory_bytes": _GPU_KV_BYTES})
        return config

    def engine(self, **changes: Any) -> EngineCore:
        """A fresh engine with these options of `EngineConfig`, already warm. Raises `StartupError`.

        Engines of a lab share the memory of their KV caches: at most one of them may have requests.
        """
        engine = EngineCore(self.config(**changes), self.directory, self.watch.say, load=self._devices.load)
        self.machine = this_machine(engine.model.device)
        return engine

    @property
    def device(self) -> torch.device:
        """Where engines run. Raises `StartupError` when it is missing."""
        return choose_device(self.config())

    def observe(self, engine: EngineCore, trace: Sequence[Arrival]) -> Metrics:
        """The numbers of a run on a real engine, in real time. Its counts include what the engine did before."""
        metrics = measure(engine, run_trace(engine, trace, WallClock()))
        engine.check_integrity()
        return metrics

    def pick(self, full: AnyT, quick: AnyT, gpu: AnyT | None = None) -> AnyT:
        """`full`, or `quick` where only a glance is asked for; `gpu` where there is one, which needs more to do."""
        if self.options.quick:
            return quick
        return full if gpu is None or self.device.type != "cuda" else gpu

    def at_once(self, output_lens: Sequence[int], prompt_len: int) -> list[Arrival]:
        """Requests that all come at the start."""
        return [Arrival(0.0, prompt_len, length) for length in output_lens]
