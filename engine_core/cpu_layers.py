"""What lies between the matrix products of a decoder layer on a CPU: norms, rotary embedding, gating. numba, float32.

Each is one parallel loop over the tokens of the pass, so a token's numbers do not depend on the others. The body of a
loop is a call: whatever else stands there costs seconds to compile.
"""

from typing import Any

import numpy as np

from engine_core.cpu_exp import exp
from engine_core.cpu_jit import inner, njit, prange


@inner(fastmath=True)
def _normalize(x: Any, weight: Any, epsilon: Any, y: Any) -> None:
    """y = x / rms(x) * weight, all [width]."""
    total = np.float32(0.0)
    for i in range(len(weight)):
        total += x[i] * x[i]
    scale = np.float32(1.0) / np.sqrt(total / np.float32(len(weight)) + epsilon)
    for i in range(len(weight)):
        y[i] = x[i] * scale * weight[i]


@inner(fastmath=True)
def _add(x: Any, addend: Any) -> None:
    for i in range(len(x)):
        x[i] += addend[i]


@njit(parallel=True)
def add_and_normalize(hidden: Any, update: Any, weight: Any, epsilon: Any, normed: Any) -> None:
    """hidden [n, width] += update [n, >= width]; normed [n, width] = RMSNorm of it, by weight [width]."""
    for row in prange(len(hidden)):
        _add(hidden[row], update[row])
        _normalize(hidden[row], weight, epsilon, normed[row])


@inner(fastmath=True)
def _gate(x: Any, up: Any, y: Any) -> None:
    """y = SiLU(x) * up, all [width]."""
    for i in range(len(y)):
        small = exp(min(x[i], -x[i]))
        above = np.float32(1.0) if x[i] >= 0 else small
        y[i] = x[i] * above / (np.float32(1.0) + small) * up[i]


@njit(parallel=True)
def gate(x: Any, y: Any) -> None:
    """y [n, width] = SiLU(gate) * up, the first and second `width` columns of x [n, >= 2 * width]."""
    width = y.shape[1]
    for row in prange(len(y)):
        _gate(x[row, :width], x[row, width : 2 * width], y[row])


@inner(fastmath=True)
def _rotate(x: Any, cos: Any, sin: Any) -> None:
    """Turn pairs (x[i], x[i + half]) of x [head_dim] by the angles of cos and sin [head_dim]."""
    half = len(x) // 2
    for i in range(half):
        first, second = x[i], x[half + i]
        x[i] = first * cos[i] - second * sin[i]
        x[half + i] = second * cos[half + i] + first * sin[half + i]


@inner()
def _copy(x: Any, y: Any) -> None:
    for i in range(len(x)):
        y[i] = x[i]


@inner()
def _rotate_and_store(
    x: Any, num_heads: Any, cos: Any, sin: Any, query_norm: Any, key_norm: Any, epsilon: Any, keys: Any, values: Any
) -> None:
    """One token: x [(num_heads + 2 * num_kv_heads) * head_dim or more], keys and values [num_kv_heads, head_dim]."""
    num_kv_heads, head_dim = keys.shape
    for head in range(num_heads + num_kv_heads):
        vector = x[head * head_dim : (head + 1) * head_dim]
        weight = query_norm if head < num_heads else key_norm
        if len(weight) > 0:
            _normalize(vector, weight, epsilon, vector)
        _rotate(vector, cos, sin)
        if head >= num_heads:
            _copy(vector, keys[head - num_heads])
    for head in range(num_kv_heads):
        start = (num_heads + num_kv_heads + head) * head_dim
        _copy(x[start : start + head_dim], values[head])


@njit(parallel=True)
def rotate_and_store(
    qkv: Any,  # [n, (num_heads + 2 * num_kv_heads) * head_dim or more]; query and key are turned in place
    num_heads: Any,
    cos: Any,  # [n, head_dim]
    sin: Any,
    query_norm: Any,  # [head_dim]: heads are normalized before; [0]: they are not
    key_norm: Any,
    epsilon: Any,
    key_cache: Any,  # [num_slots, num_kv_heads, head_dim]
    value_cache: Any,
    slots: Any,  # [n] int64
) -> None:
    """Queries and keys get their positions, keys and values go to their slots in the KV cache."""
    for row in prange(len(slots)):
        slot = slots[row]
        keys, values = key_cache[slot], value_cache[slot]
        _rotate_and_store(qkv[row], num_heads, cos[row], sin[row], query_norm, key_norm, epsilon, keys, values)
