"""`minivllm serve` with fake children: `python launcher.py LOG ENGINE_BEHAVIOUR FRONTEND_BEHAVIOUR [options]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minivllm import cli
from minivllm.launch import serve
from minivllm.logs import setup_logging
from minivllm.options import load_config

FAKE_CHILD = str(Path(__file__).with_name("fake_child.py"))


def main(log: str, engine: str, frontend: str, *arguments: str) -> int:
    def serve_fakes(options: Sequence[str], prog: str) -> int:
        setup_logging("Launcher")
        command = (sys.executable, FAKE_CHILD, log)
        return serve(load_config(options, prog), (*command, "engine", engine), (*command, "frontend", frontend))

    cli.COMMANDS["serve"] = cli.Command(serve_fakes, "")
    return cli.main(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
