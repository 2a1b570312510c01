"""`scripts/demo`: three clients of one real server, side by side; `--record FILE.svg` makes the README's animation."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
from rich.console import Console
from rich.live import Live

from minivllm.demo.animation import Frame, capture, render_svg
from minivllm.demo.run import run_clients
from minivllm.demo.screen import HEIGHT, WIDTH, draw
from minivllm.demo.state import Client, DemoState
from minivllm.errors import MiniVLLMError
from minivllm.local_server import LocalServer

_SLOWDOWN = 2.0  # what streams in three seconds cannot be read in three seconds
_TITLE = "Mini-vLLM: three clients, one engine (at half speed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. 0: done; 1: the server failed, with one line why."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Continuous batching in your terminal.")
    parser.add_argument("--record", type=Path, metavar="FILE.svg", help="write an animation of it there")
    options, server_options = parser.parse_known_args(argv)
    console = Console()
    state = DemoState(_clients())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with it
    try:
        with (
            console.status("Starting a server"),
            LocalServer("--log-step-composition", *server_options, on_log=state.on_log) as server,
        ):
            frames = asyncio.run(_show(server.url, state, console))
    except (MiniVLLMError, httpx.HTTPError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 1
    if options.record:
        options.record.write_text(render_svg(frames, _TITLE, WIDTH, HEIGHT, _SLOWDOWN), encoding="utf-8")
        console.print(f"{options.record}: {len(frames)} frames, {options.record.stat().st_size / 1024:.0f} KiB")
    return 0


async def _show(url: str, state: DemoState, console: Console) -> list[Frame]:
    frames: list[Frame] = []
    with Live(draw(state), console=console, auto_refresh=False) as live:

        def redraw() -> None:
            screen = draw(state)
            live.update(screen, refresh=True)
            frames.append(capture(state.seconds, screen, WIDTH, HEIGHT))

        await run_clients(url, state, redraw)
    return frames


def _clients() -> tuple[Client, ...]:
    return (
        Client("alice", "#5fafff", "Why is the sky blue?", 70, starts_after=0),
        Client("bob", "#5fd787", "What is the capital of France?", 40, starts_after=12),
        Client("carol", "#ffaf5f", "Write a short poem about the sea.", 48, starts_after=24),
    )


if __name__ == "__main__":
    sys.exit(main())
