"""The map of the KV cache: right in every cell, and small however large the pool is."""

import pytest

from engine_core import block_map
from engine_core.block_map import draw_block_map
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.request import Request
from minivllm.engine_view import BlockMap
from minivllm.sampling_params import SamplingParams


def make_request(kv: KVCacheManager, handle: int, token_ids: list[int]) -> Request:
    """A request whose whole prompt is in the cache."""
    request = Request(f"r{handle}", token_ids, len(token_ids), SamplingParams(), frozenset(), 1000, 0, handle)
    count = kv.allocate_prefill(request, 1000)
    request.num_computed_tokens += count
    kv.commit(request)
    return request


def cells(drawn: BlockMap) -> list[tuple[int, int]]:
    """(owner, references) of each cell."""
    runs = zip(drawn.lengths, drawn.owners, drawn.references, strict=True)
    return [(owner, references) for length, owner, references in runs for _ in range(length)]


def test_every_block_is_shown_as_what_it_is() -> None:
    kv = KVCacheManager(10, 4)
    gone = make_request(kv, 1, [9] * 8)
    kv.free(gone)
    first = make_request(kv, 2, [1, 2, 3, 4] * 2 + [5])
    second = make_request(kv, 3, [1, 2, 3, 4] * 2 + [6])
    drawn = draw_block_map(kv.pool, [second, first])
    expected = [(0, 0)] * 10
    for block in kv.pool.findable:
        expected[block] = (-1, 0)
    for block in second.block_table:
        expected[block] = (3, 1)
    for block in first.block_table:
        expected[block] = (2, 2 if block in second.block_table else 1)
    assert cells(drawn) == expected
    assert sorted(cells(drawn)).count((2, 2)) == 2
    assert (drawn.used, drawn.cached, drawn.free) == (4, kv.pool.num_cached, 10 - 4 - kv.pool.num_cached)
    assert drawn.cached > 0


def test_an_idle_pool_is_one_run() -> None:
    drawn = draw_block_map(KVCacheManager(100, 4).pool, [])
    assert (drawn.lengths, drawn.owners, drawn.references) == ([100], [0], [0])


def test_cells_of_several_blocks_hide_no_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_map, "MAX_CELLS", 4)
    kv = KVCacheManager(14, 4)
    request = make_request(kv, 1, [1] * 4 + [2] * 4 + [3])  # blocks 0, 1, 2
    kv.free(make_request(kv, 2, [7] * 12))  # blocks 3, 4, 5
    drawn = draw_block_map(kv.pool, [request])
    assert drawn.blocks_per_cell == 4
    assert cells(drawn) == [(1, 1), (-1, 0), (0, 0), (0, 0)]
    assert (drawn.used, drawn.cached, drawn.free) == (3, 3, 8)


@pytest.mark.parametrize("num_blocks", [1, 4096, 4097, 100_000])
def test_the_map_stays_small(num_blocks: int) -> None:
    kv = KVCacheManager(num_blocks, 1)
    requests = [make_request(kv, 1 + index, [index]) for index in range(min(num_blocks, 300))]
    drawn = draw_block_map(kv.pool, requests[::2])  # every other block looks free
    assert sum(drawn.lengths) <= 4096
    assert len(drawn.lengths) <= min(4096, num_blocks)
    assert sum(drawn.lengths) * drawn.blocks_per_cell >= num_blocks
