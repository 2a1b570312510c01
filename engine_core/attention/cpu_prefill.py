"""Paged attention of prompt chunks on a CPU in float32: two matrix products around a softmax.

    queries of a few tokens, all heads that share a K/V head ─▶ × keysᵀ ─▶ softmax of what each may see ─▶ × values

A task is one request's chunk, or a part of it, and one K/V head; it lays keys and values out for the product in
`cpu_kernels`. A token's numbers depend neither on the other requests nor on where its chunk starts: keys are added up
in order, and a key that is not seen has the weight 0.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine_core.attention.cpu_attention import CpuAttention
from engine_core.attention.cpu_decode import softmax
from engine_core.attention.paged import Floats, Scoring
from engine_core.attention.torch_backend import PrefillSpan
from engine_core.cpu_jit import inner, njit, prange
from engine_core.cpu_kernels import PANEL, multiply_panel

_TILE = 16  # tokens whose scores are held at once
_FEW_TASKS = 16  # several for each thread: fewer would be shared unevenly


@inner()
def _pack(
    cache_k: Any, cache_v: Any, kv_head: Any, blocks: Any, first: Any, end: Any, key_panels: Any, value_panels: Any
) -> None:
    """Lay out positions [first, end): key_panels [num_panels, head_dim, PANEL], value_panels [*, num_keys, PANEL]."""
    block_size, head_dim = cache_k.shape[1], cache_k.shape[3]
    for i in range(end - first):
        block, offset = blocks[(first + i) // block_size], (first + i) % block_size
        key, value = cache_k[block, offset, kv_head], cache_v[block, offset, kv_head]
        panel, column = key_panels[i // PANEL], i % PANEL
        for d in range(head_dim):
            panel[d, column] = key[d]
        for start in range(0, head_dim, PANEL):
            part = value_panels[start // PANEL, i]
            for d in range(min(PANEL, head_dim - start)):
                part[d] = value[start + d]


@inner(fastmath=True)
def _scale(x: Any, factor: Any, y: Any) -> None:
    """y = factor * x, both [width]."""
    for i in range(len(y)):
        y[i] = factor * x[i]


@inner()
def _gather_queries(qkv: Any, kv_head: Any, group: Any, scaling: Any, rows: Any) -> None:
    """rows [num_tokens * group, head_dim]: the heads of each token that share `kv_head`, scaled."""
    head_dim = rows.shape[1]
    for row in range(len(rows)):
        column = (kv_head * group + row % group) * head_dim
        _scale(qkv[row // group, column : column + head_dim], scaling, rows[row])


@inner()
def _clear(x: Any, start: Any, end: Any) -> None:
    for i in range(start, end):
        x[i] = np.float32(0.0)


@inner()
def _weigh(scores: Any, group: Any, seen: Any, window: Any, softcap: Any) -> None:
    """Scores become weights: the softmax of what a row sees, 0 elsewhere. The first token sees `seen` keys or fewer."""
    num_rows, num_keys = scores.shape
    for row in range(num_rows):
        end = seen + row // group
        start = max(0, end - window)
        _clear(scores[row], 0, start)
        softmax(scores[row, start:end], softcap)
        _clear(scores[row], end, num_keys)


@inner()
def _sum_values(weights: Any, value_panels: Any, zeros: Any, kv_head: Any, output: Any) -> None:
    """output [num_tokens, num_heads, head_dim], for heads of `kv_head`: weights [num_rows, num_keys] · values."""
    num_rows = len(weights)
    group = num_rows // len(output)
    part = np.empty((num_rows, PANEL), np.float32)
    for index in range(len(value_panels)):
        multiply_panel(weights, value_panels[index : index + 1], zeros, part, 0)
        column = index * PANEL
        for row in range(num_rows):
            out = output[row // group, kv_head * group + row % group]
            for d in range(min(PANEL, len(out) - column)):
                out[column + d] = part[row, d]


@inner()
def _run_task(
    task: Any,
    qkv: Any,
    key_cache: Any,
    value_cache: Any,
    spans: Any,
    block_tables: Any,
    scaling: Any,
    window: Any,
    softcap: Any,
    num_parts: Any,
    output: Any,
) -> None:
    num_heads, head_dim = output.shape[1:]
    num_kv_heads = key_cache.shape[2]
    group = num_heads // num_kv_heads
    span, rest = task // (num_kv_heads * num_parts), task % (num_kv_heads * num_parts)
    kv_head, part = rest // num_parts, rest % num_parts
    begin, end, start = spans[span, 0], spans[span, 1], spans[span, 2]
    first_key, end_key = max(0, start - window + 1), start + end - begin
    num_panels = (end_key - first_key + PANEL - 1) // PANEL
    key_panels = np.zeros((num_panels, head_dim, PANEL), np.float32)
    value_panels = np.zeros(((head_dim + PANEL - 1) // PANEL, num_panels * PANEL, PANEL), np.float32)
    zeros = np.zeros(num_panels * PANEL, np.float32)
    _pack(key_cache, value_cache, kv_head, block_tables[span], first_key, end_key, key_panels, value_panels)
    for tile in range(begin + part * _TILE, end, num_parts * _TILE):
        num_tokens = min(_TILE, end - tile)
        rows = np.empty((num_tokens * group, head_dim), np.float32)
        _gather_queries(qkv[tile : tile + num_tokens], kv_head, group, scaling, rows)
        seen = start + tile - begin + 1 - first_key
        num_seen_panels = (seen + num_tokens - 1 + PANEL - 1) // PANEL
        scores = np.empty((len(rows), num_seen_panels * PANEL), np.float32)
        for panel in range(num_seen_panels):
            multiply_panel(rows, key_panels, zeros, scores, panel)
        _weigh(scores, group, seen, window, softcap)
        _sum_values(scores, value_panels, zeros, kv_head, output[tile : tile + num_tokens])


@njit(parallel=True)  # a loop of calls: whatever else stands here costs seconds to compile
def _prefill(
    qkv: Any,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim or more]
    key_cache: Any,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Any,
    spans: Any,  # [num_reqs, 3] int64: first token, end, position of the first
    block_tables: Any,  # [num_reqs, max_blocks] int64
    scaling: Any,
    window: Any,
    softcap: Any,  # 0: none
    num_parts: Any,
    output: Any,  # [num_tokens, num_heads, head_dim]
) -> None:
    for task in prange(len(spans) * key_cache.shape[2] * num_parts):
        _run_task(
            np.int64(task),
            qkv,
            key_cache,
            value_cache,
            spans,
            block_tables,
            scaling,
            window,
            softcap,
            num_parts,
            output,
        )


@dataclass(slots=True)
class CpuPrefill(CpuAttention):
    """A pass of prompt chunks."""

    slot_mapping: Tensor  # [num_tokens]
    spans: InitVar[Sequence[PrefillSpan]]
    _spans: npt.NDArray[np.int64] = field(init=False)  # [num_reqs, 3]: see `_prefill`
    _block_tables: npt.NDArray[np.int64] = field(init=False)  # [num_reqs, max_blocks]

    def __post_init__(self, spans: Sequence[PrefillSpan]) -> None:
        self._spans = np.array([(span.query_start, span.query_end, span.start) for span in spans])
        self._block_tables = torch.stack([span.block_table for span in spans]).numpy()

    def attend_to_stored(
        self, qkv: Floats, key_cache: Floats, value_cache: Floats, scoring: Scoring, output: Floats
    ) -> None:
        """See `CpuAttention`."""
        num_tasks = len(self._spans) * key_cache.shape[2]
        _prefill(
            qkv,
            key_cache,
            value_cache,
            self._spans,
            self._block_tables,
            np.float32(scoring.scaling),
            scoring.window or 2**31,
            np.float32(scoring.softcap or 0.0),
            -(-_FEW_TASKS // num_tasks),
            output,
        )
