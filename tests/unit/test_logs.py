"""Log lines say which process they are from, in text and in JSON."""

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator

import pytest

from minivllm.logs import setup_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_text_line() -> None:
    stream = io.StringIO()
    setup_logging("EngineCore", "text", stream)
    logging.getLogger("x").info("ready with %d blocks", 3)
    pattern = (
        rf"\(EngineCore pid={os.getpid()}\) INFO \d\d-\d\d \d\d:\d\d:\d\d \[test_logs.py:\d+\] ready with 3 blocks\n"
    )
    assert re.fullmatch(pattern, stream.getvalue())


def test_every_line_of_a_traceback_is_marked() -> None:
    stream = io.StringIO()
    setup_logging("Frontend", "text", stream)
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        logging.getLogger("x").exception("it failed")
    lines = stream.getvalue().splitlines()
    assert len(lines) > 4
    assert all(line.startswith(f"(Frontend pid={os.getpid()}) ") for line in lines)


def test_json_lines() -> None:
    stream = io.StringIO()
    setup_logging("EngineCore", "json", stream)
    logging.getLogger("x").warning("two\nlines")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("x").exception("it failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "two\nlines"
    assert (first["level"], first["process"], first["pid"]) == ("WARNING", "EngineCore", os.getpid())
    assert "ValueError: bad" in second["exception"]


def test_colour_only_on_a_terminal_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    red = "\033[31m"
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        setup_logging("X", "text", stream)
        logging.getLogger("x").error("bad")
        assert (red in stream.getvalue()) is expected
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    setup_logging("X", "text", stream)
    logging.getLogger("x").error("bad")
    assert red not in stream.getvalue()


def test_warnings_are_logged_and_setup_twice_logs_once() -> None:
    stream = io.StringIO()
    setup_logging("X", "text", stream)
    setup_logging("X", "text", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("odd", UserWarning, stacklevel=1)
    assert stream.getvalue().count("UserWarning: odd") == 1
