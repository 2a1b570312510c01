"""Paged attention against a slow float64 reference: every query on its own, over the whole history."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from engine_core.attention.cpu_decode import CpuDecode
from engine_core.attention.cpu_prefill import CpuPrefill
from engine_core.attention.paged import AttentionMetadata, ForwardContext, PagedLayer, paged_attention
from engine_core.attention.torch_backend import DecodeMetadata, PrefillMetadata, PrefillSpan

HEAD_DIM = 8
GARBAGE = 1e4  # what unused slots hold: seen through a wrong mask it would dominate


@dataclass(frozen=True)
class Case:
    """How a model scores: heads, window, soft cap and scaling."""

    num_heads: int = 4
    num_kv_heads: int = 2
    window: int | None = None
    softcap: float | None = None
    scaling: float | None = None


CASES = {
    "grouped": Case(),
    "one kv head": Case(6, 1),
    "all kv heads": Case(3, 3),
    "window 1": Case(window=1),
    "window 3": Case(window=3),
    "window 8": Case(window=8),
    "window 1000": Case(window=1000),
    "softcap": Case(softcap=1.5),
    "softcap and window": Case(softcap=1.5, window=5, scaling=0.9),
    "scaling": Case(scaling=0.2),
}


@dataclass
class Pool:
    """Requests with random K/V, whose blocks lie in random order among garbage."""

    case: Case
    block_size: int
    lengths: list[int]
    histories: list[tuple[Tensor, Tensor]] = field(init=False)  # [length, num_kv_heads, head_dim] each

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        per_request = [-(-length // self.block_size) for length in self.lengths]
        order = torch.randperm(sum(per_request) + 3, generator=self.generator).tolist()
        width = max(per_request) + 1
        taken = itertools.accumulate(per_request, initial=0)
        tables = [order[start : start + n] + [0] * (width - n) for start, n in zip(taken, per_request, strict=False)]
        self.block_tables = torch.tensor(tables)
        shape = (len(order), self.block_size, self.case.num_kv_heads, HEAD_DIM)
        context = ForwardContext()
        self.layer = PagedLayer(torch.full(shape, GARBAGE), torch.full(shape, GARBAGE), context)
        self.context = context
        self.histories = [(self.random(length), self.random(length)) for length in self.lengths]

    def random(self, length: int) -> Tensor:
        return torch.randn(length, self.case.num_kv_heads, HEAD_DIM, generator=self.generator)

    def slots(self, request: int, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        blocks = self.block_tables[request][positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def store(self, request: int, num_tokens: int) -> None:
        """What earlier passes computed."""
        slots = self.slots(request, 0, num_tokens)
        self.layer.key_cache.flatten(0, 1)[slots] = self.histories[request][0][:num_tokens]
        self.layer.value_cache.flatten(0, 1)[slots] = self.histories[request][1][:num_tokens]

    def attend(self, metadata: AttentionMetadata, query: Tensor, parts: list[tuple[int, int, int]]) -> Tensor:
        """The output [num_tokens, num_heads, head_dim] for (request, start, end) `parts` of one pass."""
        key, value = (
            torch.cat([self.histories[request][which][start:end] for request, start, end in parts]) for which in (0, 1)
        )
        self.context.metadata = metadata
        module = nn.Module()
        module.paged_layer = self.layer
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        case = self.case
        output, _ = paged_attention(module, q, k, v, None, case.scaling, case.window, case.softcap, dropout=0.0)
        return output[0]

    def reference(self, query: Tensor, request: int, position: int) -> Tensor:
        """One query [num_heads, head_dim] at `position`, in float64."""
        case = self.case
        first = 0 if case.window is None else max(0, position + 1 - case.window)
        key, value = (tensor[first : position + 1].double() for tensor in self.histories[request])
        outputs = []
        for head in range(case.num_heads):
            kv_head = head // (case.num_heads // case.num_kv_heads)
            scaling = HEAD_DIM**-0.5 if case.scaling is None else case.scaling
            scores = key[:, kv_head] @ query[head].double() * scaling
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            outputs.append(scores.softmax(0) @ value[:, kv_head])
        return torch.stack(outputs)

    def check(self, output: Tensor, query: Tensor, parts: list[tuple[int, int, int]]) -> None:
        places = [(request, position) for request, start, end in parts for position in range(start, end)]
        expected = torch.stack([self.reference(query[i], *place) for i, place in enumerate(places)])
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_prefill_chunks_over_cached_prefixes(case: Case, block_size: int) -> None:
    chunks = [(0, 9), (4, 11), (16, 17), (3, 20), (0, 1), (0, 16), (16, 32)]  # (cached, end) of each request
    pool = Pool(case, block_size, [end for _, end in chunks])
    parts, spans, query_start = [], [], 0
    for request, (start, end) in enumerate(chunks):
        pool.store(request, start)
        parts.append((request, start, end))
        query_end = query_start + end - start
        spans.append(PrefillSpan(query_start, query_end, start, end, pool.block_tables[request]))
        query_start = query_end
    slots = torch.cat([pool.slots(*part) for part in parts])
    query = torch.randn(query_start, case.num_heads, HEAD_DIM, generator=pool.generator)
    pool.check(pool.attend(PrefillMetadata(slots, block_size, spans), query, parts), query, parts)
    pool.check(pool.attend(CpuPrefill(slots, spans), query, parts), query, parts)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_decode_of_very_different_lengths(case: Case, block_size: int) -> None:
    lengths = [1, 2, 300, 16, 17, 15, 64, 33, 1, 5]
    pool = Pool(case, block_size, lengths)
    for request, length in enumerate(lengths):
        pool.store(request, length - 1)
    parts = [(request, length - 1, length) for request, length in enumerate(lengths)]
    slots = torch.cat([pool.slots(*part) for part in parts])
    query = torch.randn(len(lengths), case.num_heads, HEAD_DIM, generator=pool.generator)
    pool.check(pool.attend(CpuDecode(slots, pool.block_tables, lengths), query, parts), query, parts)
    stored = pool.layer.key_cache.clone()
    metadata = DecodeMetadata(slots, block_size, pool.block_tables, lengths)
    pool.check(pool.attend(metadata, query, parts), query, parts)
    assert torch.equal(pool.layer.key_cache, stored)


def test_one_pass_serves_layers_with_different_windows() -> None:
    lengths = [40, 7]
    for window in (None, 5, None, 9):
        pool = Pool(Case(window=window), 4, lengths)
        for request, length in enumerate(lengths):
            pool.store(request, length - 1)
        parts = [(request, length - 1, length) for request, length in enumerate(lengths)]
        slots = torch.cat([pool.slots(*part) for part in parts])
        metadata = DecodeMetadata(slots, 4, pool.block_tables, lengths)
        metadata.plan(5)  # another layer has asked before
        query = torch.randn(2, 4, HEAD_DIM, generator=pool.generator)
        pool.check(pool.attend(metadata, query, parts), query, parts)


def test_padding_of_a_decode_group_is_bounded() -> None:
    lengths = [1, 2, 3, 300, 290, 17, 40]
    pool = Pool(Case(), 4, lengths)
    metadata = DecodeMetadata(torch.zeros(len(lengths), dtype=torch.int64), 4, pool.block_tables, lengths)
    groups = metadata.plan(None)
    assert sorted(index for group in groups for index in group.tokens.tolist()) == list(range(len(lengths)))
    for group in groups:
        needed = [-(-lengths[index] // 4) for index in group.tokens.tolist()]
        assert group.blocks.shape == (len(needed), max(needed))
        assert max(needed) <= 2 * min(needed)


def test_a_window_reads_only_its_own_blocks() -> None:
    pool = Pool(Case(window=5), 4, [100])
    metadata = DecodeMetadata(torch.zeros(1, dtype=torch.int64), 4, pool.block_tables, [100])
    assert metadata.plan(5)[0].blocks.shape == (1, 2)
    span = PrefillSpan(0, 2, 98, 100, pool.block_tables[0])
    gathered = PrefillMetadata(torch.zeros(2, dtype=torch.int64), 4, [span]).plan(5)[0]
    assert gathered.blocks is not None
    assert len(gathered.blocks) == 2
