"""Killed processes and servers that cannot start: clients hear of it, nothing hangs, nothing is left behind."""

import os
import signal
import socket
from itertools import islice
from pathlib import Path

import httpx
import psutil
import pytest

from minivllm.errors import StartupError
from tests.support.server import WAIT, ServerProcess, kill, token_ids_of

LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}


def test_engine_core_past_its_restart_limit_is_told_to_every_client_and_ends_in_70(default_model_dir: Path) -> None:
    with ServerProcess(str(default_model_dir), "--max-engine-restarts", "0") as server:
        socket_dir, children = server.socket_dir(), list(server.processes().values())
        with server.stream(**LONG) as events, server.connect(**LONG, stream=False) as whole:
            assert len(list(islice(events, 2))) == 2
            server.wait_for_metrics("running", lambda metrics: metrics.num_running == 2)
            kill(server.engine_core)
            *_, error, done = events
            answer = receive_all(whole)
        assert done == "[DONE]"
        assert error["error"]["code"] == "engine_gone"
        assert error["error"]["message"] == "the engine core was killed by SIGKILL"
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"engine_gone" in answer
        assert server.wait() == 70
        server.wait_for_log(r"engine_core .* was killed by SIGKILL: stopping")
        expect_nothing_left(children, socket_dir)


def test_killed_frontend_is_restarted_and_its_requests_are_freed(default_model_dir: Path) -> None:
    with ServerProcess(str(default_model_dir)) as server:
        (frontend,) = server.frontends
        with server.stream(**LONG) as events:
            assert len(list(islice(events, 2))) == 2
            kill(frontend)
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                list(events)
        server.wait_for_log(r"frontend-0 .* was killed by SIGKILL: restarting")
        server.wait_until_serving()
        server.generate(prompt="x", max_tokens=1, ignore_eos=True)
        assert server.frontends[0].pid != frontend.pid
        metrics = server.settle()
        assert metrics.finished == {"abort": 1, "length": 1}


def test_killed_launcher_leaves_no_process_and_no_socket(default_model_dir: Path) -> None:
    with ServerProcess(str(default_model_dir), "--api-server-count", "2") as server:
        socket_dir, children = server.socket_dir(), list(server.processes().values())
        assert len(children) == 3
        with server.connect(**LONG) as connection:
            assert connection.recv(1)
            server.process.kill()
            receive_all(connection)  # ends: the frontend is gone
        assert server.wait() == -signal.SIGKILL
        expect_nothing_left(children, socket_dir)
        with socket.socket() as probe:
            assert probe.connect_ex(server.address) != 0


def test_sigterm_drains_a_running_stream(default_model_dir: Path) -> None:
    with ServerProcess(str(default_model_dir)) as server:
        socket_dir, children = server.socket_dir(), list(server.processes().values())
        with server.stream(**{**LONG, "max_tokens": 30}) as events:
            first = list(islice(events, 2))
            server.process.terminate()
            server.wait_for_log("shutting down: 1 requests are unfinished")
            assert server.http.post("/generate", json={"prompt": "x"}).status_code == 503
            rest = list(events)
        assert rest[-2]["finish_reason"] == "length"
        assert rest[-2]["usage"]["completion_tokens"] == 30
        assert first[0]["finish_reason"] is None
        assert server.wait() == 0
        expect_nothing_left(children, socket_dir)


@pytest.mark.parametrize(("seconds", "reason"), [("60", "length"), ("0.5", "abort")])
def test_sigterm_while_the_engine_core_is_restarted(default_model_dir: Path, seconds: str, reason: str) -> None:
    """The stream is resumed and finished, where there is time for it; else it is cut off. Never a failure."""
    with ServerProcess(str(default_model_dir), "--shutdown-timeout", seconds) as server:
        socket_dir, children = server.socket_dir(), list(server.processes().values())
        with server.stream(**{**LONG, "max_tokens": 30}) as events:
            first = list(islice(events, 2))
            kill(server.engine_core)
            server.wait_for_log("engine_core was started again as pid")
            children.append(server.engine_core)
            server.process.terminate()
            server.wait_for_log("shutting down: 1 requests are unfinished")
            rest = list(events)
        assert rest[-2]["finish_reason"] == reason
        assert reason == "abort" or len(token_ids_of([*first, *rest])) == 30
        assert server.wait() == 0
        expect_nothing_left(children, socket_dir)


def test_second_ctrl_c_stops_at_once(default_model_dir: Path) -> None:
    with ServerProcess(str(default_model_dir), "--shutdown-timeout", "600") as server:
        socket_dir, children = server.socket_dir(), list(server.processes().values())
        with server.connect(**{**LONG, "max_tokens": 8000}) as connection:
            assert connection.recv(1)
            server.process.send_signal(signal.SIGINT)
            server.wait_for_log("shutting down")
            server.process.send_signal(signal.SIGINT)
            answer = receive_all(connection)
        assert b'"finish_reason":"abort"' in answer or not answer.endswith(b"0\r\n\r\n")
        assert server.wait() == 0
        expect_nothing_left(children, socket_dir)


def test_port_in_use(default_model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        reason = expect_failure(str(default_model_dir), "--port", port)
    assert f"port {port} of 127.0.0.1 is in use" in reason


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "lacks weights"),
        ("tokenizer.json", "no tokenizer.json"),
    ],
)
def test_incomplete_model(default_model_dir: Path, tmp_path: Path, spoil: str, message: str) -> None:
    for file in default_model_dir.iterdir():
        if file.name != spoil:
            (tmp_path / file.name).symlink_to(file)
    assert message in expect_failure(str(tmp_path))


def test_model_that_cannot_run_here(default_model_dir: Path, tmp_path: Path) -> None:
    for file in default_model_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "architectures": ["BloomForCausalLM"]}')
    assert "bloom" in expect_failure(str(tmp_path), "--load-format", "dummy").lower()


def test_sockets_and_options_are_private(default_model_dir: Path) -> None:
    with ServerProcess(str(default_model_dir)) as server:
        directory = server.socket_dir()
        assert directory.stat().st_mode & 0o777 == 0o700
        assert (directory / "config.json").stat().st_mode & 0o777 == 0o600
        assert directory.stat().st_uid == os.getuid()


def expect_failure(*options: str) -> str:
    """Start-up fails with exit code 1; the one line that says why."""
    server = ServerProcess(*options)
    with pytest.raises(StartupError, match=r"exit code 1"), server:
        pass
    assert server.log[-1].startswith("minivllm: error: ")
    assert not any("Traceback" in line for line in server.log)
    return server.log[-1]


def expect_nothing_left(children: list[psutil.Process], socket_dir: Path) -> None:
    assert psutil.wait_procs(children, timeout=WAIT)[1] == []
    assert not socket_dir.exists()


def receive_all(connection: socket.socket) -> bytes:
    """Everything until the peer closes; a reset ends it too."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
            if received.endswith(b"\r\n0\r\n\r\n"):
                break
    except ConnectionResetError:
        pass
    return received
