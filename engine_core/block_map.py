"""A picture of the KV cache that stays small whatever the pool's size: cells of blocks, equal neighbours in runs.

block     0  1  2  3  4  5  6  7        A = 3 is the request that came third, B = 5 shares block 2 with it
owner     3  3  3  0  0 -1  5  5        0 free, -1 cached
refs      1  1  2  0  0  0  1  1
runs      [2 × 3] [1 × 3, shared] [2 × 0] [1 × -1] [2 × 5]
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from engine_core.block_pool import BlockPool
from engine_core.request import Request
from minivllm.engine_view import BlockMap

MAX_CELLS = 4096
FREE, CACHED = 0, -1

Array = npt.NDArray[np.int64]


def draw_block_map(pool: BlockPool, requests: Iterable[Request]) -> BlockMap:
    """The map of `pool`, whose used blocks all belong to `requests`. Costs some 0.1 µs per used or cached block."""
    num_blocks = pool.num_blocks
    owners = np.zeros(num_blocks, np.int64)  # [num_blocks]
    references = np.zeros(num_blocks, np.int64)
    findable = np.fromiter(pool.findable, np.int64, len(pool.findable))
    owners[findable] = CACHED
    for request in sorted(requests, key=lambda request: -request.arrival_index):  # the first to come is drawn last
        table = np.array(request.block_table, np.int64)
        owners[table] = request.arrival_index
        references[table] += 1  # a table names each block once
    used, cached = int((references > 0).sum()), int((owners == CACHED).sum())
    per_cell = -(-num_blocks // MAX_CELLS)
    lengths, cell_owners, cell_references = _runs(*_cells(owners, references, per_cell))
    return BlockMap(
        num_blocks, per_cell, lengths, cell_owners, cell_references, used, cached, num_blocks - used - cached
    )


def _cells(owners: Array, references: Array, per_cell: int) -> tuple[Array, Array]:
    """[num_blocks] → [num_cells]: of several blocks a cell shows the one that came last to be owned, else cached."""
    if per_cell == 1:
        return owners, references
    padding = (0, -len(owners) % per_cell)
    ranks = np.where(owners == CACHED, 1, 2 * owners)  # used before cached before free
    best = np.pad(ranks, padding).reshape(-1, per_cell).max(axis=1)
    return np.where(best == 1, CACHED, best // 2), np.pad(references, padding).reshape(-1, per_cell).max(axis=1)


def _runs(owners: Array, references: Array) -> tuple[list[int], list[int], list[int]]:
    """Lengths, owners and references of the runs of equal cells."""
    changes = (np.diff(owners) != 0) | (np.diff(references) != 0)
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
    lengths = np.diff(np.concatenate((starts, [len(owners)])))
    return lengths.tolist(), owners[starts].tolist(), references[starts].tolist()
