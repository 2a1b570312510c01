"""Processes die and messages get lost under clients that know the right answer: all of them get it, nothing is left."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from minivllm.soak import disasters
from minivllm.soak.__main__ import ALL, MESSAGE_FAULTS
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
def test_every_answer_is_right_whatever_happens(default_model_dir: Path, reference: list[Answer]) -> None:
    """With every fault of messages at 1 % all the while, and a lease shorter than most answers take."""
    options = ("--inject-faults", f"{MESSAGE_FAULTS},seed=3", "--step-timeout", "3", "--frontend-lease", "0.5")
    with ServerProcess(str(default_model_dir), "--enable-debug", *options) as server:
        first = disasters.replace_frontends  # the new ones count restarts from 0
        report = soak_with(server, reference, first, *(disaster for disaster in ALL if disaster is not first))
        assert report.metrics["minivllm:engine_restarts_total"] >= 2  # killed, stopped, or slow where much else runs
        assert report.metrics["minivllm:requests_resumed_total"] >= 3  # and released
        server.wait_for_log("has not moved for .* s: killing it")
        server.wait_for_log("[1-9][0-9]* requests are released")
