"""What a soak found, as a table and a verdict."""

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from minivllm.soak.load import Load


@dataclass
class Report:
    """recoveries: seconds, by disaster. metrics: samples at the end, when nothing runs any more."""

    seconds: float = 0.0
    recoveries: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_right: int = 0
    num_refused: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    invariants: dict[str, Any] = field(default_factory=dict)

    def take(self, load: Load) -> None:
        """Add what the clients saw."""
        self.num_right, self.num_refused = load.num_right, load.num_refused
        self.wrong, self.failed = load.wrong, load.failed

    @property
    def num_leaked(self) -> int:
        return int(self.metrics["minivllm:kv_blocks_leaked"] + self.metrics["minivllm:kv_blocks{used}"])

    @property
    def is_good(self) -> bool:
        """Every answer came and was right, and nothing is left of any."""
        integrity = self.invariants["engine"]["integrity"]
        return not (self.wrong or self.failed or self.num_leaked) and integrity == "ok" and self.num_right > 0

    def lines(self) -> list[str]:
        """A Markdown table."""
        since = ", since the frontends were replaced" if "replace_frontends" in self.recoveries else ""
        rows = [
            ("minutes", f"{self.seconds / 60:.1f}"),
            ("answers, all of them right", f"{self.num_right:,}"),
            ("answers that differ from the undisturbed run", str(len(self.wrong))),
            ("streams that failed", str(len(self.failed))),
            ("requests refused with 503 or 429 and asked again", f"{self.num_refused:,}"),
            (f"requests resumed{since}", f"{self.metrics['minivllm:requests_resumed_total']:,.0f}"),
            (f"restarts of the engine core{since}", f"{self.metrics['minivllm:engine_restarts_total']:.0f}"),
            ("KV blocks leaked or left in use", str(self.num_leaked)),
            ("invariants of the engine core", str(self.invariants["engine"]["integrity"])),
        ]
        for name, seconds in self.recoveries.items():
            times = f"{statistics.median(seconds):.1f} / {max(seconds):.1f} s"
            rows.append((f"{name} × {len(seconds)}: recovery, median / max", times))
        return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), *self.wrong, *self.failed]


async def read_metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """Samples of /metrics by name, or name{label} where there are several."""
    text = (await http.get("/metrics")).text
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name not in {"model_name", "engine"}]
            samples[sample.name + (f"{{{labels[0]}}}" if labels else "")] = sample.value
    return samples
