"""Server-sent events as the tests read them."""

import json
from collections.abc import Iterator
from typing import Any


def parse_events(lines: Iterator[str]) -> Iterator[Any]:
    """Server-sent events: objects, and "[DONE]". Comments and blank lines carry nothing."""
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
        else:
            assert line == "" or line.startswith(":"), line
