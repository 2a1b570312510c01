"""Draws the latency–throughput curve of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivllm.bench.serving.options import Point
from minivllm.bench.serving.summary import Summary
from minivllm.errors import StartupError

_PANELS = (("ttft", "time to first token, ms"), ("tpot", "time per output token, ms"))
_COLOURS = {50: "#1f6feb", 99: "#d1242f"}


def load_figure() -> Any:
    """matplotlib's Figure class, which needs no display. Raises `StartupError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StartupError("--plot needs matplotlib: pip install 'mini-vllm[plot]'") from None
    return Figure


def draw(results: Sequence[tuple[Point, Summary]], title: str, file: Path) -> None:
    """Latency over throughput, a dot for each load. Raises `StartupError`."""
    figure = load_figure()(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    throughputs = [summary.output_tokens_per_second for _, summary in results]
    for axes, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for percent, colour in _COLOURS.items():
            values = [getattr(summary, name).percentiles[percent] for _, summary in results]
            axes.plot(throughputs, values, marker="o", color=colour, label=f"p{percent}")
        for (point, _), x, y in zip(results, throughputs, values, strict=True):
            axes.annotate(str(point), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set_xlabel("output tokens/s")
        axes.set_ylabel(label)
        axes.set_yscale("log")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise StartupError(f"--plot {file}: {error.strerror}") from error
