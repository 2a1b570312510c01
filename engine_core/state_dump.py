"""What the engine core is doing, in lines for the log: every queue, request and block count."""

from collections.abc import Iterator

from engine_core.kv_cache_manager import KVCacheManager
from engine_core.request import Request
from engine_core.scheduler import Scheduler


def describe(scheduler: Scheduler, kv: KVCacheManager) -> Iterator[str]:
    """One line for the blocks, one for each queue, one for each request; ids and counts, never text."""
    pool = kv.pool
    yield f"KV blocks: {pool.num_used} used, {pool.num_cached} cached, {pool.num_unused - pool.num_cached} free"
    for name, queue in (("prefill", scheduler.prefill_queue), ("decode", scheduler.decode_queue)):
        yield f"{name} queue: {len(queue)} requests"
        yield from map(_describe_request, queue)


def _describe_request(request: Request) -> str:
    return (
        f"  {request.request_id}: {request.status.value}, {request.num_prompt_tokens} prompt + "
        f"{request.num_output_tokens} output tokens, {request.num_computed_tokens} computed, "
        f"{len(request.block_table)} blocks, row {request.row}, {request.num_in_flight} passes in flight, "
        f"{request.num_preemptions} preemptions"
    )
