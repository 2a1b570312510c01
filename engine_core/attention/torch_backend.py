"""Paged attention with torch alone: the reference, and what runs on a CPU in other formats than float32.

Layers may see the past through different sliding windows, so the plans of what to gather are made per window, once a
pass, by the first layer that asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine_core.attention.paged import Scoring


@dataclass(slots=True)
class PrefillSpan:
    """One request's chunk: tokens [query_start, query_end) of the pass, at positions [start, end) of its context."""

    query_start: int
    query_end: int
    start: int
    end: int
    block_table: Tensor  # [max_blocks] on the device


@dataclass(slots=True)
class GatheredSpan:
    """How one chunk attends under one window: the blocks to read and the mask, or None where plain causal is enough."""

    span: PrefillSpan
    blocks: Tensor | None  # [num_blocks]; None: the chunk is its whole context
    mask: Tensor | None  # [query_len, num_blocks * block_size] bool; None: causal


@dataclass(slots=True)
class DecodeGroup:
    """Decoding requests of similar length, padded to the longest of the group."""

    tokens: Tensor  # [group_size] index into the pass's tokens
    blocks: Tensor  # [group_size, num_blocks]
    mask: Tensor  # [group_size, 1, 1, num_blocks * block_size] bool


@dataclass
class PrefillMetadata:
    """A pass of prompt chunks."""

    slot_mapping: Tensor  # [num_tokens] slot = block * block_size + offset
    block_size: int
    spans: list[PrefillSpan]
    _plans: dict[int | None, list[GatheredSpan]] = field(default_factory=dict)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scoring: Scoring
    ) -> Tensor:
        """See `AttentionMetadata`."""
        store(key, value, key_cache, value_cache, self.slot_mapping)
        outputs = []
        for gathered in self.plan(scoring.window):
            tokens = slice(gathered.span.query_start, gathered.span.query_end)
            past_key, past_value = key[tokens], value[tokens]
            if gathered.blocks is not None:
                past_key, past_value = _gather(key_cache, value_cache, gathered.blocks)
            outputs.append(_attend(query[tokens], past_key, past_value, gathered.mask, scoring))
        return torch.cat(outputs)

    def plan(self, window: int | None) -> list[GatheredSpan]:
        """One `GatheredSpan` per request, for layers whose queries see the last `window` positions (None: all)."""
        if window not in self._plans:
            self._plans[window] = [self._gathered(span, window) for span in self.spans]
        return self._plans[window]

    def _gathered(self, span: PrefillSpan, window: int | None) -> GatheredSpan:
        if span.start == 0 and (window is None or span.end <= window):
            return GatheredSpan(span, None, None)
        first_key = 0 if window is None else max(0, span.start - window + 1)
        first_block, end_block = first_key // self.block_size, -(-span.end // self.block_size)
        device = span.block_table.device
        keys = torch.arange(first_block * self.block_size, end_block * self.block_size, device=device)
        queries = torch.arange(span.start, span.end, device=device)[:, None]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        return GatheredSpan(span, span.block_table[first_block:end_block], mask)


@dataclass
class DecodeMetadata:
    """A pass of one token per request."""

    slot_mapping: Tensor  # [num_reqs]
    block_size: int
    block_tables: Tensor  # [num_reqs, max_blocks]
    context_lens: Sequence[int]  # on the host: keys each query sees, its own included
    _plans: dict[int | None, list[DecodeGroup]] = field(default_factory=dict)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scoring: Scoring
    ) -> Tensor:
        """See `AttentionMetadata`."""
        store(key, value, key_cache, value_cache, self.slot_mapping)
        output = torch.empty_like(query)
        for group in self.plan(scoring.window):
            past_key, past_value = _gather(key_cache, value_cache, group.blocks)
            output[group.tokens] = _attend(query[group.tokens][:, None], past_key, past_value, group.mask, scoring)[
                :, 0
            ]
        return output

    def plan(self, window: int | None) -> list[DecodeGroup]:
        """Requests grouped so that padding to the longest of a group at most doubles what is read."""
        if window not in self._plans:
            self._plans[window] = [self._group(members, window) for members in self._by_length(window)]
        return self._plans[window]

    def _first_block(self, context_len: int, window: int | None) -> int:
        return 0 if window is None else max(0, context_len - window) // self.block_size

    def _by_length(self, window: int | None) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(self.context_lens):
            num_blocks = -(-length // self.block_size) - self._first_block(length, window)
            groups.setdefault(num_blocks.bit_length(), []).append(index)
        return list(groups.values())

    def _group(self, members: list[int], window: int | None) -> DecodeGroup:
        device, bs = self.block_tables.device, self.block_size
        lens = [self.context_lens[index] for index in members]
        first_blocks = [self._first_block(length, window) for length in lens]
        width = max(-(-length // bs) - first for length, first in zip(lens, first_blocks, strict=True))
        tokens = torch.tensor(members, device=device)
        context = torch.tensor(lens, device=device)[:, None]  # [group_size, 1]
        first = torch.tensor(first_blocks, device=device)[:, None]
        columns = first + torch.arange(width, device=device)  # [group_size, width]
        columns = columns.clamp_(max=self.block_tables.shape[1] - 1)  # padding: any block, masked below
        blocks = self.block_tables[tokens[:, None], columns]
        keys = first * bs + torch.arange(width * bs, device=device)  # [group_size, width * bs]
        mask = keys < context
        if window is not None:
            mask &= keys >= context - window
        return DecodeGroup(tokens, blocks, mask[:, None, None])


def store(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Put key and value [num_tokens, num_kv_heads, head_dim] into `slots` [num_tokens] of the caches."""
    key_cache.flatten(0, 1).index_copy_(0, slots, key)
    value_cache.flatten(0, 1).index_copy_(0, slots, value)


def _gather(key_cache: Tensor, value_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [*, num_tokens, num_kv_heads, head_dim] of block numbers [*, num_blocks]."""
    return key_cache[blocks].flatten(-4, -3), value_cache[blocks].flatten(-4, -3)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """query [*, q, heads, d], key/value [*, k, kv_heads, d], mask [*, 1, q, k] or None: causal → like query."""
    query, key, value = (tensor.transpose(-3, -2) for tensor in (query, key, value))
    if query.ndim == 3:  # one request: scaled_dot_product_attention wants a batch
        return _scores_to_output(query[None], key[None], value[None], mask, scoring)[0].transpose(-3, -2)
    return _scores_to_output(query, key, value, mask, scoring).transpose(-3, -2)


def _scores_to_output(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    if scoring.softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scoring.scaling, enable_gqa=True
        )
    if mask is None:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1) * (scoring.scaling / scoring.softcap)
    scores = (scoring.softcap * torch.tanh(scores)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
