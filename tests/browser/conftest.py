"""A headless Chromium, and a real server on the default model that is small enough to make requests wait."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e .[browser]")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def small_server(browser: Any, default_model_dir: Path) -> Iterator[ServerProcess]:
    """At most two requests run at once; 60 blocks of 16 tokens."""
    options = ("--max-num-seqs", "2", "--num-gpu-blocks-override", "60", "--enable-debug", "--port", "0")
    with ServerProcess(str(default_model_dir), "--served-model-name", "smol", *options) as server:
        yield server
        server.settle()


@contextmanager
def opened(browser: Any, url: str, width: int = 1440, height: int = 1000, scheme: str = "light") -> Iterator[Any]:
    """A page in a window of that size; whatever the browser complains about fails the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    complaints: list[str] = []
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    try:
        yield page
    finally:
        context.close()
    assert complaints == []
