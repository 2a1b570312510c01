"""Other shapes of the server: several frontends, started by hand, random weights; and what a frontend weighs."""

import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import psutil

from tests.support.server import WAIT, ServerProcess, kill, token_ids_of

ROOT = Path(__file__).parents[2]
MAX_FRONTEND_RSS = 120 * 2**20
HEAVY = ("torch", "transformers", "numpy")


def test_two_frontends_share_the_port_and_the_numbers(default_model_dir: Path) -> None:
    with ServerProcess(str(default_model_dir), "--api-server-count", "2") as server:
        assert len(server.frontends) == 2
        with ThreadPoolExecutor(16) as pool:
            answers = list(
                pool.map(lambda n: server.generate(prompt=f"{n} and", max_tokens=4, ignore_eos=True), range(48))
            )
        assert all(len(answer["token_ids"]) == 4 for answer in answers)
        metrics = server.settle()
        assert metrics.num_submitted == 48
        assert metrics.finished == {"length": 48}
        assert metrics.answered == {"length": 48}  # whichever frontend is asked shows the sum of both
        assert metrics["vllm:request_generation_tokens_sum"] == 4 * 48
        assert metrics["vllm:time_to_first_token_seconds_count"] == 48
        cpu = {name: value for name, value in metrics.samples.items() if "process_cpu_seconds" in name}
        assert {"frontend-0", "frontend-1"} <= {re.sub(r".*\{|\}", "", name) for name in cpu}


def test_delete_reaches_a_request_of_another_frontend(default_model_dir: Path) -> None:
    with ServerProcess(str(default_model_dir), "--api-server-count", "2") as server:
        with server.stream(prompt="Once", max_tokens=4000, ignore_eos=True, request_id="mine") as events:
            next(events)
            owner = owner_of_client(server)
            (other,) = (frontend for frontend in server.frontends if frontend.pid != owner.pid)
            with connection_to(other, server) as connection:
                connection.sendall(b"DELETE /v1/requests/mine HTTP/1.1\r\nHost: test\r\n\r\n")
                assert connection.recv(12) == b"HTTP/1.1 202"
            ended = server.wait_for_metrics("aborted", lambda metrics: metrics.finished.get("abort") == 1)
            assert ended.num_running == 0
            assert list(events)[-2]["finish_reason"] == "abort"
        server.settle()


def test_processes_started_by_hand(default_model_dir: Path) -> None:
    command = (str(ROOT / "scripts" / "launch_processes"), str(default_model_dir), "--port", "0")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr as log:
        server = ServerProcess()
        while not server.url:
            match = re.search(r"listening on (http://\S+)", log.readline())
            server.url = match[1] if match else ""
        children = psutil.Process(process.pid).children()
        server.wait_until_serving()
        answer = server.generate(messages=[{"role": "user", "content": "What is the capital of France?"}])
        assert "Paris" in answer["text"]
        body = {"prompt": "Once", "max_tokens": 40, "ignore_eos": True}
        whole = server.generate(**body)["token_ids"]
        with server.stream(**body) as events:
            first = list(islice(events, 3))
            kill(next(child for child in children if "engine_core" in child.cmdline()))
            assert token_ids_of([*first, *events]) == whole
        server.settle()
        children = psutil.Process(process.pid).children()
        server.http.close()
        process.terminate()
        rest = log.read()
    assert process.wait(WAIT) == 0, rest
    assert psutil.wait_procs(children, timeout=WAIT)[1] == []


def test_random_weights(default_model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(default_model_dir / name)
    with ServerProcess(str(tmp_path), "--load-format", "dummy") as server:
        answer = server.generate(prompt="Hello", max_tokens=5, ignore_eos=True)
        assert len(answer["token_ids"]) == 5
        server.settle()


def test_frontend_in_service_is_light_and_maps_no_heavy_library(server: ServerProcess) -> None:
    server.generate(messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
    (frontend,) = server.frontends
    mapped = {Path(entry.path).name for entry in frontend.memory_maps()}
    assert any("uvloop" in name or name.startswith("loop.") for name in mapped)  # the right process
    assert not [entry.path for entry in frontend.memory_maps() if any(f"/{name}/" in entry.path for name in HEAVY)]
    assert frontend.memory_info().rss < MAX_FRONTEND_RSS


def test_frontend_imports_no_heavy_module() -> None:
    code = f"import sys, frontend.__main__; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def owner_of_client(server: ServerProcess) -> psutil.Process:
    """The frontend that holds the one established client connection."""
    port = server.address[1]
    owners = [
        frontend
        for frontend in server.frontends
        if any(c.status == "ESTABLISHED" and c.laddr.port == port for c in frontend.net_connections())
    ]
    assert len(owners) == 1
    return owners[0]


def connection_to(frontend: psutil.Process, server: ServerProcess) -> socket.socket:
    """A connection that `frontend` took; which one takes it is the kernel's choice, so try until it is that one."""
    while True:
        connection = socket.create_connection(server.address, timeout=WAIT)
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: test\r\n\r\n")
        while b"}" not in connection.recv(4096):
            pass
        if is_taken_by(frontend, connection.getsockname()[1]):
            return connection
        connection.close()


def is_taken_by(frontend: psutil.Process, client_port: int) -> bool:
    return any(c.status == "ESTABLISHED" and c.raddr.port == client_port for c in frontend.net_connections())
