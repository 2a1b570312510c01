"""Paged decode attention on a CPU in float32: K and V are read where they lie, once, for exactly the tokens there are.

A task is one request, or some of its query heads where there are few requests: score all keys, softmax, sum the values.
With all heads it reads whole blocks, from front to back. Tasks are compiled by numba and shared among its threads; a
head's numbers are the same in every task.
"""

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine_core.attention.cpu_attention import CpuAttention
from engine_core.attention.cpu_positions import POSITIONS, add_positions, score_positions
from engine_core.attention.paged import Floats, Scoring
from engine_core.cpu_exp import exp
from engine_core.cpu_jit import get_num_threads, inner, njit, prange

_TASKS_PER_THREAD = 4  # fewer would be shared unevenly


@inner(fastmath=True)
def softmax(scores: Any, softcap: Any) -> None:
    """Turn scores [num_keys] into weights in place."""
    if softcap > 0:
        for i in range(len(scores)):
            scores[i] = softcap * math.tanh(scores[i] / softcap)
    highest, total = scores[0], np.float32(0.0)
    for i in range(len(scores)):
        highest = max(highest, scores[i])
    for i in range(len(scores)):
        scores[i] = exp(scores[i] - highest)
        total += scores[i]
    scale = np.float32(1.0) / total
    for i in range(len(scores)):
        scores[i] *= scale


@inner(fastmath=True)
def _score(query: Any, key: Any, scores: Any, at: Any) -> None:
    """scores [group, at] = query [group, head_dim] · one key."""
    for head in range(len(query)):
        score = np.float32(0.0)
        for d in range(len(key)):
            score += query[head, d] * key[d]
        scores[head, at] = score


@inner()
def _index(cache: Any, block: Any, offset: Any, kv_head: Any) -> Any:
    """Of the first number of a position's head in `cache`, as if it had one dimension."""
    _, block_size, num_kv_heads, head_dim = cache.shape
    return ((block * block_size + offset) * num_kv_heads + kv_head) * head_dim


@inner()
def _score_block(
    query: Any, key_cache: Any, block: Any, ahead: Any, first: Any, end: Any, kv_head: Any, scores: Any, at: Any
) -> None:
    """scores [group, at + first …] = query [group, head_dim] · the keys at [first, end) of a block, and some more.

    `ahead` is the block that is read next.
    """
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    if head_dim % POSITIONS or block_size % POSITIONS:
        for offset in range(first, end):
            _score(query, key_cache[block, offset, kv_head], scores, at + offset)
        return
    stride = num_kv_heads * head_dim
    for offset in range(first - first % POSITIONS, end, POSITIONS):
        start, next_start = _index(key_cache, block, offset, kv_head), _index(key_cache, ahead, offset, kv_head)
        score_positions(query[0], key_cache, start, stride, scores, at + offset, next_start)
        for head in range(1, len(query)):
            score_positions(query[head], key_cache, start, stride, scores, head * scores.shape[1] + at + offset, None)


@inner(fastmath=True)
def _add_value(weights: Any, at: Any, value: Any, output: Any) -> None:
    for head in range(len(output)):
        weight, out = weights[head, at], output[head]
        for d in range(len(value)):
            out[d] += weight * value[d]


@inner()
def _add_block(
    weights: Any, at: Any, value_cache: Any, block: Any, ahead: Any, first: Any, end: Any, kv_head: Any, output: Any
) -> None:
    """output [group, head_dim] += weights [group, at + first …] · the values at [first, end) of a block."""
    _, _, num_kv_heads, head_dim = value_cache.shape
    stride, are_vectors = num_kv_heads * head_dim, head_dim % POSITIONS == 0
    offset = first
    while offset < end:
        if are_vectors and offset + POSITIONS <= end:
            start, next_start = _index(value_cache, block, offset, kv_head), _index(value_cache, ahead, offset, kv_head)
            add_positions(weights, at + offset, value_cache, start, stride, output[0], next_start)
            for head in range(1, len(output)):
                weight = head * weights.shape[1] + at + offset
                add_positions(weights, weight, value_cache, start, stride, output[head], None)
            offset += POSITIONS
        else:
            _add_value(weights, at + offset, value_cache[block, offset, kv_head], output)
            offset += 1


@inner()
def _place(blocks: Any, index: Any, block_size: Any, start: Any, end: Any) -> Any:
    """(block, the one read next, where its scores begin, its first position that counts, the end of those), of block
    number `index` of a request whose positions [start, end) count. Scores begin with the block that holds `start`."""
    position, last = index * block_size, (end - 1) // block_size
    at = position - start // block_size * block_size
    return blocks[index], blocks[min(index + 1, last)], at, max(start - position, 0), min(end - position, block_size)


