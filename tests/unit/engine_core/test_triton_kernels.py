"""The GPU kernels against slow references: on a GPU as compiled, elsewhere interpreted (tests/conftest.py)."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine_core import triton_linear
from engine_core.attention import triton_decode
from engine_core.attention.triton_decode import SplitBuffers, fitting, paged_decode
from engine_core.attention.triton_prefill import paged_prefill, query_tiles, store_kv
from engine_core.sampler import SamplingTensors, sample
from engine_core.triton_launch import Limits
from engine_core.triton_linear import MAX_TOKENS, arrival_counters, gate, small_linear
from engine_core.triton_sampler import sample_and_advance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 16
LENGTHS = [1, 2, 65, 130, 700, 17]  # in tokens, by row
ROWS = [3, 0, 4, 1, 5, 2]  # the order of the batch

# heads, kv heads, head size, window, softcap, dtype
CASES = [
    (4, 2, 64, None, None, torch.float32),
    (9, 3, 64, 7, None, torch.float32),
    (4, 4, 80, 70, None, torch.float32),  # a head size that is no power of two
    (8, 1, 128, None, 30.0, torch.float32),
    (4, 2, 256, None, None, torch.float16),
    (8, 2, 64, 20, None, torch.float16),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


class Pool:
    """Caches full of random numbers, and block tables in random order."""

    def __init__(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        per_row = [-(-length // BLOCK_SIZE) for length in LENGTHS]
        blocks = torch.randperm(sum(per_row) + 4)
        self.table = torch.zeros(len(LENGTHS) + 1, max(per_row), dtype=torch.int64)
        for row, count in enumerate(per_row):
            self.table[row, :count] = blocks[sum(per_row[:row]) :][:count]
        self.table = self.table.to(DEVICE)
        shape = (len(blocks), BLOCK_SIZE, num_kv_heads, head_dim)
        self.keys = torch.randn(shape, device=DEVICE).to(dtype)
        self.values = torch.randn(shape, device=DEVICE).to(dtype)

    def slots(self, row: int, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end, device=DEVICE)
        return self.table[row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE

    def history(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        slots = self.slots(row, 0, length)
        return self.keys.flatten(0, 1)[slots], self.values.flatten(0, 1)[slots]


def reference(
    query: Tensor, key: Tensor, value: Tensor, start: int, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """float64 attention of queries [n, heads, d] at positions start … over key/value [length, kv_heads, d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries = torch.arange(start, start + query.shape[0], device=DEVICE)[:, None]
    keys = torch.arange(key.shape[0], device=DEVICE)
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def gated_reference(y: Tensor) -> Tensor:
    first, second = y.chunk(2, -1)
    return torch.nn.functional.silu(first) * second


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, gated: bool) -> Tensor:
    """float64 of what `small_linear` computes."""
    y = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    y = gated_reference(y) if gated else y
    return y if addend is None else y + addend.double()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_decode_stores_and_attends(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, kv_heads, dim, window, softcap, dtype = CASES[case]
    _, shape = triton_decode.SHAPES[case % len(triton_decode.SHAPES)]
    monkeypatch.setattr(triton_decode, "SHAPES", ((1 << 30, shape),))
    pool = Pool(kv_heads, dim, dtype)
    buffers = SplitBuffers.allocate(len(ROWS), heads, kv_heads, dim, DEVICE)
    rows, lengths = torch.tensor(ROWS, device=DEVICE), torch.tensor([*LENGTHS, 1], device=DEVICE)
    for order in ([0, 1, 2, 3, 4, 5], [4, 2, 0, 5, 1, 3]):  # any; the second time the buffers are used ones
        query = torch.randn(1, heads, len(ROWS), dim, device=DEVICE).to(dtype)[0].transpose(0, 1)  # a model's strides
        key, value = torch.randn(2, len(ROWS), kv_heads, dim, device=DEVICE).to(dtype)
        output = paged_decode(
            query, key, value, pool.keys, pool.values, torch.tensor(order, device=DEVICE), rows, lengths, pool.table,
            buffers, dim**-0.5, window, softcap,
        )  # fmt: skip
        for index, row in enumerate(ROWS):
            keys, values = pool.history(row, LENGTHS[row])
            assert torch.equal(keys[-1], key[index])
            assert torch.equal(values[-1], value[index])
            expected = reference(query[index : index + 1], keys, values, LENGTHS[row] - 1, dim**-0.5, window, softcap)
            assert error(output[index : index + 1], expected) < TOLERANCE[dtype]
    assert not buffers.arrivals.any()


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window", "softcap", "dtype"), CASES)
def test_prefill_attends_over_prefix_and_chunk(
    heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    pool = Pool(kv_heads, dim, dtype)
    starts = [100, 0, 150, 1, 0, 3]
    counts = [LENGTHS[row] - start for row, start in zip(ROWS, starts, strict=True)]
    query = torch.randn(sum(counts), heads, dim, device=DEVICE).to(dtype)
    key, value = torch.randn(2, sum(counts), kv_heads, dim, device=DEVICE).to(dtype)
    slots = [pool.slots(row, start, start + count) for row, start, count in zip(ROWS, starts, counts, strict=True)]
    store_kv(key, value, pool.keys, pool.values, torch.cat(slots))
    tiles = [*query_tiles(ROWS, starts, counts), (0, 0, 0, 0), (0, 0, 0, 0)]  # padding must change nothing
    output = paged_prefill(
        query, pool.keys, pool.values, torch.tensor(tiles, device=DEVICE), pool.table, dim**-0.5, window, softcap
    )
    first = 0
    for row, start, count in zip(ROWS, starts, counts, strict=True):
        own = slice(first, first + count)
        first += count
        keys, values = pool.history(row, start + count)
        assert torch.equal(keys[start:], key[own])
        expected = reference(query[own], keys, values, start, dim**-0.5, window, softcap)
        assert error(output[own], expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_tokens", [1, 3, 65, MAX_TOKENS])
@pytest.mark.parametrize(("out_features", "in_features", "bias"), [(40, 300, False), (40, 300, True), (64, 256, False)])
@pytest.mark.parametrize(("gated", "adds"), [(False, False), (True, False), (False, True)])
def test_small_linear_equals_linear(
    num_tokens: int, out_features: int, in_features: int, bias: bool, gated: bool, adds: bool
) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, in_features, device=DEVICE)
    weight = torch.randn(out_features, in_features, device=DEVICE)
    offset = torch.randn(out_features, device=DEVICE) if bias else None
    addend = torch.randn(num_tokens, out_features // 2 if gated else out_features, device=DEVICE) if adds else None
    arrivals = arrival_counters(out_features, DEVICE)
    expected = linear_reference(x, weight, offset, addend, gated)
    for _ in range(2):
        assert error(small_linear(x, weight, offset, arrivals, addend, gated), expected) < 1e-6
        assert not arrivals.any()


@pytest.mark.parametrize("num_tokens", [3, 40, 130])
@pytest.mark.parametrize(("gated", "adds"), [(False, False), (True, False), (False, True)])
def test_small_linear_of_wide_outputs_on_a_small_gpu(
    num_tokens: int, gated: bool, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several waves of wide programs, and few stages of the pipeline."""
    monkeypatch.setattr(triton_linear, "limits_of", lambda device: Limits(3, 99 << 10))
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, 256, device=DEVICE).half()
    weight = torch.randn(400, 256, device=DEVICE).half()
    addend = torch.randn(num_tokens, 400, device=DEVICE).half() if adds else None
    expected = linear_reference(x, weight, None, addend, gated)
    assert error(small_linear(x, weight, None, arrival_counters(400, DEVICE), addend, gated), expected) < 1e-3


def test_tiles_of_keys_fit_into_shared_memory() -> None:
    shape = triton_decode.Shape(128, 4, 2, 128)
    assert fitting(shape, 2 * 128 * 2, 227 << 10) == shape
    assert fitting(shape, 2 * 256 * 4, 227 << 10).tile == 32
    assert fitting(shape, 2 * 256 * 2, 99 << 10).tile == 32


def test_gate_of_many_tokens() -> None:
    x = torch.randn(300, 2 * 1100, device=DEVICE)
    assert error(gate(x), gated_reference(x.double())) < 1e-6


def test_sampler_draws_what_the_torch_sampler_draws() -> None:
    torch.manual_seed(0)
    rows = torch.tensor([3, 0, 4, 1, 5, 8], device=DEVICE)  # the last one is scratch
    temperature = torch.rand(9, device=DEVICE) + 0.3
    temperature[0] = 0.0  # greedy beside the others
    seed = torch.randint(-(2**62), 2**62, (9,), device=DEVICE)
    lengths = torch.randint(1, 100, (9,), device=DEVICE)
    last_token = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    logits = torch.randn(6, 9000, device=DEVICE) * 3
    expected = sample(logits, SamplingTensors(temperature[rows], seed[rows]), lengths[rows])
    advanced = lengths.clone()
    tokens = sample_and_advance(logits, rows, temperature, seed, last_token, advanced)
    assert tokens.tolist() == expected.tolist()
    assert (advanced - lengths).tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert last_token[rows[:-1]].tolist() == expected[:-1].tolist()
    assert last_token[8] == 0
