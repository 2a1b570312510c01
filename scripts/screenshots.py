"""Makes docs/page.png and docs/page-phone.png: the live page on a real server with some traffic.

scripts/screenshots [DIRECTORY]     needs the extra `browser` and a Chromium (apt-get install chromium)
"""

import asyncio
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import sync_playwright

from minivllm.local_server import LocalServer

OPTIONS = ("--num-gpu-blocks-override", "480", "--max-num-seqs", "10")
SYSTEM = 3 * "You are a patient teacher. You explain one thing at a time, with an example from everyday life. "
QUESTIONS = ("What is a comet?", "Why do cats purr?", "How is glass made?", "Why is the sea salty?")
TIMEOUT_MS = 180_000
SHOTS = (("page.png", 1440, 960, "light", False), ("page-phone.png", 375, 812, "dark", True))


async def send_traffic(url: str) -> None:
    """Eight chats that begin alike, so that they share blocks; with them two of three panes run and one waits."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        await http.post("/generate", json=chat(0, 1))  # its prefix is cached now
        await asyncio.gather(*(http.post("/generate", json=chat(index, 90 + 7 * index)) for index in range(8)))


def chat(index: int, max_tokens: int) -> dict[str, Any]:
    """A body for /generate."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}]
    return {"messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "stream": False, "seed": index}


def take(page: Any, path: Path, full_page: bool) -> None:
    """Ask, wait until all three answers stream, and take the picture."""
    page.locator("#engine", has_text="KV blocks").wait_for()
    page.locator("#running", has_text=re.compile("^([89]|10)$")).wait_for()
    page.select_option("#panes", "3")
    page.fill("#question", "Explain how a bicycle stays upright.")
    page.fill("#max-tokens", "100")
    page.fill("#seed", "4")
    page.press("#question", "Enter")
    page.locator(".answer h3", has_text=re.compile("(1[3-9]|[2-9][0-9]) tokens")).nth(1).wait_for()
    page.screenshot(path=str(path), full_page=full_page)


def main(directory: Path) -> None:
    """Write the pictures into `directory`."""
    with LocalServer(*OPTIONS) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width, height, scheme, full_page in SHOTS:
            traffic = threading.Thread(target=lambda: asyncio.run(send_traffic(server.url)))
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_default_timeout(TIMEOUT_MS)
            page.goto(server.url)
            traffic.start()
            take(page, directory / name, full_page)
            page.close()
            traffic.join()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs")
