"""The launcher with fake children: every way to start, to fail and to stop, and nothing left behind."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

LAUNCHER = Path(__file__).parent / "launch_support" / "launcher.py"
WAIT = 30.0
LONG_DIRECTORY = f"{tempfile.gettempdir()}/{'x' * 120}"


class Run:
    """A launcher with fake children, and what they wrote."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.log = directory / "log"
        self.socket_dir = directory / "sockets"
        self._model = model
        self._process: subprocess.Popen[str] | None = None
        self.lines = ""  # of the log, so far

    def start(
        self,
        *options: str,
        engine: str = "work",
        frontend: str = "work",
        nohup: bool = False,
        **environment: str,
    ) -> None:
        arguments = [str(self._model), "--load-format", "dummy", "--socket-dir", str(self.socket_dir), *options]
        self._process = subprocess.Popen(
            [*(["nohup"] if nohup else []), sys.executable, str(LAUNCHER), str(self.log), engine, frontend, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    @property
    def process(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError("not started")
        return self._process

    def url(self) -> str:
        """Block until the one line with the URL is there."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.fullmatch(r"Mini-vLLM serves tiny at (\S+) \(Ctrl-C stops it\)\n", line)
        assert match, line
        return match[1]

    def wait_for_log(self, pattern: str) -> None:
        """Read the log up to a line that `pattern` is found in."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"{pattern!r} is not in the log: {self.lines}")

    def wait_for_event(self, kind: str, event: str) -> None:
        """Wait until a child of that kind has noted `event`."""
        deadline = time.monotonic() + WAIT
        while not any(noted[0] == kind and noted[2] == event for noted in self.events()):
            assert time.monotonic() < deadline, f"no {event} of {kind}: {self.events()}"
            time.sleep(0.02)

    def finish(self) -> tuple[int, str, str]:
        """Exit code, rest of stdout, and stderr; nothing of the run may be left."""
        stdout, stderr = self.process.communicate(timeout=WAIT)
        self.check_nothing_left()
        return self.process.returncode, stdout, stderr

    def check_nothing_left(self) -> None:
        children = [psutil.Process(pid) for pid in self.pids() if psutil.pid_exists(pid)]
        _, alive = psutil.wait_procs(children, timeout=WAIT)
        assert not alive
        assert not self.socket_dir.exists()

    def events(self) -> list[list[str]]:
        """`[kind, pid, event, …]` in order."""
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def pids(self, kind: str = "") -> list[int]:
        return [int(event[1]) for event in self.events() if event[2] == "started" and event[0].startswith(kind)]

    def message_of_frontend(self, url: str) -> dict[str, Any]:
        """What the launcher last told the frontend that takes this connection."""
        return self.messages_of_frontend(url)[-1]

    def messages_of_frontend(self, url: str) -> list[dict[str, Any]]:
        """All that the launcher told that frontend."""
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as connection:
            messages: list[dict[str, Any]] = json.loads(connection.makefile().read())
            return messages


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").write_text("{}")
    return model


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as short_path:  # a socket path holds 100 characters
        run = Run(Path(short_path), tiny_model)
        yield run
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serves_and_stops_cleanly(run: Run, number: signal.Signals) -> None:
    run.start("--port", "0", "--api-server-count", "2")
    url = run.url()
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", url)
    assert stat.S_IMODE(run.socket_dir.stat().st_mode) == 0o700
    config_file = run.socket_dir / "config.json"
    assert stat.S_IMODE(config_file.stat().st_mode) == 0o600
    assert f":{json.loads(config_file.read_text())['port']}" in url
    run.process.send_signal(number)
    code, stdout, stderr = run.finish()
    assert (code, stdout) == (0, "")
    assert "reading fake weights" in stderr
    ends = [event[0] for event in run.events() if event[2] == "sigterm"]
    assert ends == ["frontend", "frontend", "engine"]  # the engine core works until the streams have ended


def test_children_get_resolved_options_and_their_own_session(run: Run) -> None:
    run.start("--port", "0", MINIVLLM_PORT="1", MINIVLLM_MAX_NUM_SEQS="7", MINIVLLM_CACHE="/nowhere")
    run.url()
    config = json.loads((run.socket_dir / "config.json").read_text())
    assert config["max_num_seqs"] == 7
    assert Path(config["model"]).is_absolute()
    assert config["tokenizer"] == config["model"]
    assert config["served_model_name"].endswith("tiny")
    starts = [event for event in run.events() if event[2] == "started"]
    assert {event[4] for event in starts} == {"env=MINIVLLM_CACHE"}
    assert all(event[3] == f"sid={event[1]}" for event in starts)  # so Ctrl-C reaches only the launcher
    run.process.terminate()
    assert run.finish()[0] == 0


def test_sends_process_facts_to_the_frontends(run: Run) -> None:
    run.start("--port", "0")
    facts = run.message_of_frontend(run.url())["processes"]
    assert {fact["name"]: fact["pid"] for fact in facts} == {
        "launcher": run.process.pid,
        "engine_core": run.pids("engine")[0],
        "frontend-0": run.pids("frontend")[0],
    }
    assert all(fact["rss"] > 1_000_000 and fact["cpu_seconds"] > 0 for fact in facts)
    run.process.terminate()
    assert run.finish()[0] == 0


def test_listens_on_a_unix_socket_and_removes_it(run: Run, tiny_model: Path) -> None:
    path = run.log.with_name("http.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))  # what a killed server leaves behind
    run.start("--uds", str(path))
    assert run.url() == f"unix:{path}"
    run.process.terminate()
    assert run.finish()[0] == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("engine", "frontend", "reason"),
    [
        ("fail", "work", "the fake model is too large: 9 GiB of 1 GiB"),
        ("crash", "work", "engine_core exited with code 3 while starting"),
        ("work", "crash", "frontend-0 exited with code 3 while starting"),
        ("silent", "work", "engine_core was not ready within 1.5 s (--startup-timeout)"),
        ("work", "silent", "frontend-0 was not ready within 1.5 s (--startup-timeout)"),
    ],
)
def test_failure_to_start_is_one_line_and_exit_code_1(run: Run, engine: str, frontend: str, reason: str) -> None:
    run.start("--port", "0", "--startup-timeout", "1.5", engine=engine, frontend=frontend)
    code, stdout, stderr = run.finish()
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1] == f"minivllm: error: {reason}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_loading_stops_cleanly(run: Run, number: signal.Signals) -> None:
    run.start("--port", "0", engine="silent")
    assert run.process.stderr is not None
    while "fake weights" not in run.process.stderr.readline():
        pass
    run.process.send_signal(number)
    assert run.finish()[0] == 0


def test_port_in_use_is_known_before_anything_starts(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        run.start("--port", str(port))
        code, _, stderr = run.finish()
    assert code == 1
    expected = f"minivllm: error: port {port} of 127.0.0.1 is in use by another process; choose another with --port\n"
    assert stderr == expected
    assert run.events() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "192.0.2.1"], "cannot listen on port 8000 of 192.0.2.1"),
        (["--host", "no such host"], "--host no such host is not an address"),
        (["--uds", str(Path(__file__))], "exists and is not a socket"),
        (["--uds", "/" + "x" * 200], "cannot listen on --uds"),
        (["--port", "0", "--socket-dir", LONG_DIRECTORY], "is too long"),
    ],
)
def test_bad_addresses_are_refused(run: Run, options: list[str], message: str) -> None:
    run.start(*options)
    code, _, stderr = run.finish()
    assert code == 1
    assert message in stderr.splitlines()[-1]
    assert not Path(LONG_DIRECTORY).exists()


