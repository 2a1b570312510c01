"""The Grafana board asks only for what /metrics has, and /metrics is what Prometheus understands."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from frontend.engine_metrics import EngineCollector, ProcessUsage
from frontend.metrics import FrontendMetrics
from minivllm.protocol import EngineStats, Histogram
from tests.support.dashboard import PROMTOOL, board_expressions, promtool_complaints, read_board

HISTOGRAMS = (
    "iteration_tokens",
    "decode_batch_size",
    "prefill_batch_tokens",
    "step_seconds_prefill",
    "step_seconds_decode",
)


def page() -> str:
    collector = EngineCollector(("model", "0"))
    stats = EngineStats(
        num_requests_finished={"stop": 1},
        histograms={name: Histogram([1.0, 8.0], [1, 2, 3], 40.0) for name in HISTOGRAMS},
    )
    collector.stats = lambda: stats
    collector.stats_age = lambda: 1.0
    collector.processes = [ProcessUsage("launcher", 1, 0.5)]
    metrics = FrontendMetrics("model", collector)
    metrics._success.labels("model", "0", "stop").inc()
    return metrics.render().decode()


def test_every_name_on_the_board_is_measured() -> None:
    board = " ".join(board_expressions())
    names = {sample.name for family in text_string_to_metric_families(page()) for sample in family.samples}
    asked = set(re.findall(r"(?:mini)?vllm:\w+", board))
    assert len(asked) > 20
    assert asked <= names
    labels = {"le", "kind", "process", "finished_reason"}
    assert set(re.findall(r"by \(([\w, ]+)\)", board)) <= labels | {"le, kind"}


def test_no_counter_is_shown_before_the_engine_core_has_spoken() -> None:
    """A zero between two values would look like a restart, and double what `rate` finds."""
    names = {family.name for family in EngineCollector(("model", "0")).collect()}
    assert "vllm:num_requests_running" in names
    assert not names & {"vllm:generation_tokens", "vllm:iteration_tokens_total", "minivllm:step_seconds"}


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in read_board()["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert all(p["x"] + p["w"] <= 24 for p in places)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_page() -> None:
    assert promtool_complaints(page()) == []


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_boards_queries(tmp_path: Path) -> None:
    """As recording rules, with Grafana's variables filled in."""
    assert PROMTOOL is not None
    rules = [{"record": f"r:{index}", "expr": expr} for index, expr in enumerate(board_expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    result = subprocess.run([PROMTOOL, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
