"""`minivllm serve`: prepares what the processes share, starts them under a supervisor, and tidies up after them."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from minivllm import model_store
from minivllm.api_servers import default_api_server_count
from minivllm.child import ChildSpec
from minivllm.config import ServeConfig
from minivllm.control import CONTROL_FD_VARIABLE
from minivllm.listener import LISTEN_FD_VARIABLE, SUCCESSOR_VARIABLE, open_listeners, public_url
from minivllm.options import ENV_PREFIX, env_name
from minivllm.progress import Progress
from minivllm.supervisor import Supervisor
from minivllm.transport import CONFIG_FILE, METRICS_DIR, Endpoints, make_socket_dir, remove_socket_dir

METRICS_DIR_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's

# -P: a directory called frontend where the user happens to stand must not be taken for ours.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "engine_core")
FRONTEND_COMMAND = (sys.executable, "-P", "-m", "frontend")


def serve(
    config: ServeConfig,
    engine_command: tuple[str, ...] = ENGINE_COMMAND,
    frontend_command: tuple[str, ...] = FRONTEND_COMMAND,
) -> int:
    """Serve until told to stop; the exit code. Raises `StartupError` when the server cannot start."""
    with ExitStack() as cleanup:
        count = config.api_server_count or default_api_server_count(config)
        listeners = [cleanup.enter_context(listener) for listener in open_listeners(config, count)]
        if config.uds is not None:
            cleanup.callback(config.uds.unlink, missing_ok=True)
        progress = cleanup.enter_context(Progress())
        try:
            resolved = _resolve(config, listeners[0], progress)
        except KeyboardInterrupt:
            return 0
        socket_dir = make_socket_dir(config.socket_dir)
        cleanup.callback(remove_socket_dir, socket_dir)
        Endpoints.in_directory(socket_dir)  # refuses a path that is too long
        resolved = resolved.model_copy(update={"socket_dir": socket_dir, "api_server_count": count})
        progress.update(f"Starting {_short_name(config)}")
        engine, frontends = _child_specs(resolved, listeners, engine_command, frontend_command)
        supervisor = Supervisor(
            engine,
            frontends,
            startup_timeout=config.startup_timeout,
            shutdown_timeout=config.shutdown_timeout,
            silence_timeout=config.silence_timeout,
            max_engine_restarts=config.max_engine_restarts,
            on_progress=progress.update,
            on_ready=_announcer(progress, _short_name(config), public_url(config, listeners[0])),
        )
        return asyncio.run(supervisor.run())


def _resolve(config: ServeConfig, listener: socket.socket, progress: Progress) -> ServeConfig:
    """`config` with every name turned into what it stands for: local directories, the real port."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a download or conversion with its subprocess
    model = model_store.resolve_model(config, progress)
    tokenizer = model_store.resolve_tokenizer(config, progress)
    return config.model_copy(
        update={
            "model": str(model),
            "tokenizer": str(tokenizer),
            "revision": None,
            "served_model_name": config.served_model_name or config.model,
            "port": listener.getsockname()[1] if config.uds is None else config.port,
        }
    )


def _child_specs(
    config: ServeConfig,
    listeners: Sequence[socket.socket],
    engine_command: tuple[str, ...],
    frontend_command: tuple[str, ...],
) -> tuple[ChildSpec, list[ChildSpec]]:
    directory = config.socket_dir or Path()
    config_file = _write_private(directory / CONFIG_FILE, config.model_dump_json())
    environment = _child_environment(os.environ)
    if len(listeners) > 1:  # prometheus_client adds up the counters of several frontends in files there
        metrics_dir = directory / METRICS_DIR
        metrics_dir.mkdir(mode=0o700, exist_ok=True)
        environment[METRICS_DIR_VARIABLE] = str(metrics_dir)
    arguments = ("--config", str(config_file))
    frontends = [
        ChildSpec(
            f"frontend-{index}",
            (*frontend_command, *arguments),
            {**environment, LISTEN_FD_VARIABLE: str(listener.fileno())},
            (listener.fileno(),),
        )
        for index, listener in enumerate(listeners)
    ]
    return ChildSpec("engine_core", (*engine_command, *arguments), environment), frontends


def _child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without our options: the children get them resolved, and a variable would beat their config file."""
    options = {env_name(name) for name in ServeConfig.model_fields}
    ours = options | {f"{ENV_PREFIX}CONFIG", CONTROL_FD_VARIABLE, METRICS_DIR_VARIABLE}
    ours |= {LISTEN_FD_VARIABLE, SUCCESSOR_VARIABLE}
    return {name: value for name, value in environ.items() if name not in ours}


def _write_private(path: Path, text: str) -> Path:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)  # may hold the API key
    return path


def _short_name(config: ServeConfig) -> str:
    return (config.served_model_name or config.model).rstrip("/").rpartition("/")[2]


def _announcer(progress: Progress, name: str, url: str) -> Callable[[], None]:
    def announce() -> None:
        progress.pause()
        print(f"Mini-vLLM serves {name} at {url} (Ctrl-C stops it)", flush=True)

    return announce
