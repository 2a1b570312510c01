"""scripts/bench and scripts/demo, as a user runs them, on the real server."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import psutil

from tests.support.server import WAIT, ServerProcess, wait_until

BENCH = (sys.executable, "-P", "-m", "minivllm.bench.http")
DEMO = (sys.executable, "-P", "-m", "minivllm.demo")
SVG = "{http://www.w3.org/2000/svg}"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT, check=False)


def test_bench_measures_a_server(server: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    result = run(*BENCH, "--url", server.url, "--workloads", "A", "--rounds", "1", "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stdout
    numbers = json.loads(file.read_text())
    (a,) = numbers["results"]
    assert (a["num_prompt_tokens"], a["num_output_tokens"], a["num_cached_tokens"]) == (64, 128, 0)
    assert a["seconds"] > a["ttft_p50"] / 1000 > 0
    assert abs(a["tokens_per_second"] * a["seconds"] - 128) < 1e-6
    assert numbers["frontend"]["ready_seconds"] is None  # it was running already
    assert numbers["frontend"]["rss_bytes"] > 10 * 2**20


def test_bench_says_why_it_cannot() -> None:
    result = run(*BENCH, "/nowhere/model")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "bench: error: the server did not start (exit code 1): minivllm: error: /nowhere/model: no such directory"
    )


def test_interrupted_bench_takes_its_server_with_it(default_model_dir: Path) -> None:
    with subprocess.Popen([*BENCH, str(default_model_dir)], stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stderr is not None
        assert bench.stderr.readline() == "Starting a server\n"
        wait_until("started", lambda: len(psutil.Process(bench.pid).children(recursive=True)) == 3)
        children = psutil.Process(bench.pid).children(recursive=True)
        bench.send_signal(signal.SIGTERM)
        assert bench.stderr.read().splitlines()[-1] == "bench: interrupted"
        assert bench.wait(WAIT) == 1
    assert psutil.wait_procs(children, timeout=WAIT)[1] == []


def test_demo_records_a_real_run(default_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "demo.svg"
    result = run(*DEMO, "--record", str(file), str(default_model_dir))
    assert result.returncode == 0, result.stderr
    assert file.stat().st_size < 400_000
    text = file.read_text()
    shown = "\n".join(element.text or "" for element in ET.fromstring(text).iter(f"{SVG}text"))
    assert "The capital of France is" in shown
    assert re.search(r"step\s+\d+", shown)
    assert max(text.count(f"■ {name}") for name in ("alice", "bob", "carol")) > 10
