"""Nothing lost, nothing twice, in order: one end of the numbered messages between a frontend and the engine core.

sender    0  1  2  3  4 ─▶             kept until confirmed
receiver  0  1  ·  3  4                delivers 0 1, holds 3 4 back, says: received 2, missing 1
sender          2 ─▶                   delivers 2 3 4

Both ends tell their `ChannelState` in the heartbeats that flow anyway (Ping and Stats), and at once when they notice a
gap. So the last message of a burst is missed after a heartbeat at most, and a lost answer is asked for again.
"""

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Generic, TypeVar

from minivllm.errors import ProtocolError
from minivllm.protocol import ChannelState, Message, encode

MAX_EARLY = 4096  # messages held back behind a gap; more are left to be sent again

M = TypeVar("M")


class Channel(Generic[M]):
    """One end. `M` is what this end receives. Memory: what the other end has not confirmed for a heartbeat."""

    def __init__(self) -> None:
        self._num_sent = 0
        self._unconfirmed: deque[bytearray] = deque()
        self._num_received = 0
        self._num_announced = 0  # what the other end is known to have sent
        self._early: dict[int, M] = {}
        self._asked_at = -1

    @property
    def num_missing(self) -> int:
        """Messages known to be missing before the next one that is here."""
        return min(self._early, default=self._num_announced) - self._num_received

    @property
    def state(self) -> ChannelState:
        """What to tell the other end."""
        return ChannelState(self._num_sent, self._num_received, self.num_missing)

    def send(self, make: Callable[[int], Message]) -> bytearray:
        """The frame of `make(seq)`, the next numbered message."""
        frame = encode(make(self._num_sent))
        self._num_sent += 1
        self._unconfirmed.append(frame)
        return frame

    def receive(self, seq: int, message: M) -> list[M]:
        """What can be handled now that `message` is here; nothing after a gap, or when it was here before."""
        self._num_announced = max(self._num_announced, seq + 1)
        if seq < self._num_received or (seq > self._num_received and len(self._early) >= MAX_EARLY):
            return []
        self._early[seq] = message
        ready = []
        while self._num_received in self._early:
            ready.append(self._early.pop(self._num_received))
            self._num_received += 1
        return ready

    def update(self, state: ChannelState) -> list[bytearray]:
        """Take note of the other end's state: the frames to send it again. Raises `ProtocolError`."""
        if state.num_received > self._num_sent:
            raise ProtocolError(f"{state.num_received} messages confirmed, but {self._num_sent} were sent")
        self._num_announced = max(self._num_announced, state.num_sent)
        while self._num_sent - len(self._unconfirmed) < state.num_received:
            self._unconfirmed.popleft()
        start = state.num_received - (self._num_sent - len(self._unconfirmed))
        if start < 0:  # an old state, overtaken by a newer one
            return []
        return list(islice(self._unconfirmed, start, start + state.num_missing))

    def notices_gap(self) -> bool:
        """Whether a message is missing that was not missed before: true once per gap, when it is time to ask."""
        if self.num_missing <= 0 or self._asked_at == self._num_received:
            return False
        self._asked_at = self._num_received
        return True
