"""A process that is stuck shows where, and ends; one that is asked shows what it does, and goes on."""

import signal
import subprocess
import sys

STUCK = """
import time
from minivllm.diagnostics import Watchdog
watchdog = Watchdog(0.2)
for _ in range(5):
    watchdog.reset()
    time.sleep(0.05)
print("moves", flush=True)

def never_ends():
    time.sleep(600)

never_ends()
"""
STOPPED = """
import time
from minivllm.diagnostics import Watchdog
watchdog = Watchdog(0.05)
watchdog.reset()
watchdog.stop()
time.sleep(0.2)
"""
ASKED = """
import os, signal
from minivllm.diagnostics import dump_stacks_on_signal
dump_stacks_on_signal()
os.kill(os.getpid(), signal.SIGUSR1)
dump_stacks_on_signal(lambda: print("state", flush=True))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_the_watchdog_shows_where_a_process_is_stuck_and_ends_it() -> None:
    result = run(STUCK)
    assert (result.returncode, result.stdout) == (1, "moves\n")
    assert "Timeout (0:00:00.200000)!" in result.stderr
    assert "in never_ends" in result.stderr


def test_a_stopped_watchdog_does_nothing() -> None:
    assert run(STOPPED).returncode == 0


def test_sigusr1_shows_the_stacks_and_then_the_state() -> None:
    result = run(ASKED)
    assert (result.returncode, result.stdout) == (0, "state\n")
    assert result.stderr.count("most recent call first") == 2
    assert signal.SIGUSR1.name not in result.stderr
