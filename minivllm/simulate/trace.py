"""Who comes when, and with how much work: Poisson, bursts, all at once, or a JSONL file. Pure data, from a seed.

A line of a file:  {"time": 0.5, "prompt_tokens": 120, "output_tokens": 40, "prefix": 3, "prefix_tokens": 64}
                   seconds from the start; requests of the same prefix share their first prefix_tokens tokens
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from minivllm.errors import StartupError

FILLER_TOKEN = 7  # what prompts and simulated outputs are filled with

Arrivals = Literal["poisson", "burst", "at-once"]
Lengths = Literal["uniform", "lognormal"]


class Arrival(
    Struct,
    frozen=True,
    forbid_unknown_fields=True,
    rename={"num_prompt_tokens": "prompt_tokens", "num_output_tokens": "output_tokens"},
):
    """One request of a trace. `time` in seconds from its start."""

    time: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix: int = 0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not (self.time >= 0 and math.isfinite(self.time)):
            raise ValueError(f"time must be 0 or more, got {self.time}")
        if self.num_prompt_tokens < 1 or self.num_output_tokens < 1:
            raise ValueError(
                f"prompt_tokens and output_tokens must be above 0, got {self.num_prompt_tokens} and "
                f"{self.num_output_tokens}"
            )
        if not 0 <= self.prefix_tokens <= self.num_prompt_tokens:
            raise ValueError(f"prefix_tokens {self.prefix_tokens} of a prompt of {self.num_prompt_tokens}")

    def prompt_token_ids(self, index: int, vocab_size: int) -> list[int]:
        """Its tokens as request number `index`: those of its prefix, then some that no other request has."""
        own = self.num_prompt_tokens - self.prefix_tokens
        return _marked(2 * self.prefix, self.prefix_tokens, vocab_size) + _marked(2 * index + 1, own, vocab_size)


def _marked(number: int, count: int, vocab_size: int) -> list[int]:
    """`count` tokens that begin with `number` in base `vocab_size`; no two numbers give the same block."""
    digits = [number // vocab_size**2 % vocab_size, number // vocab_size % vocab_size, number % vocab_size]
    return (digits[::-1] + [FILLER_TOKEN] * (count - 3))[:count]


@dataclass(frozen=True, slots=True)
class TraceShape:
    """What a random trace looks like. Ranges are (least, most) of `lengths`; rate in requests per second."""

    arrivals: Arrivals = "poisson"
    num_requests: int = 1000
    rate: float = 1.0
    burst_size: int = 32
    lengths: Lengths = "uniform"
    input_lens: tuple[int, int] = (20, 200)
    output_lens: tuple[int, int] = (64, 128)
    num_prefixes: int = 1
    prefix_tokens: int = 0
    seed: int = 0

    def at_rate(self, rate: float) -> "TraceShape":
        """The same requests, faster or slower."""
        return replace(self, rate=rate)


def make_trace(shape: TraceShape) -> list[Arrival]:
    """The same shape gives the same trace, and another rate the same requests at other times."""
    source = random.Random(shape.seed)
    trace = []
    for time in _times(shape, random.Random(shape.seed + 1)):
        own, output = (
            _length(source, shape.lengths, shape.input_lens),
            _length(source, shape.lengths, shape.output_lens),
        )
        prefix = source.randrange(shape.num_prefixes)
        trace.append(Arrival(time, own + shape.prefix_tokens, output, prefix, shape.prefix_tokens))
    return trace


def read_trace(path: Path) -> list[Arrival]:
    """A JSONL file, in the order of time. Raises `StartupError` naming the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StartupError(f"--trace {path}: {error.strerror}") from error
    trace = [_read_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not trace:
        raise StartupError(f"--trace {path}: no request in it")
    return sorted(trace, key=lambda arrival: arrival.time)


def _read_line(path: Path, number: int, line: bytes) -> Arrival:
    try:
        return msgspec.json.decode(line, type=Arrival)
    except msgspec.MsgspecError as error:
        raise StartupError(f"--trace {path}, line {number}: {error}") from error


def _times(shape: TraceShape, source: random.Random) -> Iterator[float]:
    time = 0.0
    for index in range(shape.num_requests):
        yield time
        if shape.arrivals == "poisson":
            time += source.expovariate(1.0) / shape.rate
        elif shape.arrivals == "burst" and (index + 1) % shape.burst_size == 0:
            time += shape.burst_size / shape.rate


def _length(source: random.Random, lengths: Lengths, limits: tuple[int, int]) -> int:
    """Log-normal: the limits are two standard deviations around the median, and nothing is beyond them."""
    low, high = limits
    if lengths == "uniform":
        return source.randint(low, high)
    middle, spread = math.log(low * high) / 2, math.log(high / low) / 4
    return min(high, max(low, round(source.lognormvariate(middle, spread))))