@inner()
def _attend(
    query: Any,  # [num_heads, head_dim], scaled: of one K/V head, or all that share some
    key_cache: Any,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Any,
    first_kv_head: Any,
    end_kv_head: Any,
    blocks: Any,  # [max_blocks]
    start: Any,
    end: Any,
    softcap: Any,
    output: Any,  # like query, zeros
) -> None:
    """Attend to positions [start, end)."""
    block_size, group = key_cache.shape[1], len(query) // (end_kv_head - first_kv_head)
    first_block, end_block = start // block_size, (end + block_size - 1) // block_size
    origin = first_block * block_size  # the position of the first score
    scores = np.empty((len(query), end_block * block_size - origin), np.float32)
    for index in range(first_block, end_block):
        block, ahead, at, first, stop = _place(blocks, index, block_size, start, end)
        for kv_head in range(first_kv_head, end_kv_head):
            head = (kv_head - first_kv_head) * group
            sharing, rows = query[head : head + group], scores[head : head + group]
            _score_block(sharing, key_cache, block, ahead, first, stop, kv_head, rows, at)
    for head in range(len(query)):
        softmax(scores[head, start - origin : end - origin], softcap)
    for index in range(first_block, end_block):
        block, ahead, at, first, stop = _place(blocks, index, block_size, start, end)
        for kv_head in range(first_kv_head, end_kv_head):
            head = (kv_head - first_kv_head) * group
            sharing, rows = output[head : head + group], scores[head : head + group]
            _add_block(rows, at, value_cache, block, ahead, first, stop, kv_head, sharing)


@inner(fastmath=True)
def _start(heads: Any, first: Any, scaling: Any, query: Any, output: Any) -> None:
    """query [group, head_dim]: some of heads [num_heads * head_dim or more], scaled; output likewise: zeros."""
    head_dim = query.shape[1]
    for head in range(len(query)):
        for d in range(head_dim):
            query[head, d] = heads[(first + head) * head_dim + d] * scaling
            output[head, d] = np.float32(0.0)


@inner()
def _run_task(
    task: Any,
    queries: Any,  # [num_reqs, num_heads * head_dim or more]
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,  # [num_reqs, max_blocks] int64
    context_lens: Any,  # [num_reqs] int64, the new token included
    scaling: Any,
    window: Any,
    softcap: Any,
    num_splits: Any,  # tasks of a request: 1, or a multiple of the K/V heads that divides the heads
    outputs: Any,  # [num_reqs, num_heads, head_dim]
) -> None:
    num_heads, head_dim = outputs.shape[1:]
    group = num_heads // key_cache.shape[2]
    request, split = task // num_splits, task % num_splits
    first, end = num_heads * split // num_splits, num_heads * (split + 1) // num_splits
    output = outputs[request, first:end]
    query = np.empty((end - first, head_dim), np.float32)
    _start(queries[request], first, scaling, query, output)
    context_len = context_lens[request]
    start = max(0, context_len - window)
    first_kv_head, end_kv_head = first // group, (end + group - 1) // group
    _attend(
        query, key_cache, value_cache, first_kv_head, end_kv_head, block_tables[request], start, context_len, softcap,
        output,
    )  # fmt: skip


@njit(parallel=True)  # a loop of calls: whatever else stands here costs seconds to compile
def _decode(
    queries: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    context_lens: Any,
    scaling: Any,
    window: Any,
    softcap: Any,
    num_splits: Any,
    outputs: Any,
) -> None:
    for task in prange(len(queries) * num_splits):
        _run_task(
            np.int64(task), queries, key_cache, value_cache, block_tables, context_lens, scaling, window, softcap,
            num_splits, outputs,
        )  # fmt: skip


@dataclass(slots=True)
class CpuDecode(CpuAttention):
    """A pass of one token per request."""

    slot_mapping: Tensor  # [num_reqs] of the new tokens
    block_tables: Tensor  # [num_reqs, max_blocks] int64
    context_lens: InitVar[Sequence[int]]  # keys each query sees, its own included
    _context_lens: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self, context_lens: Sequence[int]) -> None:
        self._context_lens = np.array(context_lens)

    def attend_to_stored(
        self, qkv: Floats, key_cache: Floats, value_cache: Floats, scoring: Scoring, output: Floats
    ) -> None:
        """See `CpuAttention`."""
        choices, enough = (1, key_cache.shape[2], output.shape[1]), _TASKS_PER_THREAD * get_num_threads()
        _decode(
            qkv,
            key_cache,
            value_cache,
            self.block_tables.numpy(),
            self._context_lens,
            np.float32(scoring.scaling),
            scoring.window or 2**31,
            np.float32(scoring.softcap or 0.0),
            next((choice for choice in choices if len(qkv) * choice >= enough), choices[-1]),
            output,
        )


def compile_now() -> None:
    """Compile a pass, or read what was compiled before. Takes seconds the first time."""
    vector, cache = torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 8)
    slot = torch.zeros(1, dtype=torch.int64)
    CpuDecode(slot, slot[None], [1]).attend(vector, vector, vector, cache, cache.clone(), Scoring(1.0))
