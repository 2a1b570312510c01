"""Paged decode attention on a CPU in float32: K and V are read where they lie, once, for exactly the tokens there are.

A task is one request and one K/V head: store the new K/V, score all keys for the heads that share it, softmax, sum the
values. Tasks are compiled by numba and shared among its threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import float32, int32
from torch import Tensor

from engine_core.attention.paged import Scoring
from engine_core.cpu_jit import intrinsic, njit, prange

_LOG2_E = np.float32(math.log2(math.e))
_LOWEST = np.float32(-126.0)  # 2 to this is the smallest normal number; what is smaller may as well be it
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves no bits behind the point
_ROUND_BITS = 0x4B400000 - 127  # … and its bits, less the bias of an exponent
# ln(2)^i / i!: the Taylor series of 2^f, for |f| <= 1/2 within a rounding of float32
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2) ** i / math.factorial(i)) for i in range(1, 7))


@intrinsic
def _bits(_: Any, number: Any) -> Any:
    """The bits of a float32 as int32."""
    return int32(float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _from_bits(_: Any, bits: Any) -> Any:
    """The float32 of these bits."""
    return float32(int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@njit(fastmath=False, cache=True)  # said aloud: it would be inherited from the caller, and undo the rounding
def _exp(x: Any) -> Any:
    """e^x for x <= 0 within |x| + 2 roundings, without branches or calls, so that LLVM computes many at once."""
    t = max(x * _LOG2_E, _LOWEST)
    shifted = t + _ROUND
    f = t - (shifted - _ROUND)
    fraction = np.float32(1.0) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    exponent = (_bits(shifted) - int32(_ROUND_BITS)) << int32(23)
    return fraction * _from_bits(int32(exponent))


@njit(fastmath=True, cache=True)
def _softmax(scores: Any, softcap: Any) -> Any:
    """Turn scores [num_keys] into weights in place, and return their sum."""
    if softcap > 0:
        for i in range(len(scores)):
            scores[i] = softcap * math.tanh(scores[i] / softcap)
    highest, total = scores[0], np.float32(0.0)
    for i in range(len(scores)):
        highest = max(highest, scores[i])
    for i in range(len(scores)):
        scores[i] = _exp(scores[i] - highest)
        total += scores[i]
    return total


@njit(fastmath=True, cache=True)
def _attend(
    query: Any,  # [group, head_dim]
    key_cache: Any,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Any,
    kv_head: Any,
    blocks: Any,  # [max_blocks]
    start: Any,
    end: Any,
    scaling: Any,
    softcap: Any,
    output: Any,  # like query
) -> None:
    """Attend to positions [start, end)."""
    group, head_dim = query.shape
    block_size = key_cache.shape[1]
    scores = np.empty((group, end - start), np.float32)
    for position in range(start, end):
        block, offset = blocks[position // block_size], position % block_size
        for head in range(group):
            score = np.float32(0.0)
            for d in range(head_dim):
                score += query[head, d] * key_cache[block, offset, kv_head, d]
            scores[head, position - start] = score * scaling
    scales = np.empty(group, np.float32)
    for head in range(group):
        scales[head] = np.float32(1.0) / _softmax(scores[head], softcap)
        for d in range(head_dim):
            output[head, d] = np.float32(0.0)
    for position in range(start, end):
        block, offset = blocks[position // block_size], position % block_size
        for head in range(group):
            weight = scores[head, position - start] * scales[head]
            for d in range(head_dim):
                output[head, d] += weight * value_cache[block, offset, kv_head, d]


@njit(cache=True)
def _store(key: Any, cache: Any, block: Any, offset: Any, kv_head: Any) -> None:
    """Put key [head_dim] into its slot of cache [num_blocks, block_size, num_kv_heads, head_dim]."""
    for d in range(len(key)):
        cache[block, offset, kv_head, d] = key[d]


@njit(parallel=True, cache=True)  # a loop of calls: whatever else stands here costs seconds to compile
def _decode(
    query: Any,  # [num_reqs, num_kv_heads, group, head_dim]
    key: Any,  # [num_reqs, num_kv_heads, head_dim]
    value: Any,
    key_cache: Any,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Any,
    block_tables: Any,  # [num_reqs, max_blocks] int64
    context_lens: Any,  # [num_reqs] int64, the new token included
    scaling: Any,
    window: Any,
    softcap: Any,  # 0: none
    output: Any,  # like query
) -> None:
    num_kv_heads, block_size = key.shape[1], key_cache.shape[1]
    for task in prange(key.shape[0] * num_kv_heads):
        request, head = task // num_kv_heads, task % num_kv_heads
        blocks, end = block_tables[request], context_lens[request]
        block, offset = blocks[(end - 1) // block_size], (end - 1) % block_size
        _store(key[request, head], key_cache, block, offset, head)
        _store(value[request, head], value_cache, block, offset, head)
        start, out = max(0, end - window), output[request, head]
        _attend(query[request, head], key_cache, value_cache, head, blocks, start, end, scaling, softcap, out)


@dataclass(slots=True)
class CpuDecode:
    """A pass of one token per request. `AttentionMetadata` for float32 on a CPU."""

    block_tables: Tensor  # [num_reqs, max_blocks] int64
    context_lens: Sequence[int]  # keys each query sees, its own included

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scoring: Scoring
    ) -> Tensor:
        """See `AttentionMetadata`."""
        num_reqs, num_kv_heads, head_dim = key.shape
        grouped = query.reshape(num_reqs, num_kv_heads, -1, head_dim).contiguous()
        output = torch.empty(grouped.shape)
        _decode(
            grouped.numpy(),
            key.contiguous().numpy(),
            value.contiguous().numpy(),
            key_cache.numpy(),
            value_cache.numpy(),
            self.block_tables.numpy(),
            np.array(self.context_lens),
            np.float32(scoring.scaling),
            scoring.window or 2**31,
            np.float32(scoring.softcap or 0.0),
            output.numpy(),
        )
        return output.view(query.shape)


def compile_now() -> None:
    """Compile a pass, or read what was compiled before. Takes seconds the first time."""
    vector, cache = torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 8)
    table = torch.zeros(1, 1, dtype=torch.int64)
    CpuDecode(table, [1]).attend(vector, vector, vector, cache, cache.clone(), Scoring(1.0))
