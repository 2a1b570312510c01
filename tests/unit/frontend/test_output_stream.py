"""The mailbox merges what waits, wakes its reader, and delivers before it fails."""

import asyncio

import pytest

from frontend.output_stream import Chunk, OutputStream
from minivllm.errors import GenerationError
from minivllm.protocol import Finished


async def scenario_merge() -> None:
    stream = OutputStream()
    stream.put("a", [1])
    stream.put("b", [2, 3])
    assert await stream.get() == Chunk("ab", [1, 2, 3])
    stream.put("c", [4], Finished("stop"))
    assert await stream.get() == Chunk("c", [4], Finished("stop"))
    assert stream.closed


async def scenario_wake() -> None:
    stream = OutputStream()
    reader = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    assert not reader.done()
    stream.put("a", [1])
    assert await reader == Chunk("a", [1])


async def scenario_nudge() -> None:
    stream = OutputStream()
    stream.nudge()
    assert await stream.get() is None
    stream.nudge()
    stream.put("a", [1])
    assert await stream.get() == Chunk("a", [1])


async def scenario_fail() -> None:
    stream = OutputStream()
    stream.put("a", [1])
    stream.fail(GenerationError("broken"))
    assert await stream.get() == Chunk("a", [1])
    with pytest.raises(GenerationError, match="broken"):
        await stream.get()
    assert stream.closed


@pytest.mark.parametrize("scenario", [scenario_merge, scenario_wake, scenario_nudge, scenario_fail])
def test_output_stream(scenario: object) -> None:
    asyncio.run(scenario())  # type: ignore[operator]
