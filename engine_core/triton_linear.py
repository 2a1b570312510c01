"""y = x Wᵀ for the batches of a decode step, at memory speed: such a step is little else than reading the weights.

    grid     columns × share of the inner dimension × tokens     enough programs to keep all memory channels busy
    last     of the shares of a tile to arrive adds them up in a fixed order: the same result every time

What cuBLAS does as well or better, larger batches above all, is left to it. `is_faster` says which: measured on an
H200, behind a small kernel as in a layer, because much of a step is the time between kernels (triton_launch.py).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from engine_core.triton_launch import launch_options, launches_overlap, wait_for_earlier_kernels

MAX_TOKENS = 128
_FEW_TOKENS, _PART_TOKENS = 16, 64  # of a program: one part for a handful of tokens, else parts of this size
_BLOCK_N, _BLOCK_K, _NUM_WARPS = 32, 128, 4
_MIN_PROGRAMS = 128
_MAX_INNER = 8192  # of one share
_WORTH_SPLITTING = 4096  # such a share, where each multiprocessor has but one program: two of them load more at once


@triton.jit
def _linear_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, partial_ptr, arrivals_ptr,
    num_tokens, out_features, in_features, x_stride,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHARES: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    tile, share, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = part * TOKENS + tl.arange(0, TOKENS)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    token_ok, column_ok = tokens < num_tokens, columns < out_features
    x_at = x_ptr + tokens[:, None] * x_stride + inner[None, :]
    weight_at = weight_ptr + columns[:, None].to(tl.int64) * in_features + inner[None, :]
    acc = tl.zeros([TOKENS, BLOCK_N], tl.float32)
    num_blocks = tl.cdiv(in_features, BLOCK_K)
    per_share = tl.cdiv(num_blocks, SHARES)
    wait_for_earlier_kernels(OVERLAPS)
    for block in tl.range(share * per_share, tl.minimum((share + 1) * per_share, num_blocks)):
        if EVEN:
            x = tl.load(x_at + block * BLOCK_K, mask=token_ok[:, None], other=0.0)
            weight = tl.load(weight_at + block * BLOCK_K)
        else:
            ok = block * BLOCK_K + inner < in_features
            x = tl.load(x_at + block * BLOCK_K, mask=token_ok[:, None] & ok[None, :], other=0.0)
            weight = tl.load(weight_at + block * BLOCK_K, mask=column_ok[:, None] & ok[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
    if SHARES > 1:
        pair = part * tl.num_programs(0) + tile
        cell = tl.arange(0, TOKENS)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partial_ptr + (pair * SHARES + share) * TOKENS * BLOCK_N + cell, acc)
        tl.debug_barrier()  # every thread's stores come before the arrival is announced
        if tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel") < SHARES - 1:
            return
        tl.store(arrivals_ptr + pair, 0)  # ready for the next call
        acc = tl.zeros([TOKENS, BLOCK_N], tl.float32)
        for other in tl.static_range(SHARES):
            at = (pair * SHARES + other) * TOKENS * BLOCK_N
            acc += tl.load(partial_ptr + at + cell, cache_modifier=".cg")
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + tokens[:, None] * out_features + columns[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=token_ok[:, None] & column_ok[None, :])


class Tiles(NamedTuple):
    """How the work of one product is cut."""

    num_tokens: int  # per program
    num_columns: int  # tiles of `_BLOCK_N`
    num_shares: int
    num_parts: int  # of the tokens


def arrival_counters(out_features: int, device: torch.device) -> Tensor:
    """What `small_linear` needs beside the weights: one zero per tile and part, zero again after every call."""
    num_parts = triton.cdiv(MAX_TOKENS, _PART_TOKENS)
    return torch.zeros(triton.cdiv(out_features, _BLOCK_N) * num_parts, dtype=torch.int32, device=device)


def small_linear(x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor) -> Tensor:
    """[num_tokens, out_features] from x [num_tokens <= 128, in_features] and weight [out_features, in_features]."""
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    tiles = _tiles(num_tokens, out_features, in_features)
    overlaps = launches_overlap(x.device)
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    cells = tiles.num_columns * tiles.num_parts * tiles.num_shares * tiles.num_tokens * _BLOCK_N
    partial = torch.empty(cells if tiles.num_shares > 1 else 0, device=x.device)
    _linear_kernel[tiles.num_columns, tiles.num_shares, tiles.num_parts](
        out, x, weight, weight if bias is None else bias, partial, arrivals,
        num_tokens, out_features, in_features, x.stride(0),
        TOKENS=tiles.num_tokens, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, SHARES=tiles.num_shares, BIAS=bias is not None,
        EVEN=in_features % _BLOCK_K == 0 and out_features % _BLOCK_N == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", OVERLAPS=overlaps,
        num_warps=_NUM_WARPS, num_stages=_num_stages(x.dtype, in_features // tiles.num_shares),
        **launch_options(overlaps),
    )  # fmt: skip
    return out


def is_faster(num_tokens: int, weight: Tensor) -> bool:
    """Whether `small_linear` beats cuBLAS for so many tokens."""
    out_features, in_features = weight.shape
    if num_tokens <= _FEW_TOKENS:
        return out_features <= 8192
    if weight.dtype == torch.float32:  # no tensor cores
        return False
    if num_tokens <= _PART_TOKENS:
        return (out_features <= 4096 and in_features <= 8192) or out_features * in_features <= 1 << 23
    return num_tokens <= MAX_TOKENS and out_features * in_features <= 1 << 22 and out_features <= in_features


def _tiles(num_tokens: int, out_features: int, in_features: int) -> Tiles:
    tokens = _FEW_TOKENS if num_tokens <= _FEW_TOKENS else _PART_TOKENS
    columns, parts = triton.cdiv(out_features, _BLOCK_N), triton.cdiv(num_tokens, tokens)
    shares = 1
    while shares < 8 and (columns * parts * shares < _MIN_PROGRAMS or in_features > _MAX_INNER * shares):
        shares *= 2
    if tokens == _FEW_TOKENS and columns * shares <= _MIN_PROGRAMS and in_features >= _WORTH_SPLITTING * shares:
        shares *= 2
    return Tiles(tokens, columns, shares, parts)


def _num_stages(dtype: torch.dtype, inner: int) -> int:
    if dtype == torch.float32:
        return 3
    return 6 if inner >= 2048 else 4


class SmallBatchLinear(nn.Module):
    """Stands where an `nn.Linear` stood: the kernel above where it is faster, cuBLAS elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("arrivals", arrival_counters(linear.out_features, linear.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.minivllm.linear(x, self.weight, self.bias, self.arrivals)
        return y


@torch.library.custom_op("minivllm::linear", mutates_args=())  # `arrivals` is as before when the kernel ends
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor) -> Tensor:
    tokens = x.flatten(0, -2)
    if not is_faster(tokens.shape[0], weight) or tokens.stride(1) != 1:
        return nn.functional.linear(x, weight, bias)
    return small_linear(tokens, weight, bias, arrivals).view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def speed_up_small_batches(layers: Iterable[nn.Module]) -> int:
    """Replace, inside `layers`, the linears for which `small_linear` is ever faster; returns how many."""
    replaced = 0
    for layer in layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and is_faster(1, child.weight):
                    setattr(parent, name, SmallBatchLinear(child))
                    replaced += 1
    return replaced
