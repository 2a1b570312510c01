"""Injected faults do what their specification says, and nothing at all without one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minivllm.faults import NO_FAULTS, Faults, Frames, StepFault

SPEC = "drop=0.01, duplicate=0.02,reorder=0.03,corrupt=0.04,slow=0.5,seed=7,stall=30@step:100,kill@step:200,oom@step:50"


def run_through(faults: Faults, num_messages: int = 2000) -> list[bytes]:
    """What arrives of `num_messages` messages 0, 1, 2 …"""
    received: list[Frames] = []
    send = faults.disturb_sends(received.append)
    for i in range(num_messages):
        send((b"topic", i.to_bytes(4, "big")))
    assert all(frames[0] == b"topic" for frames in received)
    return [bytes(frames[-1]) for frames in received]


def test_a_specification_is_read() -> None:
    assert Faults.parse(SPEC) == Faults(
        0.01, 0.02, 0.03, 0.04, 0.5, 7, (StepFault("stall", 100, 30.0), StepFault("kill", 200), StepFault("oom", 50))
    )
    assert Faults.parse("") == NO_FAULTS


@pytest.mark.parametrize(
    "spec",
    [
        "drop",
        "drop=2",
        "drop=-0.1",
        "drop=x",
        "slow=0",
        "slow=inf",
        "stall=-1@step:3",
        "tired=0.1",
        "kill@step:0",
        "kill@10",
        "stall@step:3",
        "x@step:3",
    ],
)
def test_what_is_not_understood_is_named(spec: str) -> None:
    with pytest.raises(ValueError, match=f"'{spec}' is not a fault"):
        Faults.parse(f"drop=0.1,{spec}")


def test_without_faults_nothing_stands_between() -> None:
    def act(*_: object) -> None:
        pass

    assert NO_FAULTS.disturb_sends(act) is act
    assert NO_FAULTS.delay_reads(act) is act
    assert NO_FAULTS.disturb_steps(act, MemoryError) is act


def test_messages_are_dropped_repeated_swapped_and_damaged() -> None:
    sent = [i.to_bytes(4, "big") for i in range(2000)]
    dropped = run_through(Faults(drop=0.1, seed=1))
    assert 100 < len(sent) - len(dropped) < 300
    assert dropped == sorted(set(dropped))
    repeated = run_through(Faults(duplicate=0.1, seed=1))
    assert 100 < len(repeated) - len(sent) < 300
    assert sorted(set(repeated)) == sent
    swapped = run_through(Faults(reorder=0.1, seed=1))
    assert swapped != sent
    assert len(sent) - 1 <= len(swapped) == len(set(swapped))  # the last one may still be held
    damaged = run_through(Faults(corrupt=0.1, seed=1))
    assert 100 < sum(one != other for one, other in zip(sent, damaged, strict=True)) < 300


def test_reading_takes_time_where_something_is_read() -> None:
    messages = [b"b", b"a"]
    read = Faults(slow=0.05).delay_reads(messages.pop)
    start = time.monotonic()
    assert (read(), read()) == (b"a", b"b")
    assert time.monotonic() - start >= 0.1
    with pytest.raises(IndexError):
        read()


def test_the_nth_step_runs_out_of_memory() -> None:
    launch = Faults.parse("oom@step:2").disturb_steps(lambda value: value + 1, lambda: MemoryError("injected"))
    assert launch(1) == 2
    with pytest.raises(MemoryError, match="injected"):
        launch(1)
    assert launch(1) == 2


def test_the_nth_step_kills_the_process() -> None:
    code = (
        "from minivllm.faults import Faults\n"
        "launch = Faults.parse('stall=0.01@step:1,kill@step:2').disturb_steps(print, MemoryError)\n"
        "[launch(i, flush=True) for i in range(5)]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=dict(os.environ))
    assert (result.returncode, result.stdout) == (-signal.SIGKILL, b"0\n")
