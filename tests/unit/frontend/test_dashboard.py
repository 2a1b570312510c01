"""The Grafana board asks only for what /metrics has, and /metrics is what Prometheus understands."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from frontend.engine_metrics import EngineCollector, ProcessUsage
from frontend.metrics import FrontendMetrics
from minivllm.protocol import EngineStats, Histogram

BOARD = Path(__file__).parents[3] / "docs" / "grafana.json"
HISTOGRAMS = (
    "iteration_tokens",
    "decode_batch_size",
    "prefill_batch_tokens",
    "step_seconds_prefill",
    "step_seconds_decode",
)
PROMTOOL = shutil.which("promtool")
# The field's names hold a colon, which promtool would keep for recording rules, and a histogram that ends in _total.
ACCEPTED = re.compile(r"metric names should not contain ':'|non-counter metrics should not have \"_total\" suffix")


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


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_every_name_on_the_board_is_measured() -> None:
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    names = {sample.name for family in text_string_to_metric_families(page()) for sample in family.samples}
    asked = set(re.findall(r"(?:mini)?vllm:\w+", " ".join(expressions(board))))
    assert len(asked) > 20
    assert asked <= names
    labels = {"le", "kind", "process", "finished_reason"}
    assert set(re.findall(r"by \(([\w, ]+)\)", " ".join(expressions(board)))) <= labels | {"le, kind"}


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(BOARD.read_text(encoding="utf-8"))["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert all(p["x"] + p["w"] <= 24 for p in places)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_page() -> None:
    assert PROMTOOL is not None
    result = subprocess.run([PROMTOOL, "check", "metrics"], input=page(), capture_output=True, text=True, check=False)
    assert [line for line in (result.stdout + result.stderr).splitlines() if not ACCEPTED.search(line)] == []


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_boards_queries(tmp_path: Path) -> None:
    """As recording rules, with Grafana's variables filled in."""
    assert PROMTOOL is not None
    rules = [
        {"record": f"r:{index}", "expr": expression.replace("$__rate_interval", "1m").replace("$model_name", ".*")}
        for index, expression in enumerate(expressions(json.loads(BOARD.read_text(encoding="utf-8"))))
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    result = subprocess.run([PROMTOOL, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
