"""The compiled steps between matrix products against torch in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine_core.cpu_layers import add_and_normalize, gate, rotate_and_store

NUM_TOKENS = 3
EPSILON = np.float32(1e-5)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("width", "padding"), [(1, 0), (7, 25), (64, 0), (100, 28)])
def test_add_and_normalize(width: int, padding: int) -> None:
    hidden, update, weight = random(NUM_TOKENS, width), random(NUM_TOKENS, width + padding), random(width)
    added = hidden + update[:, :width]
    expected = rms_norm(added.double(), (width,), weight.double(), float(EPSILON))
    normed = torch.empty(NUM_TOKENS, width)
    add_and_normalize(hidden.numpy(), update.numpy(), weight.numpy(), EPSILON, normed.numpy())
    assert torch.equal(hidden, added)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_norm_of_zeros_is_zero() -> None:
    normed, zeros, weight = torch.ones(1, 16), torch.zeros(1, 16), torch.ones(16)
    add_and_normalize(zeros.numpy(), zeros.clone().numpy(), weight.numpy(), EPSILON, normed.numpy())
    assert torch.equal(normed, zeros)


@pytest.mark.parametrize(("width", "padding"), [(1, 30), (48, 0), (35, 26)])
def test_gate(width: int, padding: int) -> None:
    x = 10 * random(NUM_TOKENS, 2 * width + padding)
    x[0, 0], x[1, 0], x[2, 0] = 0.0, -300.0, 300.0  # e^300 is no float32
    y = torch.empty(NUM_TOKENS, width)
    gate(x.numpy(), y.numpy())
    expected = silu(x[:, :width].double()) * x[:, width : 2 * width].double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 2, 24), (3, 1, 2)])
def test_rotate_and_store(num_heads: int, num_kv_heads: int, head_dim: int, has_norms: bool) -> None:
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    qkv, angles = random(NUM_TOKENS, sum(sizes) * head_dim + 5), random(NUM_TOKENS, head_dim)
    weights = [random(head_dim), random(head_dim) + 1] if has_norms else [torch.empty(0), torch.empty(0)]
    query, key, value = qkv[:, :-5].double().unflatten(1, (-1, head_dim)).split(sizes, 1)
    if has_norms:
        query, key = (
            rms_norm(heads, (head_dim,), weight.double(), float(EPSILON))
            for heads, weight in zip((query, key), weights, strict=True)
        )
    query, key = apply_rotary_pos_emb(query, key, angles.cos().double(), angles.sin().double())
    slots = torch.tensor([5, 0, 2])
    caches = [torch.full((6, num_kv_heads, head_dim), 7.0) for _ in range(2)]
    rotate_and_store(
        qkv.numpy(), num_heads, angles.cos().numpy(), angles.sin().numpy(), weights[0].numpy(), weights[1].numpy(),
        EPSILON, caches[0].numpy(), caches[1].numpy(), slots.numpy(),
    )  # fmt: skip
    torch.testing.assert_close(qkv[:, : num_heads * head_dim].double(), query.flatten(1), rtol=1e-4, atol=1e-5)
    for cache, stored in zip(caches, (key, value), strict=True):
        torch.testing.assert_close(cache[slots].double(), stored, rtol=1e-4, atol=1e-5)
        assert (cache[[1, 3, 4]] == 7.0).all()
