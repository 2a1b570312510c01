"""What start-up shows: plain lines in a log, a line that comes and goes on a terminal."""

import io
import os

from minivllm.process_facts import process_facts
from minivllm.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_each_once() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for text in ("loading", "loading", "sizing"):
            progress.update(text)
        progress.pause()
    assert stream.getvalue() == "loading\nsizing\n"


def test_spinner_on_a_terminal_shows_again_after_a_pause() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        progress.update("loading")
        progress.pause()
        assert "loading" in stream.getvalue()
        progress.update("sizing")
    assert "sizing" in stream.getvalue()


def test_facts_of_processes_that_live() -> None:
    facts = process_facts({"gone": 2**22 + 1})  # above the largest process id
    assert [fact["name"] for fact in facts] == ["launcher"]
    assert facts[0]["pid"] == os.getpid()
    assert facts[0]["rss"] > 1_000_000
