"""`python -m frontend [MODEL] --socket-dir DIR`: one frontend process, started by the launcher or by hand."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import uvloop

from frontend.server import Frontend
from frontend.tokenizer import Tokenizer
from minivllm.config import ServeConfig
from minivllm.control import ControlChannel
from minivllm.diagnostics import dump_stacks_on_signal
from minivllm.errors import StartupError
from minivllm.garbage import spare_what_is_there
from minivllm.listener import LISTEN_FD_VARIABLE, SUCCESSOR_VARIABLE, open_listener
from minivllm.logs import setup_logging
from minivllm.options import load_config
from minivllm.transport import Endpoints, make_socket_dir


def main() -> int:
    """Run to the end. Exit codes: 0 clean, 1 start-up failure, 2 bad arguments."""
    config = load_config(sys.argv[1:], "python -m frontend")
    setup_logging("Frontend", config.log_format)
    dump_stacks_on_signal()
    control = ControlChannel.inherit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the event loop takes over
    try:
        frontend = _prepare(config, control)
    except StartupError as error:
        if not control.report("failed", reason=str(error), exit_code=1):
            print(f"minivllm: error: {error}", file=sys.stderr)
        return 1
    spare_what_is_there()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(frontend.run())
    return 0


def _prepare(config: ServeConfig, control: ControlChannel) -> Frontend:
    """Raises `StartupError`. The port comes first: when it is taken, nothing else matters."""
    if config.socket_dir is None:
        raise StartupError("--socket-dir is needed: the directory where the engine core has its sockets")
    endpoints = Endpoints.in_directory(make_socket_dir(config.socket_dir))
    inherited = os.environ.pop(LISTEN_FD_VARIABLE, None)
    listener = socket.socket(fileno=int(inherited)) if inherited else open_listener(config)
    tokenizer = Tokenizer.from_directory(_tokenizer_directory(config), config.chat_template)
    is_successor = os.environ.pop(SUCCESSOR_VARIABLE, None) is not None
    return Frontend(config, tokenizer, endpoints, listener, control, is_successor=is_successor)


def _tokenizer_directory(config: ServeConfig) -> Path:
    """The launcher passes local directories; by hand it may be a hub id, looked up only then (slow imports)."""
    given = Path(config.tokenizer or config.model)
    if given.is_dir():
        return given
    from minivllm.model_store import resolve_tokenizer

    return resolve_tokenizer(config)


if __name__ == "__main__":
    sys.exit(main())
