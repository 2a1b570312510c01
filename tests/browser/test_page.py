"""The live page in a real browser on a real engine: it streams, it moves, it explains, and it fits the window."""

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import opened
from tests.support.fake_engine import FakeEngine
from tests.support.server import ServerProcess
from tests.unit.frontend.running import RunningFrontend

PAINTED = """id => {
    const canvas = document.getElementById(id);
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return new Set(new Uint32Array(pixels.buffer)).size;
}"""


NUM_PIXELS = """color => {
    const canvas = document.getElementById('blocks');
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const [red, green, blue] = color.match(/\\d+/g).map(Number);
    let count = 0;
    for (let i = 0; i < pixels.length; i += 4)
        count += pixels[i] === red && pixels[i + 1] === green && pixels[i + 2] === blue && pixels[i + 3] === 255;
    return count;
}"""


def wait_for(page: Any, selector: str, pattern: str, index: int = 0) -> None:
    """Until one more than `index` elements show a text that `pattern` matches. (Not by eval: the page forbids it.)"""
    page.locator(selector, has_text=re.compile(pattern)).nth(index).wait_for()


def ask(page: Any, num_panes: int, max_tokens: int) -> None:
    wait_for(page, "#engine", "KV blocks")
    page.select_option("#panes", str(num_panes))
    page.fill("#max-tokens", str(max_tokens))
    page.fill("#temperature", "0")
    page.press("#question", "Enter")


def wait_until(page: Any, condition: Callable[[], bool]) -> None:
    """Until `condition()`: a map of the blocks comes only now and then."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        page.wait_for_timeout(50)


def painted(page: Any, color: str) -> int:
    """How much of the map has exactly that colour."""
    count: int = page.evaluate(NUM_PIXELS, color)
    return count


def wait_until_answered(page: Any) -> None:
    page.wait_for_selector("#send:enabled")


def fits(page: Any) -> bool:
    fits: bool = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    return fits


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (375, "dark")])
def test_answers_stream_while_the_engine_is_seen_at_work(
    width: int, scheme: str, browser: Any, small_server: ServerProcess
) -> None:
    with opened(browser, small_server.url, width, scheme=scheme) as page:
        wait_for(page, "#engine", "KV blocks")
        colors_before = page.evaluate(PAINTED, "blocks") if page.evaluate("blocks.height > 0") else 0
        ask(page, 2, 24)
        page.wait_for_selector("#batch button")
        wait_for(page, "#running", "^2$")
        wait_for(page, "#blocks-numbers", "^[1-9][0-9]* used")
        assert page.evaluate(PAINTED, "blocks") > colors_before
        assert page.evaluate(PAINTED, "timeline") > 3
        assert fits(page)
        wait_until_answered(page)
        answers = page.locator(".answer")
        assert answers.count() == 2
        assert [answers.nth(index).locator("h3 span").inner_text() for index in range(2)] == ["24 tokens · length"] * 2
        texts = [answers.nth(index).locator(".text").inner_text() for index in range(2)]
        assert texts[0] == texts[1] != ""  # greedy
        wait_for(page, "#blocks-numbers", "^0 used")
        wait_for(page, "#requests tr.finished", "length", 1)
        assert fits(page)


def test_pause_and_step_through_the_passes(browser: Any, small_server: ServerProcess) -> None:
    with opened(browser, small_server.url) as page:
        ask(page, 1, 20)
        wait_until_answered(page)
        page.click("#pause")
        number = int(page.inner_text("#moment").removeprefix("pass "))
        page.click("#back")
        page.keyboard.press("Tab")  # off the buttons
        assert page.inner_text("#moment") == f"pass {number - 1}"
        while not page.is_visible("#pass-kind.prefill"):
            page.click("#back")  # disabled, which fails, once there is none before
            page.wait_for_timeout(100)  # until it is drawn
        assert "[0:" in page.inner_text("#batch") or "[32:" in page.inner_text("#batch")
        page.click("#forward")
        page.wait_for_selector("#pass-kind.decode")
        page.click("#pause")
        assert page.inner_text("#moment") == "live"


def test_a_request_tells_why_it_waited(browser: Any, small_server: ServerProcess) -> None:
    with opened(browser, small_server.url) as page:
        ask(page, 3, 16)  # one more than may run
        wait_for(page, "#waiting", "^1$")
        page.wait_for_selector("#queue button")
        wait_until_answered(page)
        wait_for(page, "#requests tr.finished", "length", 2)
        page.locator("#requests button").first.click()
        wait_for(page, "#detail-why", "for a row")
        assert "ends: length, 16 tokens" in page.inner_text("#detail-events")
        page.keyboard.press("Escape")
        assert not page.is_visible("#detail")


def test_the_blocks_of_a_chosen_request_stand_out(browser: Any, small_server: ServerProcess) -> None:
    with opened(browser, small_server.url) as page:
        ask(page, 1, 1)  # its prompt is cached now
        wait_until_answered(page)
        ask(page, 2, 300)  # both share it
        wait_for(page, "#running", "^2$")
        page.wait_for_selector("#batch button")
        chips = page.locator("#batch button")
        colors = [chips.nth(index).evaluate("chip => getComputedStyle(chip).borderLeftColor") for index in range(2)]
        chips.nth(0).click()
        wait_for(page, "#blocks-chosen", "holds [1-9][0-9]* blocks")
        assert page.locator("#requests tr.chosen").count() == 1
        wait_until(page, lambda: painted(page, colors[0]) > 0 == painted(page, colors[1]))
        before = painted(page, colors[0])
        chips.nth(1).click()
        wait_for(page, "#blocks-chosen", "holds [1-9][0-9]* blocks")
        # What they share has the colour of the first.
        wait_until(page, lambda: painted(page, colors[1]) > 0 and before > painted(page, colors[0]) > 0)
        page.keyboard.press("Escape")
        page.locator("#blocks-chosen:empty").wait_for(state="attached")
        assert page.locator("#requests tr.chosen").count() == 0
        page.click("#stop")
        wait_until_answered(page)
    small_server.settle()


def test_stop_ends_the_streams_and_frees_the_blocks(browser: Any, small_server: ServerProcess) -> None:
    with opened(browser, small_server.url) as page:
        ask(page, 2, 400)
        wait_for(page, ".answer .text", "[a-z]")
        page.click("#stop")
        wait_until_answered(page)
        assert page.inner_text(".answer h3 span").endswith("stopped")
        wait_for(page, "#running", "^0$")
    small_server.settle()


def test_errors_of_the_server_are_shown(browser: Any, small_server: ServerProcess) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(small_server.url)
    ask(page, 1, 4000)  # more than the context holds
    page.wait_for_selector(".text.bad")
    assert "max_tokens" in page.inner_text(".text.bad")
    context.close()


def test_a_server_with_a_key_asks_for_it(browser: Any, default_model_dir: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mv-") as directory,
        FakeEngine(Path(directory), vocab_size=49152) as engine,
        RunningFrontend(Path(directory), default_model_dir, api_key="secret") as frontend,
    ):
        context = browser.new_context()
        page = context.new_page()
        page.goto(str(frontend.http.base_url))
        page.wait_for_selector("#login[open]")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        wait_for(page, "#engine", "KV blocks")
        engine.wait_for(lambda: engine.num_watches)
        assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
        context.close()
