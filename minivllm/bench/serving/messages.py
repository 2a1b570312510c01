"""What the command and its load processes say to each other: one length-prefixed msgpack array a message.

command  Job ─▶ load process      requests as they go over the wire, and how many may be in flight
         ◀─ Ready                 all bytes are built
         Start ─▶                 one moment for all processes
         ◀─ Progress …            ten times a second
         ◀─ Result                a sample of every request
"""

import asyncio
from typing import TypeVar

import msgspec
from msgspec import Struct

_LENGTH_BYTES = 4


class Message(Struct, frozen=True, array_like=True):
    """Base of all messages."""


class Job(Message, frozen=True, tag=1):
    """Requests to send: whole HTTP requests, and when, in seconds after the start (0: as soon as there is a place)."""

    url: str
    endpoint: str
    payloads: list[bytes]
    offsets: list[float]
    max_concurrency: int
    timeout: float


class Start(Message, frozen=True, tag=2):
    """`time` is on `time.monotonic`, which all processes of a machine share."""

    time: float


class Ready(Message, frozen=True, tag=3):
    """The job is understood."""


class Progress(Message, frozen=True, tag=4):
    """Of this job, so far."""

    num_requests: int
    num_tokens: int


class Sample(Struct, array_like=True):
    """One request. Times in seconds on `time.monotonic`; `event_times`: arrivals of the events that bring output.

    num_output_tokens: as the server's usage says; without usage, what could be counted (`has_usage` tells).
    """

    start: float
    end: float
    event_times: list[float]
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    has_usage: bool = False
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.event_times[0] - self.start

    @property
    def latency(self) -> float:
        """From sending to the last output."""
        return self.event_times[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        if self.num_output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.num_output_tokens - 1)


class Result(Message, frozen=True, tag=5):
    """The samples, in the order of the job's requests."""

    samples: list[Sample]


_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()
to_worker: msgspec.msgpack.Decoder[Job | Start] = msgspec.msgpack.Decoder(Job | Start)
from_worker: msgspec.msgpack.Decoder[Ready | Progress | Result] = msgspec.msgpack.Decoder(Ready | Progress | Result)


def frame(message: Message) -> bytes:
    """`message` as it travels."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def receive(reader: asyncio.StreamReader, decoder: "msgspec.msgpack.Decoder[_T]") -> _T:
    """The next message. Raises `asyncio.IncompleteReadError` at the end of the pipe."""
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
    return decoder.decode(await reader.readexactly(length))
