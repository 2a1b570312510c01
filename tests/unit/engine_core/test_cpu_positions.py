"""Scores and sums of several positions at once against numpy in float64."""

from typing import Any

import numba
import numpy as np
import pytest

from engine_core.attention.cpu_positions import POSITIONS, add_positions, score_positions

NUM_HEADS = 3
START, AT = 5, 2


@numba.njit
def scores_of(query: Any, keys: Any, start: Any, stride: Any, scores: Any, at: Any, ahead: Any) -> None:
    score_positions(query, keys, start, stride, scores, at, ahead)


@numba.njit
def add_values(weights: Any, at: Any, values: Any, start: Any, stride: Any, output: Any, ahead: Any) -> None:
    add_positions(weights, at, values, start, stride, output, ahead)


@pytest.mark.parametrize("ahead", [None, 1])
@pytest.mark.parametrize("num_vectors", [1, 3, 4, 9])
def test_positions_at_once(num_vectors: int, ahead: int | None) -> None:
    rng, head_dim = np.random.default_rng(num_vectors), num_vectors * POSITIONS
    stride = NUM_HEADS * head_dim
    memory = rng.standard_normal(START + POSITIONS * stride).astype(np.float32)
    vectors = np.lib.stride_tricks.as_strided(memory[START:], (POSITIONS, head_dim), (4 * stride, 4)).astype(np.float64)
    query = rng.standard_normal(head_dim).astype(np.float32)
    numbers = rng.standard_normal(AT + POSITIONS + 1).astype(np.float32)

    scores = numbers.copy()
    scores_of(query, memory, START, stride, scores, AT, ahead)
    np.testing.assert_allclose(scores[AT:-1], vectors @ query, rtol=1e-5, atol=1e-5)
    assert (scores[[0, 1, -1]] == numbers[[0, 1, -1]]).all()  # and nothing beside

    output = query.copy()
    add_values(numbers, AT, memory, START, stride, output, ahead)
    np.testing.assert_allclose(output, query + numbers[AT:-1] @ vectors, rtol=1e-5, atol=1e-5)
