"""The suite runs every part to its end or to its time limit, and reads what it measured."""

import io
import os
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from minivllm.bench.offline import gpu_suite
from minivllm.bench.offline.gpu_suite import GOALS, Goal, Outcome, Part, full_parts, is_reached, run_part, smoke_parts
from minivllm.bench.offline.options import BenchOptions, LatencyOptions, StartupOptions, ThroughputOptions
from minivllm.options import load_options

KINDS: dict[str, type[BenchOptions]] = {
    "latency": LatencyOptions,
    "throughput": ThroughputOptions,
    "startup": StartupOptions,
}


def text_of(outcomes: list[Outcome], goals: tuple[Goal, ...]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=160).print(gpu_suite.summary_table(outcomes, goals))
    return stream.getvalue()


def test_a_part_that_fails_says_how(tmp_path: Path) -> None:
    outcome = run_part(Part("bad", ("no_such_module_at_all",), 60), tmp_path, time.monotonic() + 60)
    assert outcome.problem == "exit code 1"
    assert "no_such_module_at_all" in (tmp_path / "bad.log").read_text()


def test_a_part_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    part = Part("slow", ("timeit", "-n", "1", "-r", "1", child), 2)
    outcome = run_part(part, tmp_path, time.monotonic() + 60)
    assert outcome.problem == "killed after 2 s"
    mine = psutil.Process(os.getpid()).children(recursive=True)
    assert not [process for process in mine if "time.sleep(99)" in process.cmdline()]


def test_no_time_left(tmp_path: Path) -> None:
    outcome = run_part(Part("late", ("json.tool",), 60), tmp_path, time.monotonic() - 1)
    assert outcome.problem is not None
    assert "--time-limit" in outcome.problem


def test_every_command_has_options_that_exist_and_every_goal_a_part() -> None:
    for part in [*full_parts(), *smoke_parts()]:
        if part.command[:2] == ("minivllm", "bench"):
            load_options(KINDS[part.command[2]], part.command[3:], part.name, {})
        elif part.command[0] == "pytest":
            assert all((gpu_suite.ROOT / path).exists() for path in part.command if path.startswith("tests/"))
    assert {goal.part for goal in GOALS} <= {part.name for part in full_parts()}


@pytest.mark.parametrize(
    ("value", "unit", "reached"), [(9, "ms", True), (11, "s", False), (9, "%", False), (10, "tokens/s", True)]
)
def test_times_are_to_be_short_and_rates_large(value: float, unit: str, reached: bool) -> None:
    assert is_reached(Goal("p", "m", 10), value, unit) is reached


def test_summary_shows_goals_numbers_and_failures() -> None:
    outcomes = [
        Outcome("fast", None, 1.0, {"step": (1.5, "ms")}),
        Outcome("broken", "exit code 1", 1.0, {}),
    ]
    goals = (Goal("fast", "step", 2.0, vllm=3.25), Goal("broken", "rate", 100.0))
    text = text_of(outcomes, goals)
    for part in ("1.5", "≤ 2", "3.25", "reached", "exit code 1", "FAILED", "100"):
        assert part in text
    assert "missed" in text_of(outcomes, (Goal("fast", "step", 1.0),))


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
