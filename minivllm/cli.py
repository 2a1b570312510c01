"""The `minivllm` command: one table of subcommands, each reading its own options."""

import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from minivllm import __version__
from minivllm.errors import StartupError


class Command(NamedTuple):
    """A subcommand: takes (its arguments, the name to show in its help), returns the exit code."""

    run: Callable[[Sequence[str], str], int]
    summary: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run `minivllm argv`. 0: clean; 1: cannot be done, with one line why; 2: bad arguments; 70: engine core died."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"minivllm {__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"minivllm: error: unknown command {arguments[0]!r} (see minivllm --help)", file=sys.stderr)
        return 2
    try:
        return command.run(arguments[1:], f"minivllm {arguments[0]}")
    except StartupError as error:
        print(f"minivllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minivllm: interrupted", file=sys.stderr)
        return 1


def serve(arguments: Sequence[str], prog: str) -> int:
    """Start the server and supervise it."""
    from minivllm.launch import serve
    from minivllm.logs import setup_logging
    from minivllm.options import load_config

    config = load_config(arguments, prog)
    setup_logging("Launcher", config.log_format)
    return serve(config)


def pull(arguments: Sequence[str], prog: str) -> int:
    """Fetch a model and print its directory."""
    from minivllm.config import ModelConfig
    from minivllm.model_store import pull_model
    from minivllm.options import load_options
    from minivllm.progress import Progress

    config = load_options(ModelConfig, arguments, prog)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Progress() as progress:
        directory = pull_model(config, progress)
    print(directory)
    return 0


def bench(arguments: Sequence[str], prog: str) -> int:
    """Measure a server or the engine core."""
    from minivllm.bench.command import main

    return main(arguments, prog)


def chat(arguments: Sequence[str], prog: str) -> int:
    """Talk to a server."""
    from minivllm.chat.command import main

    return main(arguments, prog)


def simulate(arguments: Sequence[str], prog: str) -> int:
    """Run the scheduler against a cost model."""
    from minivllm.simulate.command import main

    return main(arguments, prog)


def replay(arguments: Sequence[str], prog: str) -> int:
    """Run a decision log again and compare."""
    from minivllm.simulate.replay import main

    return main(arguments, prog)


def lab(arguments: Sequence[str], prog: str) -> int:
    """Run one of the labs."""
    from minivllm.labs.command import main

    return main(arguments, prog)


COMMANDS = {
    "serve": Command(serve, "serve a model over HTTP"),
    "chat": Command(chat, "talk to a server in the terminal"),
    "pull": Command(pull, "fetch a model ahead of time"),
    "bench": Command(bench, "measure a server, a frontend or the engine"),
    "simulate": Command(simulate, "run the real scheduler against a cost model, and plan capacity"),
    "replay": Command(replay, "run the decisions of `serve --record FILE` again, without the model"),
    "lab": Command(lab, "see one idea of the engine work: a number, a picture, the code"),
}


def _help() -> str:
    lines = ["usage: minivllm COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "minivllm COMMAND --help shows its options; minivllm --version the version."])
