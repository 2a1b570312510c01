"""How busy the GPU is during a run, and with what: torch's profiler, device activities only."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity

from minivllm.bench.offline.report import Kernel

ResultT = TypeVar("ResultT")


def profile(run: Callable[[], ResultT]) -> tuple[ResultT, float, list[Kernel]]:
    """(what `run` returns, seconds in which the GPU did anything, its kernels by time)."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = run()
        torch.cuda.synchronize()
    events = _device_events(profiler)
    spans = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in events]
    names = [(event.name(), event.duration_ns()) for event in events]
    return result, union_length(spans) / 1e9, top_kernels(names)


def union_length(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of (begin, end) intervals."""
    total, covered = 0, 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, covered))
        covered = max(covered, end)
    return total


def top_kernels(launches: Iterable[tuple[str, int]]) -> list[Kernel]:
    """Launches (name, nanoseconds) added up by name, longest first."""
    sums: dict[str, tuple[int, int]] = {}
    for name, duration in launches:
        count, total = sums.get(name, (0, 0))
        sums[name] = (count + 1, total + duration)
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return [Kernel(name, count, total / 1e9) for name, (count, total) in ordered]


def _device_events(profiler: torch.profiler.profile) -> list[Any]:
    """Kernels and copies. Read below torch's event tree: building that for 10⁵ kernels takes minutes."""
    inner: Any = profiler.profiler
    return [event for event in inner.kineto_results.events() if event.device_type().name == "CUDA"]
