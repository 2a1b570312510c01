"""One simulation: a trace on a fresh simulated engine, checked for leaks at the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.simulate.cost_model import CostModel
from minivllm.simulate.drive import Observed, OnStep, run_trace
from minivllm.simulate.engine import Policy, VirtualClock, make_simulated_engine
from minivllm.simulate.metrics import Metrics, measure
from minivllm.simulate.trace import Arrival


@dataclass(frozen=True, slots=True)
class Simulation:
    """`wall_seconds` is what it took here, not what it stands for."""

    metrics: Metrics
    observed: Observed
    num_blocks: int
    wall_seconds: float


def simulate(
    cost_model: CostModel, policy: Policy, trace: Sequence[Arrival], on_step: OnStep | None = None
) -> Simulation:
    """Deterministic. Raises `StartupError` when a request does not fit, `ValueError` on a leak: a bug of the engine."""
    start, clock = time.perf_counter(), VirtualClock()
    engine = make_simulated_engine(cost_model, policy, clock)
    observed = run_trace(engine, trace, clock, on_step)
    engine.check_integrity()
    metrics = measure(engine, observed)
    return Simulation(metrics, observed, engine.kv_pool.num_blocks, time.perf_counter() - start)
