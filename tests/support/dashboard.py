"""The Grafana board of docs/, and promtool's opinion of a metrics page."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
PROMTOOL = shutil.which("promtool")
# The field's names hold a colon, which promtool would keep for recording rules, and a histogram that ends in _total.
_ACCEPTED = re.compile(r"metric names should not contain ':'|non-counter metrics should not have \"_total\" suffix")


def read_board() -> dict[str, Any]:
    """As Grafana imports it."""
    board: dict[str, Any] = json.loads(BOARD.read_text(encoding="utf-8"))
    return board


def board_expressions(rate_interval: str = "1m") -> list[str]:
    """The query of every line on the board, with Grafana's variables filled in: all models, rates over this time."""
    targets = [target["expr"] for panel in read_board()["panels"] for target in panel["targets"]]
    return [expr.replace("$__rate_interval", rate_interval).replace("$model_name", ".*") for expr in targets]


def promtool_complaints(page: str) -> list[str]:
    """What `promtool check metrics` says against a page, without what comes with the field's names."""
    assert PROMTOOL is not None
    result = subprocess.run([PROMTOOL, "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    return [line for line in (result.stdout + result.stderr).splitlines() if not _ACCEPTED.search(line)]
