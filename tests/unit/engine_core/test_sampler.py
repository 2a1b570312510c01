"""The sampler against a slow reference in float64, its noise against chance, and its purity."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine_core.sampler import SamplingTensors, _keep_most_probable, apply_penalties, exponential_noise, sample

Floats = npt.NDArray[np.float64]
CHI_SQUARE_MARGIN = 5.0  # standard deviations; seeds are fixed, so this never fluctuates


def tensors(
    temperature: list[float],
    seed: list[int] | None = None,
    top_k: list[int] | None = None,
    top_p: list[float] | None = None,
    min_p: list[float] | None = None,
) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.tensor(temperature),
        seed=torch.tensor(seed or [0] * len(temperature)),
        top_k=None if top_k is None else torch.tensor(top_k),
        top_p=None if top_p is None else torch.tensor(top_p),
        min_p=None if min_p is None else torch.tensor(min_p),
    )


def kept(logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Tokens that may be drawn: top-k, then top-p of what is left, then min-p. Ties stay together."""
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max())
    alive = set(range(len(logits)))
    if 0 < top_k < len(logits):
        alive = {token for token in alive if logits[token] >= sorted(logits)[-top_k]}
    total = sum(probs[token] for token in alive)
    by_rank = sorted(alive, key=lambda token: -logits[token])
    mass, last = 0.0, by_rank[0]
    for token in by_rank:
        if mass / total >= top_p:
            break
        mass, last = mass + float(probs[token]), token
    return {token for token in alive if logits[token] >= logits[last] and probs[token] >= min_p}


def drawn(logits: Floats, num_draws: int = 400, **params: Any) -> set[int]:
    """Distinct tokens in many draws from the same row."""
    many = {name: [value] * num_draws for name, value in params.items()}
    rows = torch.tensor(logits, dtype=torch.float32).expand(num_draws, -1)
    return set(sample(rows, tensors(seed=[1] * num_draws, **many), torch.arange(num_draws)).tolist())


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0], [-1.0, -2.0, -1.0]])
    assert sample(logits, None, torch.zeros(3, dtype=torch.int64)).tolist() == [1, 0, 0]
    assert sample(logits, tensors([0.0] * 3), torch.zeros(3, dtype=torch.int64)).tolist() == [1, 0, 0]


def test_greedy_and_random_rows_mix() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits, tensors([0.0, 1.0, 0.0, 5.0], seed=[1, 2, 3, 4]), torch.arange(4))
    assert tokens[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    alone = sample(logits[1:2], tensors([1.0], seed=[2]), torch.tensor([1]))
    assert tokens[1] == alone[0]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 99, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.6, "min_p": 0.0},
        {"temperature": 3.0, "top_k": 0, "top_p": 0.6, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1e-6, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.3},
        {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.3},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 1.0},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.8, "min_p": 0.2},
    ],
    ids=lambda params: " ".join(f"{name}={value}" for name, value in params.items()),
)
def test_filters_keep_exactly_what_the_reference_keeps(params: dict[str, Any]) -> None:
    logits = np.array([0.0, 1.0, 0.9, -1.0, 0.5, 0.45, -0.2])
    assert drawn(logits, 2000, **params) == kept(logits, **params)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": [2]}, {0, 1, 2}),  # the second and third are equal: both stay
        ({"top_p": [0.5]}, {0, 1, 2}),
        ({"min_p": [0.9]}, {0}),
    ],
)
def test_ties_with_the_last_kept_stay(params: dict[str, list[Any]], expected: set[int]) -> None:
    logits = np.array([1.2, 1.0, 1.0, -3.0])
    defaults = {"temperature": 1.0} | {name: values[0] for name, values in params.items()}
    assert drawn(logits, 1000, **defaults) == expected


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_nothing_outside_the_reference_is_drawn(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = np.array(logits) / 7.0
    slack = 1e-4  # float32 sums may fall on the other side of a bound
    allowed = kept(row, temperature, top_k, min(1.0, top_p + slack), min_p * (1 - slack))
    assert drawn(row, 60, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p) <= allowed


def test_penalties_match_the_reference() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(5, 30)).astype(np.float32)
    prompt = generator.random((5, 30)) < 0.3
    counts = generator.integers(0, 4, (5, 30)).astype(np.int32)
    repetition, presence, frequency = (
        generator.uniform(low, high, 5).astype(np.float32) for low, high in ((0.5, 2.0), (-2.0, 2.0), (-2.0, 2.0))
    )
    expected = logits.astype(np.float64)
    for row, token in np.ndindex(*logits.shape):
        if prompt[row, token] or counts[row, token]:
            factor = float(repetition[row])
            expected[row, token] *= factor if expected[row, token] <= 0 else 1 / factor
        if counts[row, token]:
            expected[row, token] -= presence[row] + frequency[row] * counts[row, token]
    arguments = (logits, prompt, counts, repetition, presence, frequency)
    actual = apply_penalties(*(torch.from_numpy(array) for array in arguments))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5)


