"""The wire format: what is said arrives, any msgpack library reads it, and garbage is only a `ProtocolError`."""

import zlib
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import protocol
from minivllm.engine_view import BlockMap, Preemption, RequestTimeline
from minivllm.errors import ProtocolError
from minivllm.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Add,
    ChannelState,
    Dead,
    EngineFacts,
    EngineMessage,
    EngineStats,
    Error,
    Explain,
    Explained,
    Finished,
    FrontendMessage,
    Hello,
    Histogram,
    Logprobs,
    Outputs,
    Ping,
    Ready,
    Released,
    Stats,
    View,
    Watch,
    decode_from_engine,
    decode_from_frontend,
    encode,
)
from minivllm.sampling_params import SamplingParams
from tests.support import views
from tests.support.hostile_frames import framed

FRONTEND = b"front-01"
PARAMS = SamplingParams(
    temperature=0.5,
    top_k=7,
    logit_bias={3: -1.5},
    seed=-(2**63),
    stop=("\n", "é"),
    stop_token_ids=(1, 2),
    max_tokens=None,
)
FACTS = EngineFacts(1, "m", "cpu", "float32", 320, 256, 4, 16, 40, 512, 10**12, [2])
TIMELINE = RequestTimeline(
    request_id="a", status="waiting", age=1.5, num_prompt_tokens=3, num_output_tokens=0, max_total_tokens=9,
    num_cached_tokens=0, waiting_for="rows", waited={"rows": 1.5}, preemptions=[Preemption(0.5, 4, None)],
)  # fmt: skip
VIEW = views.view(
    3.0,
    [views.prefill(1, 2.0, 7, 0, 5), views.decode(2, 2.5, None, finished={7: "stop"})],
    [views.row(7, "r")],
)
FRONTEND_MESSAGES: list[FrontendMessage] = [
    Hello(FRONTEND),
    Add(FRONTEND, 1, "request-é", [0, 1, 2**31 - 1], PARAMS, [5]),
    Add(FRONTEND, 2, "r" * 256, [1] * 5000, SamplingParams()),
    Abort(FRONTEND, 3, ["a", "b"]),
    Ping(FRONTEND, ChannelState(2**40, 3, 1)),
    Watch(FRONTEND, at_once=True),
    Explain(FRONTEND, "a"),
]
ENGINE_MESSAGES: list[EngineMessage] = [
    Ready(2**62, FACTS),
    Outputs(1, 1, ["a", "b", "c"], [2, 0, 1], [7, 8, 9], {"b": Finished("abort"), "c": Finished("stop", 9, 4, 0.1)}),
    Outputs(1, 2, [], [], []),
    Outputs(
        1,
        3,
        ["a", "b"],
        [2, 0],
        [7, 8],
        {},
        {"a": Logprobs([-0.5, -1.5], [7, 1, 9, 2], [-0.5, -2.0, -1.0, -3.0])},
        {"b": Logprobs([-9999.0], [], [], 4)},
    ),
    Error(1, 3, "a", "invalid_request", "max_tokens is 9 …", "max_tokens"),
    Stats(1, ChannelState(4), EngineStats(num_requests_running=2, histograms={"h": Histogram([1.0], [2, 3], 4.5)})),
    Dead(1, "stopped"),
    Released(1, 5, ["a"]),
    View(1, VIEW),
    Explained(1, "a", None),
    Explained(1, "a", TIMELINE),
]
COLUMNS_THAT_DO_NOT_FIT = (
    lambda: views.prefill(1, 2.0, 7, 0, 5, counts=[]),
    lambda: views.decode(1, 2.0, [7], starts=[3]),
    lambda: BlockMap(8, 1, [8], [0], [], 0, 0, 8),
)
FRAMES = [bytes(encode(message)) for message in (*FRONTEND_MESSAGES, *ENGINE_MESSAGES)]


def test_columns_of_log_probabilities_are_cut_and_joined() -> None:
    columns = Logprobs([-1.0, -2.0, -3.0], [1, 2, 3, 4, 5, 6], [-1.0, -1.5, -2.0, -2.5, -3.0, -3.5], 7)
    tail = columns.cut(1, 3)
    assert tail == Logprobs([-2.0, -3.0], [3, 4, 5, 6], [-2.0, -2.5, -3.0, -3.5], 8)
    head = columns.cut(0, 1)
    head.extend(tail)
    assert head == columns
    assert (columns.num_top, Logprobs().num_top, Logprobs([-1.0]).num_top) == (2, 0, 0)


