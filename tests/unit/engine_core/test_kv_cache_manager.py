"""Block tables: allocation in chunks, prefix hits, commits, and that a refusal changes nothing."""

import pytest

from engine_core.kv_cache_manager import KVCacheManager
from engine_core.request import Request
from minivllm.sampling_params import SamplingParams

BLOCK = 4


def num_found(kv: KVCacheManager, request: Request) -> int:
    """Tokens of `request` that the prefix cache holds."""
    return len(kv._matching_blocks(request)) * kv.block_size


def make_request(token_ids: list[int]) -> Request:
    return Request("r", token_ids, len(token_ids), SamplingParams(), frozenset(), 1000, seed=0)


def compute(kv: KVCacheManager, request: Request) -> Request:
    """Prefill all of `request`, as one pass that is done."""
    num_tokens = kv.allocate_prefill(request, 1000)
    assert num_tokens > 0
    request.num_computed_tokens += num_tokens
    kv.commit(request)
    return request


def test_chunks_take_only_the_blocks_they_need() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=BLOCK)
    request = make_request(list(range(10)))
    assert kv.allocate_prefill(request, 3) == 3
    request.num_computed_tokens = 3
    assert len(request.block_table) == 1
    assert kv.allocate_prefill(request, 3) == 3
    request.num_computed_tokens = 6
    assert len(request.block_table) == 2
    assert kv.allocate_prefill(request, 100) == 4
    assert len(request.block_table) == 3
    kv.check_integrity([request])


def test_refused_allocation_changes_nothing() -> None:
    kv = KVCacheManager(num_blocks=2, block_size=BLOCK)
    request = make_request(list(range(9)))
    assert kv.allocate_prefill(request, 100) == 0
    assert kv.allocate_prefill(request, 8, reserve=1) == 0
    assert (request.block_table, request.num_computed_tokens, kv.pool.num_unused) == ([], 0, 2)
    assert kv.allocate_prefill(request, 8) == 8


@pytest.mark.parametrize(("length", "num_cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_equal_prompts_share_full_blocks_but_the_last_token_is_computed(length: int, num_cached: int) -> None:
    kv = KVCacheManager(num_blocks=8, block_size=BLOCK)
    first = compute(kv, make_request(list(range(length))))
    second = make_request(list(range(length)))
    assert num_found(kv, second) == num_cached
    assert kv.allocate_prefill(second, 100) == length - num_cached
    assert (second.num_computed_tokens, second.num_cached_tokens) == (num_cached, num_cached)
    shared = num_cached // BLOCK
    assert second.block_table[:shared] == first.block_table[:shared]
    assert not set(second.block_table[shared:]) & set(first.block_table)
    kv.check_integrity([first, second])
    assert (kv.num_prefix_queries, kv.num_prefix_hits) == (2 * length, num_cached)


def test_content_outlives_its_request_until_evicted() -> None:
    kv = KVCacheManager(num_blocks=2, block_size=BLOCK)
    kv.free(compute(kv, make_request([1] * 5)))
    assert num_found(kv, make_request([1] * 5)) == 4
    other = compute(kv, make_request([2] * 8))
    assert num_found(kv, make_request([1] * 5)) == 0
    kv.check_integrity([other])


def test_equal_blocks_after_different_prefixes_are_not_shared() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=BLOCK)
    compute(kv, make_request([1, 1, 1, 1, 7, 7, 7, 7]))
    assert num_found(kv, make_request([2, 2, 2, 2, 7, 7, 7, 7, 0])) == 0
    assert num_found(kv, make_request([7, 7, 7, 7, 0])) == 0


def test_reviving_cached_blocks_counts_as_using_them() -> None:
    kv = KVCacheManager(num_blocks=2, block_size=BLOCK)
    kv.free(compute(kv, make_request([1] * 5)))
    request = make_request([1] * 9)  # one cached block, two more needed: three of two
    assert kv.allocate_prefill(request, 100) == 0
    assert kv.pool.num_used == 0


def test_uncomputed_and_unknown_tokens_are_not_findable() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=BLOCK)
    request = make_request([1] * 8)
    kv.allocate_prefill(request, 6)
    request.num_computed_tokens = 6
    kv.commit(request)
    assert num_found(kv, make_request([1] * 9)) == 4
    decoding = make_request([2] * 3)
    kv.allocate_prefill(decoding, 3)
    decoding.num_computed_tokens, decoding.num_pending = 4, 2  # its fourth token is still on the device
    kv.commit(decoding)
    assert decoding.num_committed_blocks == 0


def test_append_slot_at_a_block_boundary() -> None:
    kv = KVCacheManager(num_blocks=2, block_size=BLOCK)
    request = compute(kv, make_request([1] * 3))
    assert kv.append_slot(request) is False
    request.num_computed_tokens = 4
    assert kv.append_slot(request) is True
    request.num_computed_tokens = 8
    assert kv.append_slot(request) is None
    assert len(request.block_table) == 2
    kv.check_integrity([request])


def test_prefix_caching_can_be_off() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=BLOCK, enable_prefix_caching=False)
    compute(kv, make_request([1] * 8))
    assert num_found(kv, make_request([1] * 9)) == 0


def test_integrity_notices_a_leaked_block() -> None:
    kv = KVCacheManager(num_blocks=2, block_size=BLOCK)
    request = compute(kv, make_request([1] * 3))
    kv.check_integrity([request])
    with pytest.raises(ValueError, match="block 0 has 1 references, 0 expected"):
        kv.check_integrity([])
