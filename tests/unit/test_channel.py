"""Two ends of a channel over a line that loses, repeats, swaps and damages: everything arrives once and in order."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.channel import MAX_EARLY, Channel
from minivllm.errors import ProtocolError
from minivllm.faults import Faults, Frames
from minivllm.protocol import Abort, ChannelState, decode_from_frontend

FRONTEND = b"frontend"
NUM_MESSAGES = 60


def send(channel: Channel[Abort], text: str) -> bytes:
    return bytes(channel.send(lambda seq: Abort(FRONTEND, seq, [text])))


def texts(messages: list[Abort]) -> list[str]:
    return [message.request_ids[0] for message in messages]


class Receiver:
    """The other end, which takes frames as they come."""

    def __init__(self) -> None:
        self.channel: Channel[Abort] = Channel()
        self.texts: list[str] = []

    def take(self, frames: Frames) -> None:
        try:
            message = decode_from_frontend(bytes(frames[-1]))
        except ProtocolError:
            return
        assert isinstance(message, Abort)
        self.texts += texts(self.channel.receive(message.seq, message))


def test_order_is_kept_over_a_gap() -> None:
    sender, receiver = Channel[Abort](), Receiver()
    frames = [send(sender, str(i)) for i in range(4)]
    for i in (0, 2, 3):
        receiver.take((frames[i],))
    assert receiver.texts == ["0"]
    assert receiver.channel.state == ChannelState(0, 1, 1)
    assert receiver.channel.notices_gap()
    assert not receiver.channel.notices_gap(), "once is enough"
    assert sender.update(receiver.channel.state) == [frames[1]]
    receiver.take((frames[1],))
    receiver.take((frames[1],))
    assert receiver.texts == ["0", "1", "2", "3"]
    assert receiver.channel.state == ChannelState(0, 4, 0)


def test_the_last_message_is_missed_once_the_other_end_tells_how_many_there_are() -> None:
    sender, receiver = Channel[Abort](), Receiver()
    frame = send(sender, "last")
    assert receiver.channel.num_missing == 0
    receiver.channel.update(sender.state)
    assert receiver.channel.notices_gap()
    assert sender.update(receiver.channel.state) == [frame]


def test_what_is_confirmed_is_not_kept() -> None:
    sender = Channel[Abort]()
    for i in range(5):
        send(sender, str(i))
    sender.update(ChannelState(0, 3, 0))
    assert len(sender._unconfirmed) == 2
    assert sender.update(ChannelState(0, 1, 2)) == [], "an old state that was overtaken"


def test_more_confirmed_than_sent_is_refused() -> None:
    with pytest.raises(ProtocolError, match="5 messages confirmed, but 0 were sent"):
        Channel[Abort]().update(ChannelState(0, 5, 0))


def test_memory_behind_a_gap_is_bounded() -> None:
    sender, receiver = Channel[Abort](), Receiver()
    frames = [send(sender, str(i)) for i in range(MAX_EARLY + 10)]
    for frame in frames[1:]:
        receiver.take((frame,))
    assert len(receiver.channel._early) == MAX_EARLY
    while receiver.channel.state.num_received < len(frames):
        receiver.channel.update(sender.state)
        for again in sender.update(receiver.channel.state):
            receiver.take((again,))
    assert receiver.texts == [str(i) for i in range(len(frames))]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.01, 0.1, 0.4]))
def test_everything_arrives_once_and_in_order(seed: int, rate: float) -> None:
    faults = Faults(drop=rate, duplicate=rate, reorder=rate, corrupt=rate, seed=seed)
    sender, receiver, random_ = Channel[Abort](), Receiver(), random.Random(seed)
    transmit = faults.disturb_sends(receiver.take)
    for i in range(NUM_MESSAGES):
        transmit((send(sender, str(i)),))
        if random_.random() < 0.2 or i == NUM_MESSAGES - 1:
            receiver.channel.update(sender.state)
            for frame in sender.update(receiver.channel.state):
                transmit((frame,))
    for _ in range(1000):
        if receiver.channel.state.num_received == NUM_MESSAGES:
            break
        for frame in sender.update(receiver.channel.state):
            transmit((frame,))
    assert receiver.texts == [str(i) for i in range(NUM_MESSAGES)]
    sender.update(receiver.channel.state)
    assert not sender._unconfirmed
