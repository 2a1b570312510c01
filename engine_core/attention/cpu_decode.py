"""Paged decode attention on a CPU in float32: K and V are read where they lie, once, for exactly the tokens there are.

A task is one request and the query heads that share a K/V head, or some of them where there are few requests: score all
keys, softmax, sum the values. Tasks are compiled by numba and shared among its threads; a head's numbers are the same
in every task.
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
from engine_core.cpu_jit import inner, njit, prange
from engine_core.cpu_prefetch import prefetch

_FEW_TASKS = 16  # several for each thread: fewer would be shared unevenly


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
def _score_block(
    query: Any, key_cache: Any, block: Any, first: Any, end: Any, kv_head: Any, scores: Any, at: Any
) -> None:
    """scores [group, at + first …] = query [group, head_dim] · the keys at [first, end) of a block, and some more."""
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    if head_dim % POSITIONS or block_size % POSITIONS:
        for offset in range(first, end):
            _score(query, key_cache[block, offset, kv_head], scores, at + offset)
        return
    stride = num_kv_heads * head_dim
    for offset in range(first - first % POSITIONS, end, POSITIONS):
        start = (block * block_size + offset) * stride + kv_head * head_dim
        for head in range(len(query)):
            score_positions(query[head], key_cache, start, stride, scores, head * scores.shape[1] + at + offset)


@inner(fastmath=True)
def _add_value(weights: Any, at: Any, value: Any, output: Any) -> None:
    for head in range(len(output)):
        weight, out = weights[head, at], output[head]
        for d in range(len(value)):
            out[d] += weight * value[d]


@inner()
def _add_block(
    weights: Any, at: Any, value_cache: Any, block: Any, first: Any, end: Any, kv_head: Any, output: Any
) -> None:
    """output [group, head_dim] += weights [group, at + first …] · the values at [first, end) of a block."""
    _, block_size, num_kv_heads, head_dim = value_cache.shape
    stride, are_vectors = num_kv_heads * head_dim, head_dim % POSITIONS == 0
    offset = first
    while offset < end:
        if are_vectors and offset + POSITIONS <= end:
            start = (block * block_size + offset) * stride + kv_head * head_dim
            for head in range(len(output)):
                add_positions(weights, head * weights.shape[1] + at + offset, value_cache, start, stride, output[head])
            offset += POSITIONS
        else:
            _add_value(weights, at + offset, value_cache[block, offset, kv_head], output)
            offset += 1


@inner()
def _prefetch_block(cache: Any, blocks: Any, start: Any, end: Any, kv_head: Any) -> None:
    """Positions [start, end), as many as the block of the first has. One head's vectors lie apart, and the blocks
    anywhere: no core foresees what is read next."""
    block_size, num_kv_heads, head_dim = cache.shape[1:]
    if start < end:
        first = (blocks[start // block_size] * block_size * num_kv_heads + kv_head) * head_dim
        for i in range(min(block_size, end - start)):
            prefetch(cache, first + i * num_kv_heads * head_dim, head_dim)


@inner()
def _attend(
    query: Any,  # [group, head_dim], scaled
    key_cache: Any,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Any,
    kv_head: Any,
    blocks: Any,  # [max_blocks]
    start: Any,
    end: Any,
    softcap: Any,
    output: Any,  # like query, zeros
) -> None:
    """Attend to positions [start, end)."""
    block_size = key_cache.shape[1]
    first_block, end_block = start // block_size, (end + block_size - 1) // block_size
    origin = first_block * block_size  # the position of the first score
    scores = np.empty((len(query), end_block * block_size - origin), np.float32)
    for index in range(first_block, end_block):
        position = index * block_size
        first, stop = max(start - position, 0), min(end - position, block_size)
        _prefetch_block(key_cache, blocks, position + block_size, end, kv_head)
        _score_block(query, key_cache, blocks[index], first, stop, kv_head, scores, position - origin)
    for head in range(len(query)):
        softmax(scores[head, start - origin : end - origin], softcap)
    for index in range(first_block, end_block):
        position = index * block_size
        first, stop = max(start - position, 0), min(end - position, block_size)
        _prefetch_block(value_cache, blocks, position + block_size, end, kv_head)
        _add_block(scores, position - origin, value_cache, blocks[index], first, stop, kv_head, output)


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
    num_splits: Any,
    outputs: Any,  # [num_reqs, num_heads, head_dim]
) -> None:
    num_heads, head_dim = outputs.shape[1:]
    num_kv_heads = key_cache.shape[2]
    group = num_heads // num_kv_heads
    request, rest = task // (num_kv_heads * num_splits), task % (num_kv_heads * num_splits)
    kv_head, split = rest // num_splits, rest % num_splits
    first = kv_head * group + split * group // num_splits
    end = kv_head * group + (split + 1) * group // num_splits
    output = outputs[request, first:end]
    query = np.empty((end - first, head_dim), np.float32)
    _start(queries[request], first, scaling, query, output)
    context_len = context_lens[request]
    start = max(0, context_len - window)
    _attend(query, key_cache, value_cache, kv_head, block_tables[request], start, context_len, softcap, output)


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
    for task in prange(len(queries) * key_cache.shape[2] * num_splits):
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
        num_heads, num_kv_heads = output.shape[1], key_cache.shape[2]
        are_few = len(qkv) * num_kv_heads < _FEW_TASKS
        _decode(
            qkv,
            key_cache,
            value_cache,
            self.block_tables.numpy(),
            self._context_lens,
            np.float32(scoring.scaling),
            scoring.window or 2**31,
            np.float32(scoring.softcap or 0.0),
            num_heads // num_kv_heads if are_few else 1,
            output,
        )


def compile_now() -> None:
    """Compile a pass, or read what was compiled before. Takes seconds the first time."""
    vector, cache = torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 8)
    slot = torch.zeros(1, dtype=torch.int64)
    CpuDecode(slot, slot[None], [1]).attend(vector, vector, vector, cache, cache.clone(), Scoring(1.0))
