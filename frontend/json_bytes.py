"""JSON as every answer is written: compact UTF-8, not-a-number as null."""

from typing import Any

import msgspec

_encoder = msgspec.json.Encoder()


def to_json(value: Any) -> bytes:
    """`value` as JSON."""
    return _encoder.encode(value)
