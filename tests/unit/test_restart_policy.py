"""How often, and after how long, a dead process is started again."""

from minivllm.restart_policy import RestartPolicy


def test_delays_double_up_to_the_limit() -> None:
    policy = RestartPolicy(limit=3, first_delay=0.1, clock=lambda: 0.0)
    assert [policy.next_delay() for _ in range(4)] == [0.1, 0.2, 0.4, None]


def test_delays_have_a_limit() -> None:
    policy = RestartPolicy(limit=5, first_delay=1.0, max_delay=3.0, clock=lambda: 0.0)
    assert [policy.next_delay() for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]


def test_old_deaths_are_forgotten() -> None:
    now = [0.0]
    policy = RestartPolicy(limit=1, window=60.0, first_delay=0.1, clock=lambda: now[0])
    assert policy.next_delay() == 0.1
    now[0] = 61.0
    assert policy.next_delay() == 0.1
    assert policy.next_delay() is None
