"""As many connections as there may be file descriptors: the soft limit is raised, the hard one respected."""

import logging
import resource

import pytest

from frontend.descriptors import RESERVED, connections_that_fit


class Limits:
    """Stands in for the process's limits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
        self.now = (soft, hard)
        monkeypatch.setattr(resource, "getrlimit", lambda _: self.now)
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits: setattr(self, "now", limits))


@pytest.mark.parametrize("hard", [1_048_576, resource.RLIM_INFINITY])
def test_the_soft_limit_is_raised_as_far_as_needed(monkeypatch: pytest.MonkeyPatch, hard: int) -> None:
    limits = Limits(monkeypatch, 1024, hard)
    assert connections_that_fit(8192) == 8192
    assert limits.now == (8192 + RESERVED, hard)


@pytest.mark.parametrize("soft", [100_000, resource.RLIM_INFINITY])
def test_a_soft_limit_that_suffices_stays(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    limits = Limits(monkeypatch, soft, resource.RLIM_INFINITY)
    assert connections_that_fit(8192) == 8192
    assert limits.now == (soft, resource.RLIM_INFINITY)


def test_a_low_hard_limit_allows_fewer_connections_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(monkeypatch, 1024, 4096)
    with caplog.at_level(logging.WARNING):
        assert connections_that_fit(8192) == 4096 - RESERVED
    assert limits.now == (4096, 4096)
    assert caplog.messages == ["4096 file descriptors allow 3968 connections instead of 8192 (--limit-concurrency)"]
