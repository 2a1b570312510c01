"""y = x Wᵀ for the batches of a decode step, at memory speed: such a step is little else than reading the weights.

    grid     columns × share of the inner dimension × tokens     one wave, a program for each multiprocessor, or many
    end      gate (SiLU of one half times the other) and addend of the layer come without kernels of their own
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

from engine_core.triton_launch import launch_options, launches_overlap, limits_of, wait_for_earlier_kernels

MAX_TOKENS = 256
_FEW_TOKENS, _PART_TOKENS = 16, 64  # of a program: one part for a handful of tokens, else parts of this size
_NARROWEST, _BLOCK_K, _NUM_WARPS = 32, 128, 4
_MAX_INNER = 8192  # of one share, for few tokens
_FEWEST_STAGES = 6  # of a program in a single wave
_SCRATCH = 16 << 10  # bytes of shared memory beside the pipeline
_GATE_BLOCK = 1024


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, addend_ptr, partial_ptr, arrivals_ptr,
    num_tokens, out_features, in_features, x_stride,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHARES: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, ADDS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    tile, share, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = part * TOKENS + tl.arange(0, TOKENS)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # outputs of a tile
    lane = tl.arange(0, BLOCK_N)
    columns = tile * WIDTH + lane % WIDTH
    inner = tl.arange(0, BLOCK_K)
    token_ok, column_ok = tokens < num_tokens, columns < out_features
    x_at = x_ptr + tokens[:, None] * x_stride + inner[None, :]
    lines = columns + lane // WIDTH * out_features  # of the weights: those of the gates, then as many of what they gate
    weight_at = weight_ptr + lines[:, None].to(tl.int64) * in_features + inner[None, :]
    num_blocks = tl.cdiv(in_features, BLOCK_K)
    per_share = tl.cdiv(num_blocks, SHARES)
    acc = tl.zeros([TOKENS, BLOCK_N], tl.float32)
    if BIAS:
        acc += tl.load(bias_ptr + lines, mask=column_ok & (share == 0), other=0.0).to(tl.float32)[None, :]
    wait_for_earlier_kernels(OVERLAPS)
    if ADDS:  # on its way while the sums are made
        addend_at = addend_ptr + tokens[:, None] * out_features + columns[None, :]
        addend = tl.load(addend_at, mask=token_ok[:, None] & column_ok[None, :], other=0.0)
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
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [TOKENS, 2, WIDTH]), 0, 2, 1))
        acc = gate * tl.sigmoid(gate) * up
        columns = tile * WIDTH + tl.arange(0, WIDTH)
    if ADDS:
        acc += addend.to(tl.float32)
    out_at = out_ptr + tokens[:, None] * out_features + columns[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=token_ok[:, None] & (columns < out_features)[None, :])


class Tiles(NamedTuple):
    """How the work of one product is cut."""

    num_tokens: int  # per program
    width: int  # lines of the weights per program
    num_columns: int  # programs side by side
    num_shares: int
    num_parts: int  # of the tokens
    num_stages: int  # of the software pipeline


def arrival_counters(num_lines: int, device: torch.device) -> Tensor:
    """What `small_linear` needs beside weights of so many lines: a zero per tile and part, zero again after a call."""
    num_parts = triton.cdiv(MAX_TOKENS, _PART_TOKENS)
    return torch.zeros(triton.cdiv(num_lines, _NARROWEST) * num_parts, dtype=torch.int32, device=device)


def small_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor, addend: Tensor | None = None, gated: bool = False
) -> Tensor:
    """[num_tokens, out_features] from x [num_tokens <= 256, in_features] and weight [out_features, in_features].

    `addend`, of the result's shape, is added. `gated`: half as many outputs, SiLU of the first half times the second.
    One of them at most.
    """
    num_tokens, in_features = x.shape
    out_features = weight.shape[0] // 2 if gated else weight.shape[0]
    tiles = _tiles(num_tokens, weight)
    overlaps = launches_overlap(x.device)
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    cells = tiles.num_columns * tiles.num_parts * tiles.num_shares * tiles.num_tokens * tiles.width
    partial = torch.empty(cells if tiles.num_shares > 1 else 0, device=x.device)
    _linear_kernel[tiles.num_columns, tiles.num_shares, tiles.num_parts](
        out, x, weight, weight if bias is None else bias, weight if addend is None else addend, partial, arrivals,
        num_tokens, out_features, in_features, x.stride(0),
        TOKENS=tiles.num_tokens, BLOCK_N=tiles.width, BLOCK_K=_BLOCK_K, SHARES=tiles.num_shares, BIAS=bias is not None,
        GATED=gated, ADDS=addend is not None, EVEN=in_features % _BLOCK_K == 0 and weight.shape[0] % tiles.width == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", OVERLAPS=overlaps,
        num_warps=_NUM_WARPS, num_stages=tiles.num_stages, **launch_options(overlaps),
    )  # fmt: skip
    return out


def is_faster(num_tokens: int, weight: Tensor) -> bool:
    """Whether `small_linear` beats cuBLAS for so many tokens."""
    if weight.dtype == torch.float32:  # no tensor cores
        return num_tokens <= _FEW_TOKENS and weight.shape[0] <= 8192
    if num_tokens <= _PART_TOKENS:
        return True
    num_programs = triton.cdiv(weight.shape[0], _NARROWEST) * triton.cdiv(num_tokens, _PART_TOKENS)
    return num_tokens <= MAX_TOKENS and num_programs <= limits_of(weight.device).num_multiprocessors


def _tiles(num_tokens: int, weight: Tensor) -> Tiles:
    """As narrow as fits into one wave, and then as many shares; the widest outputs take several waves.

    The pipeline of a program in a single wave is deep: mostly no two fit onto a multiprocessor. Such programs start
    while the kernel before still ends, and would gather where that ends first.
    """
    num_lines, in_features = weight.shape
    device, are_few = limits_of(weight.device), num_tokens <= _FEW_TOKENS
    tokens, widest = (_FEW_TOKENS, 64) if are_few else (_PART_TOKENS, 128)
    parts = triton.cdiv(num_tokens, tokens)
    width = _NARROWEST
    while width < widest and triton.cdiv(num_lines, width) * parts > device.num_multiprocessors:
        width *= 2
    columns, shares = triton.cdiv(num_lines, width), 1
    while shares < 8 and columns * parts * shares * 2 <= device.num_multiprocessors:
        shares *= 2
    if are_few and shares == 1 and in_features > _MAX_INNER:
        shares = 2
    stage = (tokens + width) * _BLOCK_K * weight.dtype.itemsize
    if columns * parts * shares > 2 * device.num_multiprocessors or weight.dtype == torch.float32:
        stages = 3
    else:
        stages = max(_FEWEST_STAGES, device.shared_memory // (2 * stage) + 1)
    possible = (device.shared_memory - _SCRATCH) // stage
    return Tiles(tokens, width, columns, shares, parts, max(1, min(stages, possible)))


@triton.jit
def _gate_kernel(out_ptr, x_ptr, width, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_earlier_kernels(OVERLAPS)
    gate = tl.load(x_ptr + token * 2 * width + column, mask=column < width).to(tl.float32)
    up = tl.load(x_ptr + (token * 2 + 1) * width + column, mask=column < width).to(tl.float32)
    tl.store(
        out_ptr + token * width + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), column < width
    )


def gate(x: Tensor) -> Tensor:
    """SiLU of the first half of each line of x [num_tokens, 2 * width] times the second half: [num_tokens, width]."""
    num_tokens, width = x.shape[0], x.shape[1] // 2
    overlaps = launches_overlap(x.device)
    out = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    _gate_kernel[num_tokens, triton.cdiv(width, _GATE_BLOCK)](
        out, x, width, BLOCK=_GATE_BLOCK, OVERLAPS=overlaps, **launch_options(overlaps)
    )
    return out


class SmallBatchLinear(nn.Module):
    """Stands where an `nn.Linear` stood: the kernel above where it is faster, cuBLAS elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("arrivals", arrival_counters(linear.out_features, linear.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = LINEAR(x, self.weight, self.bias, self.arrivals)
        return y


@torch.library.custom_op("minivllm::linear", mutates_args=())  # `arrivals` is as before when the kernel ends
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor, addend: Tensor | None = None, gated: bool = False
) -> Tensor:
    tokens = x.flatten(0, -2)
    shape = [*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0]]
    addend = None if addend is None else addend.contiguous()
    if is_faster(tokens.shape[0], weight) and tokens.stride(1) == 1:
        return small_linear(tokens, weight, bias, arrivals, addend, gated).view(shape)
    y = nn.functional.linear(tokens, weight, bias)
    y = (gate(y) if gated else y).view(shape)
    return y if addend is None else addend + y


@_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor, addend: Tensor | None = None, gated: bool = False
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0])


LINEAR = torch.ops.minivllm.linear.default


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
