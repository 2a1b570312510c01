"""One log format for every process, so that lines of several processes on one terminal can be told apart."""

import json
import logging
import os
import sys
from typing import Any, Literal, TextIO

_COLOURS = {"DEBUG": "\033[2m", "WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[1;31m"}
_RESET = "\033[0m"
_WIPE_LINE = "\r\033[K"  # on a terminal the launcher's spinner may stand on this line


def setup_logging(
    process_name: str, log_format: Literal["text", "json"] = "text", stream: TextIO | None = None
) -> None:
    """Send every log record and warning of this process to `stream` (stderr), marked with its name and pid."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    colour = stream.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(
        _JsonFormatter(process_name) if log_format == "json" else _TextFormatter(process_name, stream.isatty(), colour)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for name in ("httpx", "httpcore", "filelock"):  # a line per HTTP request of a download helps nobody
        logging.getLogger(name).setLevel(logging.WARNING)


class _TextFormatter(logging.Formatter):
    """`(EngineCore pid=7) INFO 11-23 21:04:05 [engine.py:12] text`, the mark on each line of a traceback too."""

    def __init__(self, process_name: str, wipe: bool, colour: bool) -> None:
        super().__init__("%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s", "%m-%d %H:%M:%S")
        self._mark = f"{_WIPE_LINE if wipe else ''}({process_name} pid={os.getpid()}) "
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        colour = _COLOURS.get(record.levelname, "") if self._colour else ""
        reset = _RESET if colour else ""
        return "\n".join(f"{self._mark}{colour}{line}{reset}" for line in super().format(record).splitlines())


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, process, pid, file, line, message, and exception where there is one."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "process": self._process_name,
            "pid": os.getpid(),
            "file": record.filename,
            "line": record.lineno,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