def test_dead_engine_core_is_restarted_and_the_frontends_are_told(run: Run) -> None:
    run.start("--port", "0")
    url = run.url()
    first = run.pids("engine")[0]
    os.kill(first, signal.SIGKILL)
    run.wait_for_log("engine_core .* was killed by SIGKILL: restarting")
    run.wait_for_log("engine_core was started again")
    assert {"engine_gone": "the engine core was killed by SIGKILL", "pid": first} in run.messages_of_frontend(url)
    assert len(run.pids("frontend")) == 1
    run.process.terminate()
    assert run.finish()[0] == 0


def test_engine_core_that_keeps_dying_ends_in_70(run: Run) -> None:
    run.start("--port", "0", "--max-engine-restarts", "2", engine="die later")
    code, _, stderr = run.finish()
    assert code == 70
    assert len(run.pids("engine")) == 3
    assert len(run.pids("frontend")) == 1
    assert stderr.count("exited with code 4: restarting") == 2
    assert stderr.count("exited with code 4: stopping") == 1


def test_engine_core_that_cannot_start_again_ends_in_70(run: Run) -> None:
    run.start("--port", "0", "--max-engine-restarts", "2", engine="once")
    run.url()
    os.kill(run.pids("engine")[0], signal.SIGKILL)
    code, _, stderr = run.finish()
    assert code == 70
    assert stderr.count("engine_core failed: the fake model has gone") == 2


