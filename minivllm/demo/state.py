"""What the demo knows of its clients and of the engine's steps."""

import re
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

_STEP = re.compile(r"\] (?P<kind>prefill|decode) of (?P<num_tokens>\d+) tokens: (?P<parts>.*)")
_PART = re.compile(r"(\S+)\[(\d+):(\d+)\]")
SHOWN_STEPS = 200


@dataclass
class Client:
    """One client: asks `question` once the first client has `starts_after` tokens."""

    name: str
    color: str
    question: str
    max_tokens: int
    starts_after: int
    text: str = ""
    num_tokens: int = 0
    started: bool = False
    finish_reason: str | None = None


class Part(NamedTuple):
    """What one request had in a step: its tokens from `start` up to `end`."""

    name: str
    start: int
    end: int


class Step(NamedTuple):
    """One step of the engine, as its log tells."""

    number: int
    kind: str
    parts: tuple[Part, ...]


@dataclass
class DemoState:
    """Everything on the screen. `seconds`: since the first request was sent."""

    clients: tuple[Client, ...]
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=SHOWN_STEPS))
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(client.num_tokens for client in self.clients)

    def on_log(self, line: str) -> None:
        """A line of the server's log, at the moment it appears; only steps of known clients count."""
        match = _STEP.search(line)
        if match is None:
            return
        names = {client.name for client in self.clients}
        parts = tuple(Part(name, int(start), int(end)) for name, start, end in _PART.findall(match["parts"]))
        if parts and all(part.name in names for part in parts):
            self.num_steps += 1
            self.steps.append(Step(self.num_steps, match["kind"], parts))
