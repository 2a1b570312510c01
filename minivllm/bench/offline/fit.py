"""`minivllm bench fit`: times single passes of the real engine core and fits the simulator's cost model to them.

decode   n requests decode together, with mixed and with long contexts     → base(rows), per_context_token
prefill  one prompt, several in one pass, and one cut into many chunks      → base(tokens), per_row, per_pair

All shapes are timed in turns, several times, so that a moment in which the machine does something else spoils one turn
and not one shape. Both models are linear in what is unknown (a table is a weighted sum of its points), so one
least-squares solution of the relative errors gives everything; that more work would take less time is noise.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from engine_core.engine import EngineCore
from minivllm.bench.offline.machine import Machine, this_machine
from minivllm.bench.offline.options import FitOptions
from minivllm.bench.offline.passes import PassTimer, TimedDecode, TimedPrefill, median_pass
from minivllm.bench.offline.shapes import model_name
from minivllm.bench.offline.watch import Watch
from minivllm.simulate.cost_model import CostModel, Curve, causal_pairs

_MAX_LONG_ROWS = 8  # enough to see what context costs, and prompts are slow on a CPU


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured time that should be the sum of `features` times what is unknown."""

    name: str
    features: list[float]
    seconds: float


@dataclass(frozen=True, slots=True)
class FitReport:
    """The cost model and what it was fitted to: (pass, measured seconds, fitted seconds)."""

    cost_model: CostModel
    machine: Machine
    rows: list[tuple[str, float, float]]

    def as_dict(self) -> dict[str, Any]:
        fits = [{"pass": name, "measured": measured, "fitted": fitted} for name, measured, fitted in self.rows]
        return {
            "cost_model": msgspec.to_builtins(self.cost_model),
            "machine": asdict(self.machine),
            "fits": fits,
        }

    def render(self) -> Group:
        """For a rich console."""
        table = Table("pass", title="passes, measured and fitted", title_justify="left")
        for column in ("measured ms", "fitted ms", "error %"):
            table.add_column(column, justify="right")
        for name, measured, fitted in self.rows:
            error = f"{100 * (fitted / measured - 1):+.1f}"
            table.add_row(name, f"{1000 * measured:.1f}", f"{1000 * fitted:.1f}", error)
        return Group(table, Text(f"{self.machine}; mean error {100 * self.cost_model.mean_error:.1f} %"))