def raw(*elements: Any, version: int = PROTOCOL_VERSION) -> bytes:
    """A frame with any content."""
    return framed(msgpack.packb(list(elements)), version)


def decode_both(frame: bytes) -> list[FrontendMessage | EngineMessage]:
    """What each side makes of `frame`; nothing but a `ProtocolError` may come out."""
    decoded: list[FrontendMessage | EngineMessage] = []
    for decode in (decode_from_frontend, decode_from_engine):
        try:
            decoded.append(decode(frame))
        except ProtocolError:
            continue
    return decoded


@pytest.mark.parametrize("message", FRONTEND_MESSAGES, ids=lambda message: type(message).__name__)
def test_frontend_messages_survive_the_wire(message: FrontendMessage) -> None:
    frame = bytes(encode(message))
    assert decode_from_frontend(frame) == message
    assert decode_from_frontend(memoryview(frame)) == message
    with pytest.raises(ProtocolError):
        decode_from_engine(frame)


@pytest.mark.parametrize("message", ENGINE_MESSAGES, ids=lambda message: type(message).__name__)
def test_engine_messages_survive_the_wire(message: EngineMessage) -> None:
    frame = bytes(encode(message))
    assert decode_from_engine(frame) == message
    with pytest.raises(ProtocolError):
        decode_from_frontend(frame)


@pytest.mark.parametrize("make", COLUMNS_THAT_DO_NOT_FIT)
def test_columns_of_a_view_must_fit_together(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="columns"):
        make()


def test_any_msgpack_library_can_read_a_frame() -> None:
    unpacker = msgpack.Unpacker()
    unpacker.feed(bytes(encode(Abort(FRONTEND, 3, ["a", "b"]))))
    version, checksum, fields = unpacker
    assert (version, fields) == (PROTOCOL_VERSION, [3, FRONTEND, 3, ["a", "b"]])
    assert checksum == zlib.crc32(msgpack.packb(fields))
    unpacker.feed(bytes(encode(ENGINE_MESSAGES[1])))
    version, _, fields = unpacker
    assert version == PROTOCOL_VERSION
    assert fields[:6] == [17, 1, 1, ["a", "b", "c"], [2, 0, 1], [7, 8, 9]]


def test_any_msgpack_library_can_write_a_frame() -> None:
    assert decode_from_frontend(raw(4, FRONTEND, [9, 8, 0])) == Ping(FRONTEND, ChannelState(9, 8))
    assert decode_from_frontend(raw(2, FRONTEND, 0, "a", [1], [])) == Add(FRONTEND, 0, "a", [1], SamplingParams())


def test_another_version_is_named() -> None:
    with pytest.raises(ProtocolError, match=r"protocol version 1, but this process speaks version 3"):
        decode_from_frontend(raw(4, FRONTEND, [0, 0, 0], version=1))


def test_a_frame_damaged_on_its_way_is_named() -> None:
    frame = bytearray(encode(Outputs(1, 1, ["a"], [1], [7])))
    frame[-2] ^= 1  # the token id: without a checksum this would be another message
    with pytest.raises(ProtocolError, match=f"a frame of {len(frame)} bytes was damaged on its way"):
        decode_from_engine(bytes(frame))


@pytest.mark.parametrize("frame", [b"", b"\x01", b"\x03\xce\x00\x00\x00\x00"])
def test_short_frames_are_named(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"a frame of {len(frame)} bytes is too short"):
        decode_from_frontend(frame)


