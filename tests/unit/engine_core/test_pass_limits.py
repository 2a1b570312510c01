"""Limits of a pass: halved by a shortage, doubled with time, and more patient the more often that was too early."""

import pytest

from engine_core.pass_limits import FIRST_PATIENCE, MAX_PATIENCE, PassLimits


@pytest.fixture
def limits() -> PassLimits:
    return PassLimits(8192, 256, min_num_tokens=16)


def wait(limits: PassLimits) -> int:
    """Good passes until a limit changes."""
    before = (limits.num_tokens, limits.num_requests)
    for num_passes in range(1, 2 * MAX_PATIENCE):
        limits.pass_done()
        if (limits.num_tokens, limits.num_requests) != before:
            return num_passes
    raise AssertionError("never raised")


def test_what_did_not_fit_is_halved(limits: PassLimits) -> None:
    assert limits.shrink_prefill(3000, 5)
    assert (limits.num_tokens, limits.num_requests) == (1500, 256)
    assert limits.shrink_decode(101)
    assert (limits.num_tokens, limits.num_requests) == (1500, 50)


def test_one_request_is_cut_down_to_a_block_and_several_to_one_token_each(limits: PassLimits) -> None:
    assert limits.shrink_prefill(20, 1)
    assert limits.num_tokens == 16
    assert not limits.shrink_prefill(16, 1)
    assert limits.shrink_prefill(16, 2)
    assert limits.num_tokens == 8
    assert limits.shrink_prefill(2, 2)
    assert limits.num_tokens == 1
    assert not limits.shrink_prefill(1, 1)
    assert not limits.shrink_decode(1)


def test_a_small_pass_does_not_raise_a_lower_limit(limits: PassLimits) -> None:
    limits.shrink_prefill(100, 2)
    limits.shrink_prefill(200, 2)
    assert limits.num_tokens == 50


def test_limits_double_up_to_what_is_configured(limits: PassLimits) -> None:
    limits.shrink_prefill(3000, 5)
    limits.shrink_decode(100)
    assert wait(limits) == FIRST_PATIENCE
    assert (limits.num_tokens, limits.num_requests) == (3000, 100)
    while limits.are_reduced:
        assert wait(limits) == FIRST_PATIENCE
    assert (limits.num_tokens, limits.num_requests) == (8192, 256)


def test_raising_too_early_costs_patience_until_all_is_well(limits: PassLimits) -> None:
    limits.shrink_prefill(8192, 2)
    limits.shrink_prefill(4096, 2)  # one shortage after the other is no reason to wait longer
    assert wait(limits) == FIRST_PATIENCE
    limits.shrink_prefill(4096, 2)
    assert wait(limits) == 2 * FIRST_PATIENCE
    limits.shrink_prefill(4096, 2)
    for _ in range(2):  # 2048 → 8192
        assert wait(limits) == 4 * FIRST_PATIENCE
    for _ in range(4 * FIRST_PATIENCE):
        limits.pass_done()
    limits.shrink_prefill(8192, 2)
    assert wait(limits) == FIRST_PATIENCE
