"""Processes die and messages get lost under clients that know the right answer: all of them get it, nothing is left."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from minivllm.soak import disasters
from minivllm.soak.__main__ import MESSAGE_FAULTS
from minivllm.soak.answers import Answer, make_bodies
from minivllm.soak.disasters import Disaster, Victim
from minivllm.soak.load import Load, learn
from minivllm.soak.report import Report
from minivllm.soak.run import soak
from tests.support.server import ServerProcess

NUM_CLIENTS = 8
BODIES = make_bodies(NUM_CLIENTS, 80, seed=1)


@pytest.fixture(scope="module")
def reference(default_model_dir: Path) -> list[Answer]:
    """What a server answers that nothing happens to."""
    with ServerProcess(str(default_model_dir)) as server:
        return asyncio.run(learn(server.url, BODIES, NUM_CLIENTS))


def soak_with(server: ServerProcess, reference: list[Answer], *plan: Disaster) -> Report:
    async def planned() -> AsyncIterator[Disaster]:
        for disaster in plan:
            yield disaster

    async def run() -> Report:
        load = Load(server.url, BODIES, NUM_CLIENTS, reference)
        return await soak(load, Victim(server.url, server.process.pid, pause_seconds=3.0), planned(), seed=1)

    report = asyncio.run(run())
    assert report.is_good, "\n".join(report.lines())
    return report


@pytest.mark.timeout(300)
def test_killed_engine_cores_and_lost_messages(default_model_dir: Path, reference: list[Answer]) -> None:
    """Two kills, with every fault of messages at 1 % all the while; what clients do wrong between them."""
    faults = f"{MESSAGE_FAULTS},seed=3"
    with ServerProcess(str(default_model_dir), "--enable-debug", "--inject-faults", faults) as server:
        kill = disasters.kill_engine
        plan = (kill, disasters.crowd_leaves, disasters.replace_frontends, disasters.nonsense_arrives, kill)
        report = soak_with(server, reference, *plan)
        assert report.metrics["minivllm:requests_resumed_total"] > 0
        server.settle()


@pytest.mark.timeout(300)
def test_stopped_engine_core_and_paused_frontend(default_model_dir: Path, reference: list[Answer]) -> None:
    options = ("--step-timeout", "3", "--frontend-lease", "0.5")  # shorter than most answers take
    with ServerProcess(str(default_model_dir), "--enable-debug", *options) as server:
        report = soak_with(server, reference, disasters.stop_engine, disasters.pause_frontend)
        assert report.metrics["minivllm:engine_restarts_total"] == 1
        assert report.metrics["minivllm:requests_resumed_total"] >= 2  # after the restart, and after the lease ran out
        server.wait_for_log("has not moved for .* s: killing it")
        server.wait_for_log("[1-9][0-9]* requests are released")
