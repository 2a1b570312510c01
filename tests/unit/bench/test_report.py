"""Numbers for a reader and as JSON; how busy a GPU was."""

import io
import json
import random

import pytest
from rich.console import Console

from minivllm.bench.offline.machine import Ceilings, Machine
from minivllm.bench.offline.profiling import top_kernels, union_length
from minivllm.bench.offline.report import Comparison, Kernel, Measurement, Report

MACHINE = Machine("NVIDIA X", "AMD Y", 16, {"torch": "2.11"}, "2026-11-23")


def test_percent_of_limit_and_ratio_know_what_is_better() -> None:
    assert Measurement("step", 4.0, "ms", limit=1.0).percent_of_limit == 25
    assert Measurement("rate", 40.0, "tokens/s", limit=80.0).percent_of_limit == 50
    assert Measurement("rate", 40.0, "tokens/s").percent_of_limit is None
    assert Comparison.of(2.0, 10.0, "ms").ratio == 5
    assert Comparison.of(10.0, 2.0, "tokens/s").ratio == 5


def test_everything_is_shown_and_written() -> None:
    row = Measurement("decode step", 4.0, "ms", 1.0, 3210.4, None, Comparison.of(4.0, 10.0, "ms"))
    report = Report(
        "Latency [x]", MACHINE, [row, Measurement("busy", 98.0, "%")], Ceilings(4.3e12, 7e14), ["a note"],
        kernels=[Kernel("gemm[128]", 7, 0.5)], stages={"loading": (2.0, 1.0)},
    )  # fmt: skip
    stream = io.StringIO()
    Console(file=stream, width=140).print(report.render())
    text = stream.getvalue()
    for part in (
        "Latency [x]",
        "decode step",
        "3,210",
        "25",
        "2.5",
        "NVIDIA X",
        "4.30 TB/s",
        "a note",
        "gemm[128]",
        "loading",
    ):
        assert part in text
    assert "TFLOP/s │" not in text  # no column that holds nothing
    content = json.loads(json.dumps(report.as_dict()))
    assert content["measurements"][0]["percent_of_limit"] == 25
    assert content["measurements"][0]["comparison"] == {"ours": 4.0, "hf": 10.0, "ratio": 2.5}
    assert content["machine"]["versions"] == {"torch": "2.11"}


@pytest.mark.parametrize("seed", range(5))
def test_union_of_intervals_counts_every_moment_once(seed: int) -> None:
    source = random.Random(seed)
    spans = [(begin, begin + source.randint(0, 9)) for begin in (source.randint(0, 60) for _ in range(12))]
    assert union_length(spans) == len({moment for begin, end in spans for moment in range(begin, end)})


def test_kernels_are_added_up_longest_first() -> None:
    kernels = top_kernels([("a", 10), ("b", 25), ("a", 20)])
    assert kernels == [Kernel("a", 2, 30e-9), Kernel("b", 1, 25e-9)]
