"""Frames that no honest process sends: noise, damaged messages, and messages that are whole but mean nonsense."""

import random
import zlib
from typing import Any

import msgpack  # type: ignore[import-untyped]

from minivllm.protocol import PROTOCOL_VERSION

HEAD_BYTES = 6
NONSENSE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**62, 2**63 - 1, 2**64 - 1, -(2**63), 1e308, float("nan"), float("-inf")),
    *(b"", b"8 bytes.", b"\x00" * 300, "", "r" * 400, "\x00", [], [[]], [2**64 - 1] * 50, {}, {"a": -1}),
)


def framed(content: bytes, version: int = PROTOCOL_VERSION) -> bytes:
    """`content` with a head that is right."""
    return bytes((version, 0xCE)) + zlib.crc32(content).to_bytes(4, "big") + content


def hostile_frames(rng: random.Random, honest: list[bytes]) -> list[bytes]:
    """The frames of one ZeroMQ message, mostly one; made of `honest` ones in most cases."""
    frame = rng.choice(honest)
    match rng.randrange(6):
        case 0:
            return [rng.randbytes(rng.randrange(300))]
        case 1:
            return [_damaged(rng, frame)]
        case 2:
            return [framed(_damaged(rng, frame[HEAD_BYTES:]))]
        case 3:
            return [framed(frame[HEAD_BYTES : rng.randrange(HEAD_BYTES, len(frame))] + rng.randbytes(rng.randrange(9)))]
        case 4:
            return [_absurd(rng, frame)]
    return [rng.choice((frame, b"", rng.randbytes(20))) for _ in range(rng.randint(2, 5))]


def _damaged(rng: random.Random, frame: bytes) -> bytes:
    damaged = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def _absurd(rng: random.Random, frame: bytes) -> bytes:
    """A whole message, some of whose values are nonsense."""
    message = msgpack.unpackb(frame[HEAD_BYTES:], strict_map_key=False)
    for _ in range(rng.randint(1, 3)):
        _replace_one(rng, message)
    return framed(msgpack.packb(message))


def _replace_one(rng: random.Random, values: Any) -> None:
    """Somewhere inside `values`, a list or a dictionary."""
    keys = list(values) if isinstance(values, dict) else range(len(values))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(values[key], list | dict) and values[key] and rng.random() < 0.8:
        _replace_one(rng, values[key])
    else:
        values[key] = rng.choice(NONSENSE)
