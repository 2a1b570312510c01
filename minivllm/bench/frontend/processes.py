"""The processes of the frontend benchmark: a stub engine, and frontends that share a listening socket."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil

from minivllm import launch
from minivllm.bench.frontend.options import FrontendBenchOptions
from minivllm.bench.serving.generator import LoadError
from minivllm.config import FrontendConfig
from minivllm.listener import LISTEN_FD_VARIABLE, open_listeners, public_url
from minivllm.transport import make_socket_dir, remove_socket_dir

MODEL_NAME = "bench"
_STUB_ENGINE = (sys.executable, "-P", "-m", "minivllm.bench.frontend.stub_engine")


class Processes:
    """What runs: `url` of the frontends, and what each side used of the processor."""

    def __init__(self, url: str, engine: subprocess.Popen[str], frontends: list[subprocess.Popen[str]]) -> None:
        self.url = url
        self._engine = engine
        self._frontends = frontends

    def cpu_seconds(self) -> tuple[float, float]:
        """Of the frontends together, and of the engine, since they started."""
        frontends = sum(_cpu_seconds(process.pid) for process in self._frontends)
        return frontends, _cpu_seconds(self._engine.pid)


@contextmanager
def running(options: FrontendBenchOptions, tokenizer_dir: str, vocab_size: int) -> Iterator[Processes]:
    """Started here, killed after the block."""
    config = FrontendConfig(port=0)
    with ExitStack() as stack:
        listeners = [stack.enter_context(each) for each in open_listeners(config, options.frontends)]
        socket_dir = make_socket_dir()
        stack.callback(remove_socket_dir, socket_dir)
        pace = ("--vocab-size", str(vocab_size), "--tokens-per-second", str(options.tokens_per_second))
        engine = _start(stack, (*_STUB_ENGINE, str(socket_dir), *pace, "--hold", str(options.streams)))
        options_of_frontend = ("--socket-dir", str(socket_dir), "--served-model-name", MODEL_NAME)
        command = (*launch.FRONTEND_COMMAND, tokenizer_dir, *options_of_frontend)
        frontends = [_start(stack, command, listener.fileno()) for listener in listeners]
        for frontend in frontends:
            _wait_until_ready(frontend)
        yield Processes(public_url(config, listeners[0]), engine, frontends)


def _start(stack: ExitStack, command: tuple[str, ...], listen_fd: int | None = None) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    if listen_fd is not None:
        environment[LISTEN_FD_VARIABLE] = str(listen_fd)
    pass_fds = () if listen_fd is None else (listen_fd,)
    process = stack.enter_context(
        subprocess.Popen(command, env=environment, pass_fds=pass_fds, stderr=subprocess.PIPE, text=True)
    )
    stack.callback(process.kill)
    return process


def _wait_until_ready(frontend: subprocess.Popen[str]) -> None:
    """Read its log until it has found the engine. It logs next to nothing after that, so nobody reads on."""
    line = ""
    for line in frontend.stderr or ():
        if "engine core ready" in line:
            return
    raise LoadError(f"a frontend ended: {line.strip()}")


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error as error:
        raise LoadError(f"a process of the benchmark ended: {error}") from error
    return times.user + times.system
