"""What this process is doing: GET /debug/invariants (only with --enable-debug), and the state in the log (SIGUSR1)."""

import logging
import math
import time
from typing import Any

import msgspec

from frontend.engine_client import EngineClient

logger = logging.getLogger(__name__)


def log_state(engine: EngineClient) -> None:
    """Write the counts and every request to the log: ids and numbers, never text."""
    logger.info("engine core: %s; %s", engine.link.gone_reason or engine.link.facts or "loading", _counts(engine))
    for request in engine.requests:
        logger.info(
            "  %s: %d prompt + %d output tokens, %s, %d engine deaths since its last token",
            request.request_id, request.num_prompt_tokens, request.num_output_tokens,
            "submitted" if request.submitted else "waiting for the engine core", request.num_crashes,
        )  # fmt: skip


def _counts(engine: EngineClient) -> dict[str, int]:
    return {
        "requests": engine.num_unfinished,
        "waiting_for_engine": sum(not request.submitted for request in engine.requests),
        "engine_restarts": engine.link.num_restarts,
        **msgspec.structs.asdict(engine.link.channel_state),
    }


def invariants(engine: EngineClient) -> tuple[int, dict[str, Any]]:
    """Status and body: 200 when all is well, 500 when the engine core found itself inconsistent.

    The engine core checks itself at every heartbeat; `age` is the time in seconds since the last one, null before it.
    """
    link, stats = engine.link, engine.link.stats
    body = {
        "engine": {
            "integrity": stats.integrity,
            "age": time.monotonic() - link.stats_time if math.isfinite(link.stats_time) else None,
            "requests_submitted": stats.num_requests_submitted,
            "requests_finished": stats.num_requests_finished,
            "requests_running": stats.num_requests_running,
            "requests_waiting": stats.num_requests_waiting,
            "kv_blocks_used": stats.kv_blocks_used,
            "kv_blocks_leaked": stats.kv_blocks_leaked,
        },
        "frontend": _counts(engine),
    }
    return (200 if stats.integrity in ("ok", "") else 500), body