def test_silent_engine_core_is_killed_and_restarted(run: Run) -> None:
    run.start("--port", "0", "--step-timeout", "0.1", engine="stubborn")  # + 5 s of grace
    run.url()
    run.wait_for_log("engine_core .* has not moved for .* s: killing it")
    run.wait_for_log("engine_core was started again")
    run.process.terminate()
    assert run.finish()[0] == 0


def test_frontends_are_replaced_one_by_one(run: Run) -> None:
    run.start("--port", "0", "--api-server-count", "2")
    run.url()
    run.process.send_signal(signal.SIGUSR2)
    for _ in range(2):
        run.wait_for_log("frontend-. .* has retired: it exited with code 0")
    events = [(event[0], event[2]) for event in run.events() if event[2] in {"ready", "retired"}]
    assert events[-4:] == [("frontend", "ready"), ("frontend", "retired")] * 2
    assert len(run.pids("engine")) == 1
    run.process.terminate()
    assert run.finish()[0] == 0


def test_the_old_frontend_stays_when_its_successor_cannot_start(run: Run) -> None:
    run.start("--port", "0", frontend="once")
    run.url()
    run.process.send_signal(signal.SIGUSR2)
    run.wait_for_log("rolling restart: frontend-0 failed to start, the old one stays")
    assert [event for event in run.events() if event[2] == "retired"] == []
    run.process.terminate()
    assert run.finish()[0] == 0


def test_sigusr1_is_passed_on_to_everybody(run: Run) -> None:
    run.start("--port", "0")
    run.url()
    run.process.send_signal(signal.SIGUSR1)
    run.wait_for_log(r"engine_core \(pid \d+\) is ready")
    run.wait_for_log(r"frontend-0 \(pid \d+\) is ready")
    run.wait_for_event("engine", "sigusr1")
    run.wait_for_event("frontend", "sigusr1")
    run.process.terminate()
    assert run.finish()[0] == 0


def test_nohup_keeps_it_running(run: Run) -> None:
    run.start("--port", "0", nohup=True)
    run.url()
    run.process.send_signal(signal.SIGHUP)
    run.process.send_signal(signal.SIGUSR1)  # handled after it
    run.wait_for_event("engine", "sigusr1")
    run.process.terminate()
    assert run.finish()[0] == 0
    assert "SIGHUP" not in run.lines


def test_dead_frontend_is_restarted_on_the_same_port(run: Run) -> None:
    run.start("--port", "0")
    url = run.url()
    run.message_of_frontend(url)
    first = run.pids("frontend")[0]
    process = psutil.Process(first)
    process.kill()
    process.wait(WAIT)  # until then it may still accept, and die with the connection
    facts = run.message_of_frontend(url)["processes"]  # the connection waits in the backlog meanwhile
    second = run.pids("frontend")[1]
    assert second != first
    assert second in [fact["pid"] for fact in facts]
    run.process.terminate()
    assert run.finish()[0] == 0


def test_frontend_that_keeps_dying_ends_in_70(run: Run) -> None:
    run.start("--port", "0", frontend="die")
    code, _, stderr = run.finish()
    assert code == 70
    assert len(run.pids("frontend")) == 6  # once, and five restarts
    assert stderr.count("exited with code 4") == 6


def test_second_signal_stops_at_once(run: Run) -> None:
    run.start("--port", "0", "--shutdown-timeout", "600", frontend="stubborn")
    run.url()
    run.process.terminate()
    assert run.process.stderr is not None
    while "again: at once" not in run.process.stderr.readline():
        pass
    run.process.terminate()
    code, _, stderr = run.finish()
    assert code == 0
    assert "did not end in time: killing it" in stderr


def test_straggler_is_killed_after_the_shutdown_timeout(run: Run) -> None:
    run.start("--port", "0", "--shutdown-timeout", "0", frontend="stubborn")
    run.url()
    run.process.terminate()
    assert run.finish()[0] == 0


def test_dead_launcher_leaves_nothing(run: Run) -> None:
    run.start("--port", "0", "--api-server-count", "2")
    run.url()
    run.process.kill()
    run.process.communicate(timeout=WAIT)
    run.check_nothing_left()
    assert sorted(event[0] for event in run.events() if event[2] == "eof") == ["engine", "frontend", "frontend"]


def test_broken_control_line_does_not_end_the_launcher(run: Run) -> None:
    run.start("--port", "0", "--startup-timeout", "3", frontend="garbage")
    code, _, stderr = run.finish()
    assert code == 1
    assert "the control line of frontend-0 is broken" in stderr
