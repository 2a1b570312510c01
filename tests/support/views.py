"""Views of an engine core that never was, for tests of what is made of them."""

from typing import Any

from minivllm.engine_view import BlockMap, EngineView, RequestRow, StepRecord


def row(handle: int, request_id: str, **changes: Any) -> RequestRow:
    """A request that arrived at second `handle`."""
    values: dict[str, Any] = {
        "status": "decode",
        "num_prompt_tokens": 5,
        "num_tokens": 6,
        "num_computed_tokens": 5,
        "max_total_tokens": 9,
        "num_cached_tokens": 0,
        "num_blocks": 2,
        "num_preemptions": 0,
        "arrival_time": float(handle),
        "first_scheduled_time": 0.0,
        "last_chunk_time": 0.0,
        "first_token_time": 0.0,
    }
    return RequestRow(handle=handle, request_id=request_id, **values | changes)


def prefill(number: int, began: float, handle: int, start: int, count: int, **changes: Any) -> StepRecord:
    """A pass of half a second with one chunk of one prompt."""
    values: dict[str, Any] = {"requests": [handle], "starts": [start], "counts": [count], "num_tokens": count}
    return _step(number, "prefill", began, **values | changes)


def decode(number: int, began: float, handles: list[int] | None, **changes: Any) -> StepRecord:
    """A pass of half a second with one token for each of `handles`."""
    return _step(number, "decode", began, **{"requests": handles, "num_tokens": len(handles or [1])} | changes)


def view(time: float, steps: list[StepRecord], requests: list[RequestRow]) -> EngineView:
    """What a watcher is sent at `time`."""
    blocks = BlockMap(8, 1, [3, 2, 3], [1, -1, 0], [1, 0, 0], used=3, cached=2, free=3)
    return EngineView(time, 4, 16, 16, len(requests), 0, 0, 5, 3, steps, requests, blocks)


def _step(number: int, kind: Any, began: float, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "prefill_queue": 0,
        "decode_queue": 1,
        "blocks_used": 3,
        "waiting_for": None,
        "starts": [],
        "counts": [],
        "sampled": [],
        "started": [],
        "preempted": [],
        "collected": began + 0.5,
    }
    return StepRecord(number=number, kind=kind, began=began, **values | changes)
