"""y = x Wᵀ for a handful of tokens, at memory speed: a decode step of few requests is nothing but reading the weights.

    grid     output tile × share of the inner dimension     enough programs to keep all memory channels busy
    last     of the shares of a tile to arrive adds them up in a fixed order: the same result every time

Larger batches go to cuBLAS, which is better where arithmetic matters.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

MAX_TOKENS = 16
_MIN_BLOCK_N = 16
_MAX_OUT_FEATURES = 4096


@triton.jit
def _linear_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, partial_ptr, arrivals_ptr,
    num_tokens, out_features, in_features, x_stride,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHARES: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, share = tl.program_id(0), tl.program_id(1)
    tokens = tl.arange(0, TOKENS)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    token_ok, column_ok = tokens < num_tokens, columns < out_features
    x_at = x_ptr + tokens[:, None] * x_stride + inner[None, :]
    weight_at = weight_ptr + columns[:, None].to(tl.int64) * in_features + inner[None, :]
    acc = tl.zeros([TOKENS, BLOCK_N], tl.float32)
    num_blocks = tl.cdiv(in_features, BLOCK_K)
    per_share = tl.cdiv(num_blocks, SHARES)
    for block in tl.range(share * per_share, tl.minimum((share + 1) * per_share, num_blocks)):
        ok = block * BLOCK_K + inner < in_features
        x = tl.load(x_at + block * BLOCK_K, mask=token_ok[:, None] & ok[None, :], other=0.0)
        weight = tl.load(weight_at + block * BLOCK_K, mask=column_ok[:, None] & ok[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
    if SHARES > 1:
        cell = tokens[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partial_ptr + (tile * SHARES + share) * TOKENS * BLOCK_N + cell, acc)
        tl.debug_barrier()  # every thread's stores come before the arrival is announced
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") < SHARES - 1:
            return
        tl.store(arrivals_ptr + tile, 0)  # ready for the next call
        acc = tl.zeros([TOKENS, BLOCK_N], tl.float32)
        for other in tl.static_range(SHARES):
            at = (tile * SHARES + other) * TOKENS * BLOCK_N
            acc += tl.load(partial_ptr + at + cell, cache_modifier=".cg")
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + tokens[:, None] * out_features + columns[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=token_ok[:, None] & column_ok[None, :])


def arrival_counters(out_features: int, device: torch.device) -> Tensor:
    """What `small_linear` needs beside the weights: one zero per tile, zero again after every call."""
    return torch.zeros(triton.cdiv(out_features, _MIN_BLOCK_N), dtype=torch.int32, device=device)


def small_linear(x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor) -> Tensor:
    """[num_tokens, out_features] from x [num_tokens <= 16, in_features] and weight [out_features, in_features]."""
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    block_n, block_k, shares, warps = _shape(out_features, in_features)
    num_tiles = triton.cdiv(out_features, block_n)
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    partial = torch.empty(num_tiles * shares * MAX_TOKENS * block_n if shares > 1 else 0, device=x.device)
    _linear_kernel[(num_tiles, shares)](
        out, x, weight, weight if bias is None else bias, partial, arrivals,
        num_tokens, out_features, in_features, x.stride(0),
        TOKENS=MAX_TOKENS, BLOCK_N=block_n, BLOCK_K=block_k, SHARES=shares, BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=4,
    )  # fmt: skip
    return out


def _shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """(columns per tile, inner block, shares, warps)."""
    if in_features >= 2 * out_features:
        return 32, 128, 4, 4
    return 32, 128, 2, 4


class SmallBatchLinear(nn.Module):
    """Stands where an `nn.Linear` stood: the kernel above for a handful of tokens, cuBLAS for more."""

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
    if tokens.shape[0] > MAX_TOKENS or tokens.stride(1) != 1:
        return nn.functional.linear(x, weight, bias)
    return small_linear(tokens, weight, bias, arrivals).view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def speed_up_small_batches(layers: Iterable[nn.Module]) -> int:
    """Replace, inside `layers`, the linears that cuBLAS is slow at for few tokens: few outputs, long sums."""
    replaced = 0
    for layer in layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.in_features >= child.out_features <= _MAX_OUT_FEATURES:
                    setattr(parent, name, SmallBatchLinear(child))
                    replaced += 1
    return replaced
