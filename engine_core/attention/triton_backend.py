"""Paged attention on a GPU: what a pass hands to the Triton kernels. All on the device, so passes can be captured."""

from dataclasses import dataclass

from torch import Tensor

from engine_core.attention.paged import Scoring
from engine_core.attention.triton_decode import SplitBuffers, paged_decode
from engine_core.attention.triton_prefill import paged_prefill, store_kv


@dataclass(slots=True)
class TritonPrefill:
    """A pass of prompt chunks."""

    slots: Tensor  # [num_tokens] int64
    tiles: Tensor  # [num_tiles, 4] int64, see `query_tiles`
    block_table: Tensor  # [num_rows, max_blocks] int64

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scoring: Scoring
    ) -> Tensor:
        """See `AttentionMetadata`."""
        store_kv(key, value, key_cache, value_cache, self.slots)
        scaling, window, softcap = scoring.scaling, scoring.window, scoring.softcap
        return paged_prefill(query, key_cache, value_cache, self.tiles, self.block_table, scaling, window, softcap)


@dataclass(slots=True)
class TritonDecode:
    """A pass of one token per request."""

    order: Tensor  # [num_reqs] int64, longest contexts first
    rows: Tensor  # [num_reqs] int64
    lengths: Tensor  # [num_rows] int64
    block_table: Tensor  # [num_rows, max_blocks] int64
    buffers: SplitBuffers

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scoring: Scoring
    ) -> Tensor:
        """See `AttentionMetadata`."""
        return paged_decode(
            query, key, value, key_cache, value_cache, self.order, self.rows, self.lengths, self.block_table,
            self.buffers, scoring.scaling, scoring.window, scoring.softcap,
        )  # fmt: skip
