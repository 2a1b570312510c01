"""Paged decode attention in one Triton kernel: store the new token's K/V, attend over the past, merge the splits.

    grid       kv head × request × split    each program reads its share of the keys once, a tile at a time
    order      longest contexts first       so that none of them is the last to end, when most of the GPU is idle again
    blocks     one tile ahead               where a tile's keys lie is known before the loop gets to it
    split 0    starts from the new token, whose K/V come from registers and go to the cache on the way
    last one   of the splits of a (request, head) to arrive merges them all: no second kernel, no synchronisation

Flash-Decoding (Dao et al., 2023) for the split; the heads of one group share each K/V read (grouped-query attention).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_core.triton_launch import launch_options, launches_overlap, limits_of, wait_for_earlier_kernels

NO_WINDOW = 1 << 30
_SMALLEST_TILE = 16
_TARGET_PROGRAMS = 1024  # enough to keep every multiprocessor of a large GPU busy


class Shape(NamedTuple):
    """Of one program of the decode kernel."""

    tile: int  # keys
    warps: int
    stages: int  # of the software pipeline
    min_keys: int  # fewest keys per split


# (most (request, kv head) pairs, shape), as measured fastest on an H200
SHAPES = (
    (32, Shape(128, 4, 2, 128)),
    (256, Shape(32, 1, 3, 128)),
    (1100, Shape(32, 1, 4, 512)),
    (1 << 30, Shape(32, 1, 3, 512)),
)


@triton.jit
def to_base_2(products, scaling, softcap, SOFTCAP: tl.constexpr):
    """Scores from q·k, times 1 / ln 2: exp2 is the native instruction. tanh(x) = 2 sigmoid(2 x) - 1."""
    if SOFTCAP:
        return softcap * (2 * tl.sigmoid(2 * scaling * products / softcap) - 1) * 1.4426950408889634
    return products * (scaling * 1.4426950408889634)


@triton.jit
def blocks_of(table_ptr, keys, end, BLOCK_SIZE: tl.constexpr, NARROW: tl.constexpr):
    """Blocks that hold `keys`; of those from `end` on, any."""
    block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)
    return block.to(tl.int32) if NARROW else block


@triton.jit(do_not_specialize=["most_splits", "min_tiles"])
def _decode_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, key_cache_ptr, value_cache_ptr,
    order_ptr, rows_ptr, lengths_ptr, table_ptr, part_ptr, part_peak_ptr, part_total_ptr, arrivals_ptr,
    scaling, softcap, window, most_splits, min_tiles,
    query_stride_t, query_stride_h, key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    cache_stride_b, cache_stride_t, cache_stride_h, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NARROW: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(2)
    request = tl.load(order_ptr + tl.program_id(1)).to(tl.int32)
    row = tl.load(rows_ptr + request)
    position = tl.load(lengths_ptr + row).to(tl.int32) - 1  # of the new token: the keys before it are in the cache
    first = tl.maximum(position + 1 - window, 0)
    num_tiles = tl.cdiv(position - first, TILE)
    tiles_per_split = tl.maximum(tl.cdiv(num_tiles, most_splits), min_tiles)  # short contexts are not worth splitting
    num_splits = tl.maximum(tl.cdiv(num_tiles, tiles_per_split), 1)
    if split >= num_splits:
        return

    dims = tl.arange(0, HEAD_PAD)
    dim_ok = dims < HEAD_DIM
    group = tl.arange(0, GROUP_PAD)
    group_ok = group < GROUP
    cell_ok = group_ok[:, None] & dim_ok[None, :]
    wait_for_earlier_kernels(OVERLAPS)
    query_at = request * query_stride_t + (head * GROUP + group)[:, None] * query_stride_h + dims[None, :]
    query = tl.load(query_ptr + query_at, mask=cell_ok, other=0.0)  # [GROUP_PAD, HEAD_PAD]
    table_ptr += row * table_stride
    key_cache_ptr += head * cache_stride_h
    value_cache_ptr += head * cache_stride_h

    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    if split == 0:
        new_key = tl.load(key_ptr + request * key_stride_t + head * key_stride_h + dims, mask=dim_ok, other=0.0)
        new_value = tl.load(value_ptr + request * value_stride_t + head * value_stride_h + dims, mask=dim_ok, other=0.0)
        at = tl.load(table_ptr + position // BLOCK_SIZE) * cache_stride_b + (position % BLOCK_SIZE) * cache_stride_t
        tl.store(key_cache_ptr + at + dims, new_key, mask=dim_ok)
        tl.store(value_cache_ptr + at + dims, new_value, mask=dim_ok)
        product = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1)
        peak = to_base_2(product, scaling, softcap, SOFTCAP)
        total += 1.0
        acc += new_value.to(tl.float32)[None, :]

    begin = split * tiles_per_split
    keys = first + begin * TILE + tl.arange(0, TILE)
    block = blocks_of(table_ptr, keys, position, BLOCK_SIZE, NARROW)
    for _ in tl.range(begin, tl.minimum(begin + tiles_per_split, num_tiles)):
        key_ok = keys < position
        load_ok = key_ok[:, None] if HEAD_DIM == HEAD_PAD else key_ok[:, None] & dim_ok[None, :]
        at = block * cache_stride_b + (keys % BLOCK_SIZE) * cache_stride_t  # [TILE]
        key = tl.load(key_cache_ptr + at[:, None] + dims[None, :], mask=load_ok, other=0.0)  # [TILE, HEAD_PAD]
        value = tl.load(value_cache_ptr + at[:, None] + dims[None, :], mask=load_ok, other=0.0)
        keys += TILE
        block = blocks_of(table_ptr, keys, position, BLOCK_SIZE, NARROW)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [GROUP_PAD, TILE]
        scores = tl.where(key_ok[None, :], to_base_2(products, scaling, softcap, SOFTCAP), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        probs = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(probs, 1)
        acc = acc * decay[:, None] + tl.dot(probs.to(value.dtype), value, input_precision=PRECISION)
        peak = new_peak

    pair = request * NUM_KV_HEADS + head
    if num_splits > 1:
        mine = (pair * most_splits + split) * GROUP + group
        tl.store(part_peak_ptr + mine, peak, mask=group_ok)
        tl.store(part_total_ptr + mine, total, mask=group_ok)
        tl.store(part_ptr + mine[:, None] * HEAD_DIM + dims[None, :], acc, mask=cell_ok)
        tl.debug_barrier()  # every thread's stores come before the arrival is announced
        if tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel") < num_splits - 1:
            return
        tl.store(arrivals_ptr + pair, 0)  # ready for the next layer
        peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
        for other in tl.range(0, num_splits):
            theirs = (pair * most_splits + other) * GROUP + group
            other_peak = tl.load(part_peak_ptr + theirs, mask=group_ok, other=0.0, cache_modifier=".cg")
            other_total = tl.load(part_total_ptr + theirs, mask=group_ok, other=1.0, cache_modifier=".cg")
            at = theirs[:, None] * HEAD_DIM + dims[None, :]
            other_acc = tl.load(part_ptr + at, mask=cell_ok, other=0.0, cache_modifier=".cg")
            new_peak = tl.maximum(peak, other_peak)
            decay, weight = tl.exp2(peak - new_peak), tl.exp2(other_peak - new_peak)
            total = total * decay + other_total * weight
            acc = acc * decay[:, None] + other_acc * weight[:, None]
            peak = new_peak
    out_at = (pair * GROUP + group)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=cell_ok)


@dataclass(slots=True)
class SplitBuffers:
    """Partial results of the splits, shared by all layers: they run one after the other."""

    acc: Tensor  # float32 [capacity, head_dim]; capacity = requests * heads * splits
    peak: Tensor  # float32 [capacity]
    total: Tensor  # float32 [capacity]
    arrivals: Tensor  # int32 [requests * kv heads], all 0 between kernels

    @classmethod
    def allocate(
        cls, max_reqs: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> "SplitBuffers":
        """Room for any batch of up to `max_reqs` requests."""
        capacity = max(n * num_heads * num_splits(n * num_kv_heads) for n in range(1, max_reqs + 1))
        return cls(
            acc=torch.empty(capacity, head_dim, device=device),
            peak=torch.empty(capacity, device=device),
            total=torch.empty(capacity, device=device),
            arrivals=torch.zeros(max_reqs * num_kv_heads, dtype=torch.int32, device=device),
        )


def num_splits(num_pairs: int) -> int:
    """Most splits per (request, kv head) pair: many for few pairs, few once these fill the GPU by themselves."""
    wanted: int = triton.next_power_of_2(max(1, _TARGET_PROGRAMS // num_pairs))
    return min(16, wanted)


def fitting(shape: Shape, bytes_per_key: int, shared_memory: int) -> Shape:
    """`shape` with a tile so small that its pipeline of K and V fits into the shared memory of a program."""
    while shape.tile > _SMALLEST_TILE and shape.stages * shape.tile * bytes_per_key > shared_memory:
        shape = shape._replace(tile=shape.tile // 2)
    return shape


def paged_decode(
    query: Tensor,  # [num_reqs, num_heads, head_dim], any strides but the last
    key: Tensor,  # [num_reqs, num_kv_heads, head_dim], likewise
    value: Tensor,
    key_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], likewise; written at the new token's slot
    value_cache: Tensor,  # with the strides of key_cache
    order: Tensor,  # [num_reqs] int64: 0 … num_reqs - 1, those with long contexts first
    rows: Tensor,  # [num_reqs] int64
    lengths: Tensor,  # [num_rows] int64: tokens of each row, the new one included
    block_table: Tensor,  # [num_rows, max_blocks] int64
    buffers: SplitBuffers,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention output [num_reqs, num_heads, head_dim] of one new token per request."""
    num_reqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    group, splits = num_heads // num_kv_heads, num_splits(num_reqs * num_kv_heads)
    head_pad = max(16, triton.next_power_of_2(head_dim))
    shape = next(shape for most_pairs, shape in SHAPES if num_reqs * num_kv_heads <= most_pairs)
    shape = fitting(shape, 2 * head_pad * key_cache.element_size(), limits_of(query.device).shared_memory)
    overlaps = launches_overlap(query.device)
    out = torch.empty(num_reqs, num_heads, head_dim, dtype=query.dtype, device=query.device)
    _decode_kernel[(num_kv_heads, num_reqs, splits)](
        out, query, key, value, key_cache, value_cache,
        order, rows, lengths, block_table, buffers.acc, buffers.peak, buffers.total, buffers.arrivals,
        scaling, softcap or 1.0, window or NO_WINDOW, splits, shape.min_keys // shape.tile,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *key_cache.stride()[:3], block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, HEAD_PAD=head_pad, BLOCK_SIZE=block_size,
        NARROW=key_cache.numel() < 1 << 31, TILE=shape.tile, SOFTCAP=bool(softcap),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", OVERLAPS=overlaps,
        num_warps=shape.warps, num_stages=shape.stages, **launch_options(overlaps),
    )  # fmt: skip
    return out
