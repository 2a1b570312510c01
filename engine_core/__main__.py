"""`python -m engine_core [MODEL] --socket-dir DIR`: the engine core as a process of its own.

The launcher starts it this way; so can you (see scripts/launch_processes).
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm import transport
from minivllm.config import EngineConfig, ServeConfig
from minivllm.control import ControlChannel
from minivllm.diagnostics import Watchdog, dump_stacks_on_signal
from minivllm.errors import StartupError
from minivllm.faults import Faults
from minivllm.garbage import spare_what_is_there
from minivllm.logs import setup_logging
from minivllm.options import load_config

if TYPE_CHECKING:
    from engine_core.device import Device

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT or the launcher's death. Returns the exit code: 0 clean, 1 failure."""
    config = load_config(sys.argv[1:] if argv is None else argv, "python -m engine_core")
    setup_logging("EngineCore", config.log_format)
    dump_stacks_on_signal()
    control = ControlChannel.inherit()
    try:
        _serve(config, control)
    except StartupError as error:
        if not control.report("failed", reason=str(error), exit_code=1):
            print(f"minivllm: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        logger.exception("the engine core failed")
        control.report("failed", reason=f"{type(error).__name__}: {error}", exit_code=1)
        return 1
    return 0


def _serve(config: ServeConfig, control: ControlChannel) -> None:
    socket_dir = transport.make_socket_dir(config.socket_dir)
    endpoints = transport.Endpoints.in_directory(socket_dir)
    control.watch(lambda message: None, lambda: _leave(socket_dir))
    control.report("loading", detail="importing torch")
    # OpenMP reads it when torch loads it. Threads that spin while they wait for each other made a step 25 times
    # slower beside one other busy process; asleep, they cost a third of the speed when alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from engine_core.lean_imports import import_transformers

    import_transformers()  # seconds, with torch: only now that a dead launcher is noticed
    from engine_core.engine import EngineCore
    from engine_core.server import EngineServer
    from engine_core.stats import StatsLine
    from minivllm.model_store import resolve_model

    watchdog = Watchdog(config.step_timeout)

    def on_heartbeat() -> None:
        watchdog.reset()
        control.beat()

    server = EngineServer(
        endpoints,
        lease_seconds=config.frontend_lease,
        heartbeat_seconds=config.heartbeat_seconds,
        stats_line=None if config.disable_log_stats else StatsLine(),
        on_heartbeat=on_heartbeat,
        check_integrity=config.enable_debug,
        faults=config.faults,
    )
    server.bind()
    dump_stacks_on_signal(server.dump_state)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    try:
        directory = resolve_model(config)
        engine = EngineCore(
            engine_config(config),
            directory,
            lambda detail: _report(control, detail),
            load=partial(_load_device, config.faults),
        )
    except BaseException as error:
        server.close(f"the engine core could not start: {error}")
        raise
    spare_what_is_there()
    facts = engine.facts(os.getpid())
    logger.info(
        "ready on %s (%s): %d KV cache blocks of %d tokens, max_model_len %d, sockets in %s",
        facts.device, facts.dtype, facts.num_blocks, facts.block_size, facts.max_model_len, socket_dir,
    )  # fmt: skip
    control.report("ready", pid=facts.pid, num_blocks=facts.num_blocks, max_model_len=facts.max_model_len)
    try:
        server.run(engine, facts)
    finally:
        watchdog.stop()


def engine_config(config: ServeConfig) -> EngineConfig:
    """The engine core's part of all options."""
    return EngineConfig.model_validate(config.model_dump(include=set(EngineConfig.model_fields)))


def _load_device(faults: Faults, config: EngineConfig, directory: Path, report: Callable[[str], None]) -> "Device":
    """The device, below everything that watches it, with the faults of steps."""
    import torch

    from engine_core.device import load_device

    device = load_device(config, directory, report)
    launch = faults.disturb_steps(device.runner.launch, lambda: torch.OutOfMemoryError("injected"))
    setattr(device.runner, "launch", launch)  # noqa: B010 - a method, as far as types are concerned
    return device


def _report(control: ControlChannel, detail: str) -> None:
    logger.debug(detail)
    control.report("loading", detail=detail)


def _leave(socket_dir: Path) -> None:
    """The launcher is gone: remove the sockets and let go of the device at once, whatever is being computed."""
    transport.remove_socket_dir(socket_dir)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
