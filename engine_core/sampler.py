"""From logits to tokens: a pure function of (logits, parameters, seed, position), on whatever device they live.

Randomness is counter-based: the noise of vocabulary entry v at position p of a request with seed s is a hash of
(s, p, v). There is no generator state, so a request draws the same tokens alone, in any batch, after preemption or in
another process. Drawing is the Gumbel-max trick, argmax(logits / T - log(-log u)): no sort, no synchronisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_HASH_COLUMN = -1640531535  # 0x9E3779B1 as int32: the golden ratio, decorrelates neighbouring vocabulary entries
_MURMUR_1 = -2048144789  # 0x85EBCA6B
_MURMUR_2 = -1028477387  # 0xC2B2AE35
_SPLITMIX_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_SPLITMIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SPLITMIX_2 = -7723592293110705685  # 0x94D049BB133111EB


@dataclass(slots=True)
class SamplingTensors:
    """Parameters of the rows of one batch, each [num_reqs]; what no row uses is None and costs nothing."""

    temperature: Tensor  # float32; 0 = greedy
    seed: Tensor  # int64
    top_k: Tensor | None = None  # int64; 0 = all
    top_p: Tensor | None = None  # float32
    min_p: Tensor | None = None  # float32


def sample(logits: Tensor, params: SamplingTensors | None, positions: Tensor) -> Tensor:
    """Token ids [num_reqs] from logits [num_reqs, vocab_size]; `positions` [num_reqs] are those of the new tokens.

    `params` None means that every row is greedy.
    """
    greedy = _argmax(logits)
    if params is None:
        return greedy
    is_greedy = params.temperature <= 0
    scaled = logits.float() * torch.where(is_greedy, 1.0, params.temperature).reciprocal()[:, None]
    scaled = _keep_most_probable(scaled, params)
    noise = exponential_noise(params.seed, positions, logits.shape[-1])
    return torch.where(is_greedy, greedy, _argmax(scaled - noise.log_()))


def _argmax(logits: Tensor) -> Tensor:
    """Index of the largest of each row. On a CPU torch takes 60 times as long as numpy."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))


def exponential_noise(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Independent Exp(1) numbers [num_reqs, vocab_size], a hash of (seed [num_reqs], position [num_reqs], column)."""
    key = _splitmix64(seed + _splitmix64(positions))[:, None]  # [num_reqs, 1] int64
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)
    x = torch.arange(vocab_size, dtype=torch.int32, device=seed.device) * _HASH_COLUMN ^ low
    x = (x ^ _shift_right(x, 16)).mul_(_MURMUR_1)
    x = (x ^ _shift_right(x, 13)).add_(high).mul_(_MURMUR_2)
    x = x ^ _shift_right(x, 16)
    x = x.mul_(_MURMUR_1)
    uniform = (_shift_right(x, 9).float() + 0.5) * 2.0**-23  # in (0, 1); with 24 bits the largest would round to 1
    return uniform.log_().neg_()


def apply_penalties(
    logits: Tensor, prompt_mask: Tensor, output_counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Penalised copy of logits [n, vocab_size]. prompt_mask bool and output_counts int [n, vocab_size]; the rest [n].

    repetition divides positive and multiplies negative logits of every token of prompt or output (CTRL, 2019);
    presence and frequency are subtracted, once or per occurrence in the output (OpenAI).
    """
    in_output = output_counts > 0
    penalised = torch.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits = torch.where(prompt_mask | in_output, penalised, logits)
    return logits - frequency[:, None] * output_counts - presence[:, None] * in_output


def _keep_most_probable(logits: Tensor, params: SamplingTensors) -> Tensor:
    """-inf for what top-k, then top-p, then min-p drop. Ties with the last kept entry stay."""
    floor = torch.full_like(logits[:, :1], float("-inf"))  # [num_reqs, 1] smallest kept logit
    if params.top_k is not None or params.top_p is not None:
        ordered = logits.sort(descending=True).values
        if params.top_k is not None:
            last = torch.where(params.top_k > 0, params.top_k, ordered.shape[-1]).clamp(max=ordered.shape[-1]) - 1
            floor = ordered.gather(-1, last[:, None])
            ordered = ordered.masked_fill(ordered < floor, float("-inf"))
        if params.top_p is not None:
            probs = ordered.softmax(-1)
            before = probs.cumsum(-1) - probs  # mass of the strictly more probable entries
            # A top_p of 1 keeps all, even where the rounded sum reaches 1 before the tail.
            kept = (before < params.top_p[:, None]) | (params.top_p[:, None] >= 1.0)
            num_kept = kept.sum(-1, keepdim=True).clamp(min=1)
            floor = torch.maximum(floor, ordered.gather(-1, num_kept - 1))
    if params.min_p is not None:
        floor = torch.maximum(floor, logits.amax(-1, keepdim=True) + params.min_p.log()[:, None])
    return logits.masked_fill(logits < floor, float("-inf"))


def _splitmix64(x: Tensor) -> Tensor:
    x = x + _SPLITMIX_STEP
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _SPLITMIX_1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SPLITMIX_2
    return x ^ (x >> 31 & (1 << 33) - 1)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of an int32 tensor (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