def measure_fit(options: FitOptions, directory: Path, watch: Watch) -> FitReport:
    """Raises `StartupError`."""
    engine = EngineCore(options, directory, watch.say)
    timer = PassTimer(engine, 1, -(-options.num_decode_steps // options.repeats))
    groups = decode_groups(options)
    largest = options.prefill_sizes[-1]
    prompts = [[size] for size in options.prefill_sizes]
    prompts += [[max(1, largest // 16)] * 16, [max(1, largest // 4)] * 4, [options.chunked_prompt_len]]
    watch.plan(options.repeats * (len(groups) + len(prompts)) + 1)
    watch.run("warm-up", lambda: timer.prefill([largest]))
    prefills: list[list[TimedPrefill]] = [[] for _ in prompts]
    decodes: list[list[TimedDecode]] = [[] for _ in groups]
    for _ in range(options.repeats):
        for prompt, prefill_turns in zip(prompts, prefills, strict=True):
            text = f"prefill of {len(prompt)} × {prompt[0]}"
            prefill_turns.append(watch.run(text, partial(timer.prefill, prompt)))
        for group, decode_turns in zip(groups, decodes, strict=True):
            decode_turns.append(watch.run(f"decode of {len(group)}", partial(timer.decode, group)))
    engine.check_integrity()
    return _report(options, engine, [*map(median_pass, decodes)], [*map(median_pass, prefills)])


def decode_groups(options: FitOptions) -> list[list[int]]:
    """Prompt lengths of requests that decode together: mixed ones for every batch size, all long ones for the small.

    Mixed and in no order, as in real traffic: a CPU's threads share the requests among them, and in ascending order one
    of them would get all that are long.
    """
    short, long = options.context_lens
    mixed = [np.linspace(short, long, rows + 2)[1:-1].astype(int).tolist() for rows in options.batch_sizes]
    for lens in mixed:
        random.Random(0).shuffle(lens)
    return [*mixed, *([long] * rows for rows in options.batch_sizes if rows <= _MAX_LONG_ROWS)]


def _report(
    options: FitOptions, engine: EngineCore, decodes: Sequence[TimedDecode], prefills: Sequence[TimedPrefill]
) -> FitReport:
    decode_sizes = tuple(options.batch_sizes)
    prefill_sizes = tuple(size for size in options.prefill_sizes if size <= engine.max_num_batched_tokens)
    decode_samples = [decode_sample(timed, decode_sizes) for timed in decodes]
    prefill_samples = [prefill_sample(timed, prefill_sizes) for timed in prefills]
    decode, prefill = solve(decode_samples, len(decode_sizes)), solve(prefill_samples, len(prefill_sizes))
    rows = [*_compare(decode_samples, decode), *_compare(prefill_samples, prefill)]
    machine = this_machine(engine.model.device)
    cost_model = CostModel(
        description=f"{model_name(options)}, {machine}",
        decode=Curve(decode_sizes, tuple(decode[: len(decode_sizes)])),
        decode_per_context_token=decode[-1],
        prefill=Curve(prefill_sizes, tuple(prefill[: len(prefill_sizes)])),
        prefill_per_pair=prefill[-2],
        prefill_per_row=prefill[-1],
        num_blocks=engine.kv_pool.num_blocks,
        block_size=options.block_size,
        max_model_len=engine.max_model_len,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        depth=1 if engine.model.device.type == "cuda" else 0,
        mean_error=float(np.mean([abs(fitted / measured - 1) for _, measured, fitted in rows])),
    )
    return FitReport(cost_model, machine, rows)


def decode_sample(timed: TimedDecode, sizes: tuple[int, ...]) -> Sample:
    """Unknown: the points of base(rows), then per_context_token."""
    name = f"decode, {timed.num_rows} requests, {timed.num_context_tokens:,} tokens of context"
    return Sample(name, [*_weights(sizes, timed.num_rows), timed.num_context_tokens], timed.seconds)


def prefill_sample(timed: TimedPrefill, sizes: tuple[int, ...]) -> Sample:
    """Unknown: the points of base(tokens), then per_pair, per_row; all passes of the run are summed."""
    weights = np.sum([_weights(sizes, shape.num_tokens) for shape in timed.passes], axis=0)
    pairs = sum(causal_pairs(*chunk) for shape in timed.passes for chunk in shape.chunks)
    extra_rows = sum(len(shape.chunks) - 1 for shape in timed.passes)
    num_tokens = sum(shape.num_tokens for shape in timed.passes)
    num_prompts = sum(start == 0 for shape in timed.passes for start, _ in shape.chunks)
    name = f"prefill, {num_tokens:,} tokens of {num_prompts} prompts in {len(timed.passes)} passes"
    return Sample(name, [*map(float, weights), float(pairs), float(extra_rows)], timed.seconds)


def solve(samples: Sequence[Sample], num_points: int) -> list[float]:
    """What makes the relative errors least, in the mean of squares; nothing negative, and no point below the last one.

    The first `num_points` are those of a table. What is solved for is by how much each lies above the one before.
    """
    features = np.array([sample.features for sample in samples])
    features[:, :num_points] = features[:, num_points - 1 :: -1].cumsum(axis=1)[:, ::-1]
    seconds = np.array([sample.seconds for sample in samples])
    scale = np.maximum(features.max(axis=0), 1e-300)  # columns of one size: pairs are millions, weights are ones
    matrix = features / scale / seconds[:, None]
    kept = np.arange(matrix.shape[1])
    while True:
        found = np.linalg.lstsq(matrix[:, kept], np.ones(len(seconds)))[0]
        if (found >= 0).all():
            break
        worst = found[1:].argmin() + 1  # the smallest pass takes time: its point stays
        kept = np.delete(kept, worst if found[worst] < 0 else -1)
    solution = np.zeros(matrix.shape[1])
    solution[kept] = found
    solution /= scale
    solution[:num_points] = solution[:num_points].cumsum()
    return [float(value) for value in solution]


def _weights(sizes: tuple[int, ...], size: int) -> list[float]:
    return Curve(sizes, (0.0,) * len(sizes)).weights(size)


def _compare(samples: Sequence[Sample], solution: Sequence[float]) -> list[tuple[str, float, float]]:
    return [(sample.name, sample.seconds, float(np.dot(sample.features, solution))) for sample in samples]