@pytest.mark.parametrize(
    "frame",
    [
        raw(99, FRONTEND, 0),
        raw("1", FRONTEND, 0),
        raw(),
        raw(1),
        raw(1, b"short"),
        raw(1, FRONTEND + b"x"),
        raw(1, "front-01"),
        raw(1, FRONTEND, "extra"),
        raw(3, FRONTEND, -1, []),
        raw(3, FRONTEND, 0.5, []),
        raw(4, FRONTEND, 0),
        raw(4, FRONTEND, [0, -1, 0]),
        raw(4, FRONTEND, [0, 0, 0, 0]),
        raw(4, FRONTEND, [0, 0, 2**62 + 1]),
        raw(2, FRONTEND, 0, "", [1], []),
        raw(2, FRONTEND, 0, "r" * 301, [1], []),
        raw(2, FRONTEND, 0, "a", [], []),
        raw(2, FRONTEND, 0, "a", [-1], []),
        raw(2, FRONTEND, 0, "a", [2**31], []),
        raw(2, FRONTEND, 0, "a", ["1"], []),
        raw(2, FRONTEND, 0, "a", [1], [-1.0]),
        raw(2, FRONTEND, 0, "a", [1], [float("nan")]),
        raw(2, FRONTEND, 0, "a", [1], [1.0, 2**64 - 1]),
        raw(2, FRONTEND, 0, "a", [1], {"temperature": 1.0}),
        raw(2, FRONTEND, 0, "a", [1], [], [[]]),
        raw(3, FRONTEND, 0, "abc"),
        raw(3, FRONTEND, 0, [None]),
        raw(17, 0, 0, ["a"], [2], [1], {}),
        raw(17, 0, 0, ["a"], [], [], {}),
        raw(17, 0, 0, ["a"], [-1], [], {}),
        raw(17, 0, 0, ["a"], [0], [], {"a": ["tired"]}),
        raw(17, 0, 0, ["a"], [0], [], {"a": ["stop", 1, -1]}),
        raw(17, 0, 0, ["a"], [1], [5], {}, {"a": [[-0.5, -0.5], [], []]}),
        raw(17, 0, 0, ["a"], [1], [5], {}, {"b": [[-0.5], [], []]}),
        raw(17, 0, 0, ["a"], [1], [5], {}, {"a": [[-0.5], [1], []]}),
        raw(17, 0, 0, ["a"], [2], [5, 6], {}, {"a": [[-0.5, -0.5], [1], [-0.5]]}),
        raw(17, 0, 0, ["a"], [0], [], {}, {}, {"a": [[-0.5], [], [], -1]}),
        framed(b"\xdd\xff\xff\xff\xff"),
        framed(b"\x94\x03\xc4\x08front-01\x00\xdd\xff\xff\xff\xff\xa1a"),
        framed(b"\x94\x03\xc6\xff\xff\xff\xfffront-01"),
        framed(b"\x91" * 100_000),
        framed(b"\x93\x13\x00\x90" + b"\x81\xa1a" * 100_000),
        framed(msgpack.packb([16, 0, [1, "m", "cpu", "f", 1, 1, 1, 1, 1, 1, 1, []]])[:-1] + b"\x91" * 9999),
    ],
)
def test_hostile_frames_are_protocol_errors(frame: bytes) -> None:
    assert decode_both(frame) == []


def test_deep_nesting_in_a_field_that_is_skipped_is_a_protocol_error() -> None:
    facts = list(msgspec.structs.astuple(FACTS))
    content = msgpack.packb([16, 0, [*facts, "@"]])
    at = content.rindex(b"\xa1@")
    with pytest.raises(ProtocolError, match="not a message"):
        decode_from_engine(framed(content[:at] + b"\x91" * 200_000 + b"\x01" + content[at + 2 :]))


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: f"{len(frame)} bytes")
def test_every_truncation_is_a_protocol_error(frame: bytes) -> None:
    for end in range(0, len(frame), max(1, len(frame) // 200)):
        assert decode_both(frame[:end]) == []


def test_trailing_bytes_are_a_protocol_error() -> None:
    for frame in FRAMES:
        assert decode_both(frame + b"\x01") == []


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_only_raise_protocol_errors(content: bytes) -> None:
    for frame in (content, framed(content)):
        for message in decode_both(frame):
            assert isinstance(message, protocol.Message)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(FRAMES), st.data())
def test_mutated_frames_only_raise_protocol_errors(frame: bytes, data: st.DataObject) -> None:
    mutated = bytearray(frame[6:])
    for _ in range(data.draw(st.integers(1, 4), "mutations")):
        at = data.draw(st.integers(0, min(len(mutated), 120) - 1), "position")
        mutated[at] = data.draw(st.integers(0, 255), "byte")
    for message in decode_both(framed(bytes(mutated))):
        assert decode_both(bytes(encode(message))) == [message] or message != message  # noqa: PLR0124 - NaN


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 21), st.lists(values, max_size=7))
def test_well_formed_nonsense_only_raises_protocol_errors(tag: int, fields: list[Any]) -> None:
    for message in decode_both(raw(tag, *fields)):
        assert isinstance(message, protocol.Message)