def chi_square(counts: Floats, expected: Floats) -> float:
    """Distance from expectation in standard deviations of the chi-square distribution."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("vary", ["seed", "position", "both"])
def test_draws_follow_the_distribution(vary: str) -> None:
    num_draws, temperature = 60_000, 1.7
    logits = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 1.0])
    index = torch.arange(num_draws)
    seeds = index if vary != "position" else torch.full_like(index, 12345)
    positions = index if vary != "seed" else torch.full_like(index, 77)
    params = SamplingTensors(torch.full((num_draws,), temperature), seeds)
    tokens = sample(torch.tensor(logits, dtype=torch.float32).expand(num_draws, -1), params, positions)
    probs = np.exp(logits / temperature)
    expected = num_draws * probs / probs.sum()
    counts = np.bincount(tokens.numpy(), minlength=len(logits)).astype(np.float64)
    assert abs(chi_square(counts, expected)) < CHI_SQUARE_MARGIN


def uniforms(noise: Tensor) -> Floats:
    return np.asarray(np.exp(-noise.double().numpy()), dtype=np.float64)


@pytest.mark.parametrize("vary", ["seed", "position", "column"])
def test_noise_is_uniform_and_neighbours_are_independent(vary: str) -> None:
    count, bins = 40_000, 16
    index = torch.arange(count)
    zero = torch.zeros_like(index)
    if vary == "column":
        noise = exponential_noise(torch.tensor([3]), torch.tensor([5]), count)[0]
    else:
        noise = exponential_noise(index if vary == "seed" else zero, index if vary == "position" else zero, 1)[:, 0]
    cells = np.minimum((uniforms(noise) * bins).astype(np.int64), bins - 1)
    single = np.bincount(cells, minlength=bins).astype(np.float64)
    assert abs(chi_square(single, np.full(bins, count / bins))) < CHI_SQUARE_MARGIN
    for lag in (1, 2, 64):
        pairs = np.bincount(cells[:-lag] * bins + cells[lag:], minlength=bins * bins).astype(np.float64)
        assert abs(chi_square(pairs, np.full(bins * bins, (count - lag) / bins**2))) < CHI_SQUARE_MARGIN


def test_seed_and_position_do_not_trade_places() -> None:
    seeds, positions = torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij")
    noise = exponential_noise(seeds.flatten(), positions.flatten(), 3)
    assert len(torch.unique(noise, dim=0)) == 3600


def test_noise_is_always_finite_and_positive() -> None:
    """A single zero would make its token win whatever its logit: one in 2**24 is one token in 340 of a real model."""
    for seed in range(40):
        noise = exponential_noise(torch.arange(64) + 64 * seed, torch.arange(64), 49152)
        assert bool((noise > 0).all())
        assert bool(noise.isfinite().all())


def test_filtered_tokens_are_never_drawn_from_a_large_vocabulary() -> None:
    logits = torch.zeros(64, 49152)
    logits[:, 7] = 30.0
    for seed in range(20):
        params = tensors([1.0] * 64, seed=[64 * seed + row for row in range(64)], min_p=[0.5] * 64)
        assert sample(logits, params, torch.arange(64)).tolist() == [7] * 64


def test_a_row_draws_the_same_token_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(32, 5000, generator=generator) * 3
    rows: list[dict[str, Any]] = [
        {
            "temperature": [0.0, 0.5, 1.0, 2.0][row % 4],
            "seed": row * 7919,
            "top_k": [0, 40][row % 2],
            "top_p": [1.0, 0.9, 1.0][row % 3],
            "min_p": [0.0, 0.05][row // 2 % 2],
        }
        for row in range(32)
    ]
    positions = torch.arange(100, 132)
    together = sample(logits, tensors(**{name: [row[name] for row in rows] for name in rows[0]}), positions)
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for index, row in enumerate(rows):
        used = {name: [value] for name, value in row.items() if off.get(name) != value}
        alone = sample(logits[index : index + 1], tensors(**used), positions[index : index + 1])
        assert alone[0] == together[index]


def test_a_top_p_of_one_keeps_the_tail_beside_another_row() -> None:
    """Rounded sums reach 1 before the tail, which must not depend on what else is in the batch."""
    logits = torch.zeros(2, 1000)
    logits[:, 7] = 30.0
    kept_logits = _keep_most_probable(logits, tensors([1.0, 1.0], top_p=[1.0, 0.5]))
    assert kept_logits.isfinite().sum(-1).tolist() == [1000, 1]
