"""How long a frontend process needs until it answers, and how much memory it takes."""

import re
import time

import httpx
import psutil

_LISTENING = re.compile(r"\(Frontend pid=(\d+)\).* listening on ")
_RSS = re.compile(r'minivllm:process_rss_bytes\{[^}]*process="frontend-0"[^}]*\} (\S+)')


class ReadyTime:
    """Reads the server's log: seconds from the frontend's start until it listens; None until it does."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def on_log(self, line: str) -> None:
        """One line of the log, at the moment it appears."""
        match = _LISTENING.search(line)
        if match and self.seconds is None:
            self.seconds = time.time() - psutil.Process(int(match[1])).create_time()


async def frontend_rss(http: httpx.AsyncClient) -> int | None:
    """Resident bytes of the first frontend, by /metrics; None where nobody watches the processes."""
    match = _RSS.search((await http.get("/metrics")).text)
    return int(float(match[1])) if match else None
