"""Paged prefill attention in Triton: chunks of several prompts, packed, over everything their block tables hold.

    grid    query tile × heads           a tile is up to TILE_QUERY queries of one request, for one or two heads that
                                         share their keys
    keys    read through the block table, one tile ahead, so cached prefixes, earlier chunks and this chunk are one and
            the same; masked in every tile: that costs less than a loop of its own for the diagonal

FlashAttention-2 (Dao, 2023). `store_kv` must have run before: the chunk's own K/V are read from the cache too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_core.attention.triton_decode import NO_WINDOW, blocks_of, to_base_2

TILE_QUERY = 64
_TILE_KEY = 64


@triton.jit
def _store_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slots_ptr,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h, cache_stride_b, cache_stride_t, cache_stride_h,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    column = tl.arange(0, WIDTH)
    ok = column < NUM_KV_HEADS * HEAD_DIM
    head, dim = column // HEAD_DIM, column % HEAD_DIM
    key = tl.load(key_ptr + token * key_stride_t + head * key_stride_h + dim, mask=ok)
    value = tl.load(value_ptr + token * value_stride_t + head * value_stride_h + dim, mask=ok)
    at = slot // BLOCK_SIZE * cache_stride_b + slot % BLOCK_SIZE * cache_stride_t + head * cache_stride_h + dim
    tl.store(key_cache_ptr + at, key, mask=ok)
    tl.store(value_cache_ptr + at, value, mask=ok)


@triton.jit
def _prefill_kernel(
    out_ptr, query_ptr, key_cache_ptr, value_cache_ptr, tiles_ptr, table_ptr,
    scaling, softcap, window,
    query_stride_t, query_stride_h, cache_stride_b, cache_stride_t, cache_stride_h, table_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_QUERY: tl.constexpr, HEADS: tl.constexpr, TILE_KEY: tl.constexpr,
    NARROW: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first_head = tl.program_id(1) * HEADS
    num_queries = tl.load(tiles_ptr + tile * 4 + 3).to(tl.int32)
    if num_queries == 0:  # padding of a captured graph
        return
    row = tl.load(tiles_ptr + tile * 4)
    token = tl.load(tiles_ptr + tile * 4 + 1)  # of the tile's first query, in the pass
    start = tl.load(tiles_ptr + tile * 4 + 2).to(tl.int32)  # its position
    kv_head = first_head // (NUM_HEADS // NUM_KV_HEADS)
    dims = tl.arange(0, HEAD_PAD)
    dim_ok = dims < HEAD_DIM
    line = tl.arange(0, TILE_QUERY * HEADS)  # a query of one head
    index, head = line // HEADS, first_head + line % HEADS
    query_ok = (index < num_queries)[:, None] & dim_ok[None, :]
    query_at = (token + index)[:, None] * query_stride_t + head[:, None] * query_stride_h + dims[None, :]
    query = tl.load(query_ptr + query_at, mask=query_ok, other=0.0)
    positions = start + index

    peak = tl.full([TILE_QUERY * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_QUERY * HEADS], tl.float32)
    acc = tl.zeros([TILE_QUERY * HEADS, HEAD_PAD], tl.float32)
    end = start + num_queries
    table_at = table_ptr + row * table_stride
    keys_at = key_cache_ptr + kv_head * cache_stride_h
    values_at = value_cache_ptr + kv_head * cache_stride_h
    first_tile = tl.maximum(start - window + 1, 0) // TILE_KEY if WINDOW else 0
    keys = first_tile * TILE_KEY + tl.arange(0, TILE_KEY)
    block = blocks_of(table_at, keys, end, BLOCK_SIZE, NARROW)
    scale = 1.0 if SOFTCAP else scaling * 1.4426950408889634
    for _ in tl.range(first_tile, tl.cdiv(end, TILE_KEY)):
        load_ok = (keys < end)[:, None] if HEAD_DIM == HEAD_PAD else (keys < end)[:, None] & dim_ok[None, :]
        at = block * cache_stride_b + keys % BLOCK_SIZE * cache_stride_t
        cells = at[:, None] + dims[None, :]
        key = tl.load(keys_at + cells, mask=load_ok, other=0.0)
        value = tl.load(values_at + cells, mask=load_ok, other=0.0)
        seen = keys[None, :] <= positions[:, None]
        if WINDOW:
            seen = seen & (keys[None, :] > positions[:, None] - window)
        keys += TILE_KEY
        block = blocks_of(table_at, keys, end, BLOCK_SIZE, NARROW)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if SOFTCAP:
            scores = to_base_2(scores, scaling, softcap, SOFTCAP)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        if WINDOW:  # it may hide a whole tile from a query
            safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            safe_peak = new_peak
        probs = tl.exp2(scores * scale - safe_peak[:, None])
        decay = tl.exp2(peak - safe_peak)
        total = total * decay + tl.sum(probs, 1)
        acc = tl.dot(probs.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    out_at = ((token + index) * NUM_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    total = tl.where(total > 0, total, 1.0)  # behind a window, lines beyond the last query see nothing
    tl.store(out_ptr + out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=query_ok)


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write key/value [num_tokens, num_kv_heads, head_dim] to their slots [num_tokens] of the caches."""
    num_tokens, num_kv_heads, head_dim = key.shape
    _store_kernel[(num_tokens,)](
        key, value, key_cache, value_cache, slots,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), *key_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=key_cache.shape[1],
        WIDTH=triton.next_power_of_2(num_kv_heads * head_dim),
    )  # fmt: skip


def query_tiles(rows: list[int], starts: list[int], counts: list[int]) -> list[tuple[int, int, int, int]]:
    """(row, first token of the pass, its position, number of queries) of every tile, most expensive first."""
    tiles, token = [], 0
    for row, start, count in zip(rows, starts, counts, strict=True):
        offsets = range(0, count, TILE_QUERY)
        tiles += [(row, token + skip, start + skip, min(TILE_QUERY, count - skip)) for skip in offsets]
        token += count
    return sorted(tiles, key=lambda tile: -(tile[2] + tile[3]))


def paged_prefill(
    query: Tensor,  # [num_tokens, num_heads, head_dim], any strides but the last
    key_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Tensor,
    tiles: Tensor,  # [num_tiles, 4] int64: see `query_tiles`; rows of zeros are padding
    block_table: Tensor,  # [num_rows, max_blocks] int64
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention output [num_tokens, num_heads, head_dim]."""
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    wide = head_dim > 128 or query.dtype == torch.float32
    heads = 2 if num_heads // num_kv_heads % 2 == 0 and not wide else 1
    _prefill_kernel[(tiles.shape[0], num_heads // heads)](
        out, query, key_cache, value_cache, tiles, block_table,
        scaling, softcap or 1.0, window or NO_WINDOW,
        query.stride(0), query.stride(1), *key_cache.stride()[:3], block_table.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        HEAD_PAD=max(16, triton.next_power_of_2(head_dim)), BLOCK_SIZE=block_size,
        TILE_QUERY=TILE_QUERY, HEADS=heads, TILE_KEY=32 if wide else _TILE_KEY,
        NARROW=key_cache.numel() < 1 << 31, SOFTCAP=bool(softcap), WINDOW=window is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4 * heads, num_stages=1 if wide else 3 if heads == 2 else 2,
    )  # fmt: skip
    return out
