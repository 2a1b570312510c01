"""The sampler as two Triton kernels that fit into a CUDA graph: one pass over the logits, then advance the rows.

    kernel 1   request × vocabulary chunk   best of logits / T - log(-log u) in the chunk (T = 0: best logit, no noise)
    kernel 2   request                      best chunk → token; last_token[row] = token; num_tokens[row] += 1

The noise is the hash of sampler.py, number for number, so both draw the same tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_core.triton_launch import launch_options, launches_overlap, wait_for_earlier_kernels

_CHUNK = 4096
_NONE = tl.constexpr(1 << 30)


@triton.jit
def _splitmix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _chunk_kernel(
    best_ptr, index_ptr, logits_ptr, rows_ptr, temperature_ptr, seed_ptr, lengths_ptr,
    vocab_size, logits_stride, num_chunks, CHUNK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    request, chunk = tl.program_id(0), tl.program_id(1)
    wait_for_earlier_kernels(OVERLAPS)
    row = tl.load(rows_ptr + request)
    temperature = tl.load(temperature_ptr + row)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    at = request.to(tl.int64) * logits_stride + column
    scores = tl.load(logits_ptr + at, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    if temperature > 0:
        position = tl.load(lengths_ptr + row).to(tl.uint64)
        key = _splitmix64(tl.load(seed_ptr + row).to(tl.uint64) + _splitmix64(position))
        low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
        x = (column.to(tl.uint32) * 0x9E3779B1) ^ low
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = ((x ^ (x >> 13)) + high) * 0xC2B2AE35
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        # (x / 2^9 + 0.5) / 2^23 without a conversion, which is slow: x becomes the fraction of a number from 1 to 2
        uniform = ((x >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994039535522  # 1 - 2^-24
        # -log(-log u) in base 2, the GPU's native logarithm
        exponential = -tl.log2(uniform) * 0.6931471805599453
        scores = scores * (1.0 / temperature) - tl.log2(exponential) * 0.6931471805599453
    best = tl.max(scores, 0)
    index = tl.min(tl.where(scores == best, column, _NONE), 0)  # cheaper than a maximum that carries its index
    tl.store(best_ptr + request * num_chunks + chunk, best)
    tl.store(index_ptr + request * num_chunks + chunk, tl.minimum(index, vocab_size - 1))  # NaN equals nothing


@triton.jit
def _advance_kernel(
    tokens_ptr, best_ptr, index_ptr, rows_ptr, last_token_ptr, lengths_ptr, num_chunks, scratch_row,
    CHUNKS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels(OVERLAPS)
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    chunk = tl.arange(0, CHUNKS)
    best = tl.load(best_ptr + request * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf"))
    token = tl.load(index_ptr + request * num_chunks + tl.argmax(best, 0)).to(tl.int64)
    tl.store(tokens_ptr + request, token)
    if row != scratch_row:  # padding of a captured graph stays where it is
        tl.store(last_token_ptr + row, token)
        tl.store(lengths_ptr + row, tl.load(lengths_ptr + row) + 1)


def sample_and_advance(
    logits: Tensor,  # [num_reqs, vocab_size]
    rows: Tensor,  # [num_reqs] int64; the last row of the tables is scratch
    temperature: Tensor,  # [num_rows] float32
    seed: Tensor,  # [num_rows] int64
    last_token: Tensor,  # [num_rows] int64, updated
    lengths: Tensor,  # [num_rows] int64, updated: tokens of each row = position of the token to be drawn
) -> Tensor:
    """Token ids [num_reqs] int64, greedy or by temperature; the rows advance by that token."""
    num_reqs, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    best = torch.empty(num_reqs, num_chunks, device=logits.device)
    index = torch.empty(num_reqs, num_chunks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(num_reqs, dtype=torch.int64, device=logits.device)
    overlaps = launches_overlap(logits.device)
    _chunk_kernel[(num_reqs, num_chunks)](
        best, index, logits, rows, temperature, seed, lengths,
        vocab_size, logits.stride(0), num_chunks, CHUNK=_CHUNK, OVERLAPS=overlaps, num_warps=4,
        **launch_options(overlaps),
    )  # fmt: skip
    _advance_kernel[(num_reqs,)](
        tokens, best, index, rows, last_token, lengths, num_chunks, lengths.shape[0] - 1,
        CHUNKS=triton.next_power_of_2(num_chunks), OVERLAPS=overlaps, num_warps=1, **launch_options(overlaps),
    )  # fmt: skip
    return tokens
