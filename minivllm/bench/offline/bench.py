"""An engine core ready to be measured, with what its model costs and what its machine can do."""

from dataclasses import dataclass
from pathlib import Path

import transformers

from engine_core.engine import EngineCore
from engine_core.model_loader import read_config
from minivllm.bench.median import median_run
from minivllm.bench.offline.cost import ModelCost, model_cost
from minivllm.bench.offline.machine import Ceilings, Machine, measure_ceilings, this_machine
from minivllm.bench.offline.options import BenchOptions
from minivllm.bench.offline.runs import Run, run_work
from minivllm.bench.offline.watch import Watch
from minivllm.bench.offline.work import Work
from minivllm.errors import InvalidRequestError, StartupError


@dataclass(frozen=True, slots=True)
class Bench:
    """See `load`."""

    engine: EngineCore
    cost: ModelCost
    ceilings: Ceilings
    machine: Machine
    watch: Watch
    temperature: float

    @classmethod
    def load(cls, options: BenchOptions, directory: Path, watch: Watch, temperature: float) -> "Bench":
        """Load the engine and measure the machine. Raises `StartupError`."""
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        engine = EngineCore(options, directory, watch.say)
        watch.say("measuring bandwidth and arithmetic")
        layout, device, weight_bytes = engine.model.layout, engine.model.device, engine.model.weight_bytes
        cost = model_cost(read_config(directory, options.trust_remote_code), weight_bytes, layout.bytes_per_token)
        return cls(engine, cost, measure_ceilings(device, layout.dtype), this_machine(device), watch, temperature)

    @property
    def description(self) -> str:
        """Number format and device."""
        facts = self.engine.facts(0)
        return f"{facts.dtype} on {facts.device}"

    def run(self, name: str, work: Work) -> Run:
        """Run `work` once. Raises `StartupError` when the engine is too small for it."""
        try:
            return self.watch.run(name, lambda: run_work(self.engine, work, self.temperature))
        except InvalidRequestError as error:
            raise StartupError(f"{name}: {error}") from error

    def median_run(self, name: str, work: Work, repeats: int) -> Run:
        """Run `work` several times; the run with the median time (of an even number, the faster of the middle two)."""
        runs = [self.run(f"{name} ({index + 1} of {repeats})", work) for index in range(repeats)]
        return median_run(runs, lambda run: run.seconds)


def vocab_size_of(directory: Path, options: BenchOptions) -> int:
    """From the configuration alone: work is made before the engine is loaded."""
    return int(read_config(directory, options.trust_remote_code).get_text_config().vocab_size)
