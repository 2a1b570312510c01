"""What a benchmark found, for a reader and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minivllm.bench.offline.machine import Ceilings, Machine

Unit = Literal["ms", "s", "tokens/s", "%"]
_SMALLER_IS_BETTER = ("ms", "s")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same number, or one of a part of the work, measured on this engine and on Hugging Face's `generate()`."""

    ours: float
    hf: float
    ratio: float  # how many times faster ours is

    @classmethod
    def of(cls, ours: float, hf: float, unit: Unit) -> "Comparison":
        return cls(ours, hf, hf / ours if unit in _SMALLER_IS_BETTER else ours / hf)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number. `limit`, in the same unit, is what the ceilings of this machine allow (the roofline)."""

    name: str
    value: float
    unit: Unit
    limit: float | None = None
    gigabytes_per_second: float | None = None
    teraflops_per_second: float | None = None
    comparison: Comparison | None = None

    @property
    def percent_of_limit(self) -> float | None:
        if self.limit is None:
            return None
        return 100 * (self.limit / self.value if self.unit in _SMALLER_IS_BETTER else self.value / self.limit)


@dataclass(frozen=True, slots=True)
class Kernel:
    """All launches of one GPU kernel in a profiled run."""

    name: str
    count: int
    seconds: float


@dataclass(slots=True)
class Report:
    """Everything one benchmark found. `stages`: seconds of each stage of a start, (cold, warm)."""

    title: str
    machine: Machine
    measurements: list[Measurement]
    ceilings: Ceilings | None = None
    notes: list[str] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        content = asdict(self)
        for row, measurement in zip(content["measurements"], self.measurements, strict=True):
            row["percent_of_limit"] = measurement.percent_of_limit
        return content

    def render(self) -> Group:
        """For a rich console."""
        parts: list[RenderableType] = [Text(self.title, style="bold"), _measurement_table(self.measurements)]
        if self.kernels:
            parts.append(_kernel_table(self.kernels))
        if self.stages:
            parts.append(_stage_table(self.stages))
        lines = [str(self.machine)]
        if self.ceilings is not None:
            lines.append(f"measured ceilings: {self.ceilings}")
        return Group(*parts, Text("\n".join([*lines, *self.notes])))


def _measurement_table(measurements: Sequence[Measurement]) -> Table:
    compared = [each.comparison for each in measurements]
    columns: dict[str, Sequence[str]] = {
        "measurement": [each.name for each in measurements],
        "value": [number(each.value) for each in measurements],
        "unit": [each.unit for each in measurements],
        "GB/s": [number(each.gigabytes_per_second) for each in measurements],
        "TFLOP/s": [number(each.teraflops_per_second) for each in measurements],
        "roofline": [number(each.limit) for each in measurements],
        "% of it": ["" if each.limit is None else f"{each.percent_of_limit:.0f}" for each in measurements],
        "HF generate()": ["" if pair is None else number(pair.hf) for pair in compared],
        "times faster": ["" if pair is None else number(pair.ratio) for pair in compared],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table()
    for name in filled:
        table.add_column(name, justify="left" if name == "measurement" else "right")
    for row in zip(*filled.values(), strict=True):
        table.add_row(*row)
    return table


def _kernel_table(kernels: Sequence[Kernel]) -> Table:
    total = sum(kernel.seconds for kernel in kernels)
    table = Table("GPU kernel")
    for column in ("launches", "seconds", "share"):
        table.add_column(column, justify="right")
    for kernel in kernels[:20]:
        share = f"{100 * kernel.seconds / total:.1f} %"
        table.add_row(Text(kernel.name[:70]), f"{kernel.count:,}", f"{kernel.seconds:.3f}", share)
    return table


def _stage_table(stages: dict[str, tuple[float, float]]) -> Table:
    table = Table("stage, seconds")
    table.add_column("cold", justify="right")
    table.add_column("warm", justify="right")
    for stage, (cold, warm) in stages.items():
        table.add_row(stage, f"{cold:.2f}", f"{warm:.2f}")
    return table


def number(value: float | None) -> str:
    """Four significant digits; nothing where there is no number."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
