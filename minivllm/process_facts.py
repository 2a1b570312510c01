"""Memory and CPU time of the launcher and its children, for the metrics."""

import os
from collections.abc import Mapping
from typing import Any

import psutil


def process_facts(pids: Mapping[str, int]) -> list[dict[str, Any]]:
    """`{"name", "pid", "rss" (bytes), "cpu_seconds"}` of this process ("launcher") and each named one that lives."""
    facts = []
    for name, pid in {"launcher": os.getpid(), **pids}.items():
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                cpu = process.cpu_times()
                rss = process.memory_info().rss
        except psutil.Error:
            continue  # it has just ended, or may not be looked at
        facts.append({"name": name, "pid": pid, "rss": rss, "cpu_seconds": cpu.user + cpu.system})
    return facts
