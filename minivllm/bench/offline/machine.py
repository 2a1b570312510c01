"""The machine that was measured: its names, its versions, and the ceilings that it reaches in the same run."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from minivllm import __version__
from minivllm.units import ARITHMETIC, BANDWIDTH, quantity

_COPY_BYTES = 1 << 30  # far beyond any cache
_READ_BYTES = 1 << 28
_GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
_ROUNDS = {"cuda": 20, "cpu": 5}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What memory and arithmetic units can do."""

    bytes_per_second: float  # a GPU copies (read + write); a CPU reads with all threads
    flops_per_second: float  # a large matrix product in the model's number format

    def __str__(self) -> str:
        return f"{quantity(self.bytes_per_second, BANDWIDTH)}, {quantity(self.flops_per_second, ARITHMETIC)}"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and when a number was measured."""

    device: str
    cpu: str
    num_threads: int
    versions: dict[str, str]
    date: str

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        where = self.cpu if self.device == "cpu" else self.device
        return f"{where}, {self.num_threads} CPU threads; {versions}; {self.date}"


def this_machine(device: torch.device) -> Machine:
    """Names and versions."""
    versions = {"mini-vllm": __version__, "Python": platform.python_version()}
    versions |= {name: found for name in ("torch", "triton", "transformers") if (found := _version(name))}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Machine(name, _cpu_name(), torch.get_num_threads(), versions, date.today().isoformat())  # noqa: DTZ011


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Medians of several rounds, after one that does not count."""
    size = _GEMM_SIZE[device.type]
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)  # a GPU multiplies zeros and ones faster
    flops_per_second = 2 * size**3 / _median_seconds(lambda: torch.mm(a, b), device)
    return Ceilings(_bandwidth(device), flops_per_second)


def _bandwidth(device: torch.device) -> float:
    if device.type == "cpu":
        numbers = torch.ones(_READ_BYTES // 4)
        return _READ_BYTES / _median_seconds(numbers.sum, device)
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    return statistics.median([_seconds(run, device) for _ in range(1 + _ROUNDS[device.type])][1:])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
