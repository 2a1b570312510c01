"""What can happen to a server: signals to its processes, clients that do wrong; each ends when it has recovered."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable

import httpx
import psutil

from minivllm.soak.load import Load, wait_for_status

CROWD = 20
NONSENSE = (b"", b"\xff\xfe", b"[" * 100_000, b'{"prompt": [-1]}', b'{"prompt": "x", "top_p": 1e400}', b"x" * 1_000_000)
Disaster = Callable[["Victim", Load], Awaitable[float]]


class Victim:
    """A running server: its processes and its health. pause_seconds: longer than the lease of a frontend."""

    def __init__(self, url: str, launcher_pid: int, pause_seconds: float = 12.0) -> None:
        self.pause_seconds = pause_seconds
        self.http = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(60.0))
        self._launcher = psutil.Process(launcher_pid)

    def engine_core(self) -> psutil.Process:
        return self._children("engine_core")[0]

    def frontends(self) -> list[psutil.Process]:
        return self._children("frontend")

    def signal_launcher(self, number: signal.Signals) -> None:
        self._launcher.send_signal(number)

    def _children(self, module: str) -> list[psutil.Process]:
        return [child for child in self._launcher.children() if _runs(child, module)]


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:  # it has just ended
        return False


async def kill_engine(victim: Victim, load: Load) -> float:
    """SIGKILL. Seconds until a token comes again."""
    return await _until_tokens(victim, load, victim.engine_core().kill)


async def stop_engine(victim: Victim, load: Load) -> float:
    """SIGSTOP, for ever: it must be found out. Seconds until a token comes again."""
    return await _until_tokens(victim, load, victim.engine_core().suspend)


async def pause_frontend(victim: Victim, load: Load) -> float:
    """SIGSTOP for longer than its lease, then SIGCONT. Seconds from then until a token comes again."""
    frontend = random.choice(victim.frontends())
    frontend.suspend()
    await asyncio.sleep(victim.pause_seconds)
    start = time.monotonic()
    frontend.resume()
    return await load.next_event() - start


async def replace_frontends(victim: Victim, load: Load) -> float:
    """A rolling restart (SIGUSR2). Seconds until new processes serve."""
    start, old = time.monotonic(), {process.pid for process in victim.frontends()}
    victim.signal_launcher(signal.SIGUSR2)
    while True:
        if not old & {process.pid for process in victim.frontends()}:
            return time.monotonic() - start
        await asyncio.sleep(0.1)


async def crowd_leaves(victim: Victim, load: Load) -> float:
    """Clients that leave before their first token, with it, or later. Seconds until somebody who stayed gets one."""
    await asyncio.gather(*(_leave(victim.http, num_lines) for num_lines in range(CROWD)))
    start = time.monotonic()
    return await load.next_event() - start


async def nonsense_arrives(victim: Victim, load: Load) -> float:
    """Bodies that are no request; each must be refused. Seconds until somebody else gets a token."""
    for body in NONSENSE:
        status = (await victim.http.post("/generate", content=body)).status_code
        if not 400 <= status < 500:
            load.failed.append(f"{body[:20]!r}… got status {status}")
    start = time.monotonic()
    return await load.next_event() - start


async def _leave(http: httpx.AsyncClient, num_lines: int) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True}
    with contextlib.suppress(httpx.HTTPError):
        async with http.stream("POST", "/generate", json=body) as response:
            async for _ in response.aiter_lines():
                if num_lines == 0:
                    return
                num_lines -= 1


async def _until_tokens(victim: Victim, load: Load, act: Callable[[], None]) -> float:
    start = time.monotonic()
    act()
    await wait_for_status(victim.http, "/health", 503)
    await wait_for_status(victim.http, "/ready", 200)
    return await load.next_event() - start
