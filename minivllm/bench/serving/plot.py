"""Draws the latency–throughput curve of a sweep."""

from collections.abc import Sequence
from pathlib import Path

from minivllm.bench.serving.options import Point
from minivllm.bench.serving.summary import Summary
from minivllm.plots import COLORS, new_figure, save_figure

_PANELS = (("ttft", "time to first token, ms"), ("tpot", "time per output token, ms"))
_PERCENTILES = (50, 99)


def draw(results: Sequence[tuple[Point, Summary]], title: str, file: Path) -> None:
    """Latency over throughput, a dot for each load. Raises `StartupError`."""
    figure, panels = new_figure(len(_PANELS))
    figure.suptitle(title)
    throughputs = [summary.output_tokens_per_second for _, summary in results]
    for axes, (name, label) in zip(panels, _PANELS, strict=True):
        for percent, color in zip(_PERCENTILES, COLORS, strict=False):
            values = [getattr(summary, name).percentiles[percent] for _, summary in results]
            axes.plot(throughputs, values, marker="o", color=color, label=f"p{percent}")
        for (point, _), x, y in zip(results, throughputs, values, strict=True):
            axes.annotate(str(point), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set_ylabel(label)
        axes.set_yscale("log")
        axes.legend()
    panels[-1].set_xlabel("output tokens/s")
    save_figure(figure, file)
