"""`scripts/soak`: a server under streaming clients whose processes die, stop and lose messages; a table at the end.

scripts/soak                          64 clients, the engine core is killed 20 times
scripts/soak --minutes 30 --all       half an hour of everything: messages lost, swapped or damaged, memory exhausted, …
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from minivllm.errors import MiniVLLMError
from minivllm.local_server import LocalServer
from minivllm.soak import disasters
from minivllm.soak.answers import Answer, make_bodies
from minivllm.soak.disasters import Victim
from minivllm.soak.load import Load, learn
from minivllm.soak.report import Report
from minivllm.soak.run import soak

MESSAGE_FAULTS = "drop=0.01,duplicate=0.01,reorder=0.01,corrupt=0.01"
SLOWNESS = "slow=0.01"  # of a frontend, for each message of the engine core
SHORTAGES = ",".join(f"oom@step:{step}" for step in range(50, 5000, 100))  # in each life of the engine core
# Killed on purpose, it dies more often than a server should survive. Stopped, it is found out after 5 s more than this.
# A frontend that is replaced may finish its streams, however slow the machine is.
SERVER_OPTIONS = (
    *("--enable-debug", "--max-engine-restarts", "1000000"),
    *("--step-timeout", "30", "--shutdown-timeout", "600"),
)
ALL = (
    *(disasters.kill_engine, disasters.stop_engine, disasters.pause_frontend, disasters.replace_frontends),
    *(disasters.crowd_leaves, disasters.nonsense_arrives),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak and print. 0: every answer came, was right, and left nothing behind; 1: not so."""
    options, server_options = _parser().parse_known_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with it
    try:
        bodies = make_bodies(options.requests, options.max_tokens, options.seed)
        with LocalServer(*server_options) as server:
            reference = asyncio.run(learn(server.url, bodies, options.clients))
        with LocalServer(*SERVER_OPTIONS, *_faults(options), *server_options) as server:
            report = asyncio.run(_soak(server, bodies, reference, options))
    except (MiniVLLMError, httpx.HTTPError) as error:
        print(f"soak: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return 1
    print(*report.lines(), sep="\n")
    return 0 if report.is_good else 1


def _faults(options: argparse.Namespace) -> tuple[str, ...]:
    """The server's options for faults that it inflicts on itself."""
    if options.all:
        return "--inject-faults", f"{MESSAGE_FAULTS},{SLOWNESS},{SHORTAGES}"
    return ("--inject-faults", MESSAGE_FAULTS) if options.messages else ()


async def _soak(
    server: LocalServer, bodies: Sequence[dict[str, Any]], reference: Sequence[Answer], options: argparse.Namespace
) -> Report:
    return await soak(
        Load(server.url, bodies, options.clients, reference),
        Victim(server.url, server.process.pid),
        _plan(options),
        options.seed,
        lambda name, seconds: print(f"{name}: recovered after {seconds:.1f} s", file=sys.stderr),
    )


async def _plan(options: argparse.Namespace) -> AsyncIterator[disasters.Disaster]:
    random_, end, count = random.Random(options.seed), time.monotonic() + 60 * (options.minutes or 0), 0
    while (time.monotonic() < end) if options.minutes else (count < options.kills):
        count += 1
        yield random_.choice(ALL) if options.all else disasters.kill_engine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soak",
        usage="%(prog)s [options] [MODEL] [options of minivllm serve]",
        description="Kill a server's processes under streaming clients and compare every answer.",
        allow_abbrev=False,
    )
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="clients at once [64]")
    parser.add_argument("--requests", type=int, default=96, metavar="N", help="different requests they send [96]")
    parser.add_argument("--max-tokens", type=int, default=192, metavar="N", help="longest answer [192]")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often the engine core is killed [20]")
    parser.add_argument("--minutes", type=float, metavar="X", help="go on for so long instead")
    parser.add_argument("--messages", action="store_true", help=f"also inject {MESSAGE_FAULTS}")
    parser.add_argument("--all", action="store_true", help="everything that is known to go wrong")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of requests and moments [0]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
