"""The policies one by one, on the real step loop over a device that checks every read."""

import pytest

from engine_core.engine import EngineCore
from engine_core.scheduler import Batch
from minivllm.sampling_params import SamplingParams
from tests.support.engines import Result, assert_idle, greedy, run_to_end, step_once
from tests.support.fake_runner import FakeRunner, continuation, make_fake_engine


def watch(runner: FakeRunner) -> list[str]:
    """Every batch from now on, as text: `p a[0:4] b[0:2]`."""
    log: list[str] = []

    def on_launch(batch: Batch) -> None:
        parts = zip(batch.requests, batch.starts, batch.counts, strict=True)
        log.append(" ".join([batch.kind[0], *(f"{r.request_id}[{s}:{s + n}]" for r, s, n in parts)]))

    runner.on_launch = on_launch
    return log


def add(engine: EngineCore, request_id: str, length: int, max_tokens: int) -> list[int]:
    """Queue a prompt of ones; the tokens it must get."""
    engine.add_request(request_id, [1] * length, greedy(max_tokens))
    return continuation([1] * length, length + max_tokens, frozenset())


def test_decodes_and_prompt_chunks_alternate() -> None:
    engine, runner = make_fake_engine(0, num_gpu_blocks_override=50, block_size=2, max_num_batched_tokens=4)
    log = watch(runner)
    results: dict[str, Result] = {}
    add(engine, "a", 2, 6)
    step_once(engine, results)
    add(engine, "b", 10, 2)
    results |= run_to_end(engine)
    assert log == [
        "p a[0:2]",
        "d a[2:3]",
        "p b[2:6]",  # its first block was found in the cache
        "d a[3:4]",
        "p b[6:10]",
        "d a[4:5] b[10:11]",
        "d a[5:6]",
        "d a[6:7]",
    ]
    assert_idle(engine)


def test_prompts_share_a_pass_up_to_the_token_budget() -> None:
    engine, runner = make_fake_engine(
        0, num_gpu_blocks_override=50, block_size=2, max_num_batched_tokens=5, enable_prefix_caching=False
    )
    log = watch(runner)
    for name in "abc":
        add(engine, name, 3, 1)
    run_to_end(engine)
    assert log == ["p a[0:3] b[0:2]", "p b[2:3] c[0:3]"]
    assert_idle(engine)


def test_no_more_than_max_num_seqs_run() -> None:
    engine, runner = make_fake_engine(0, num_gpu_blocks_override=50, block_size=2, max_num_seqs=2)
    expected = {name: add(engine, name, 3, 4) for name in "abc"}
    log = watch(runner)
    results = run_to_end(engine, lambda step: None)
    assert max(line.count("[") for line in log) == 2
    assert {name: result.token_ids for name, result in results.items()} == expected
    assert_idle(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_youngest_is_preempted_and_all_get_their_tokens(depth: int) -> None:
    engine, runner = make_fake_engine(depth, num_gpu_blocks_override=6, block_size=2, enable_prefix_caching=False)
    first_scheduled: list[str] = []
    runner.on_launch = lambda batch: first_scheduled.extend(request.request_id for request in batch.started)
    expected = {name: add(engine, name, 3, 8) for name in "abc"}
    results = run_to_end(engine)
    assert {name: result.token_ids for name, result in results.items()} == expected
    assert engine.stats().num_preemptions > 0
    assert first_scheduled[:3] == ["a", "b", "c"]
    assert first_scheduled.count("a") == 1, "the oldest is never preempted"
    assert_idle(engine)


def test_a_partly_prefilled_prompt_gives_way_to_an_older_decode() -> None:
    engine, runner = make_fake_engine(
        0, num_gpu_blocks_override=5, block_size=2, max_num_batched_tokens=2, enable_prefix_caching=False
    )
    log = watch(runner)
    expected = {"a": add(engine, "a", 2, 6)}
    step_once(engine, {})
    expected["b"] = add(engine, "b", 6, 3)
    results = run_to_end(engine)
    assert results["b"].token_ids == expected["b"]
    assert results["a"].token_ids == expected["a"][1:]
    assert engine.stats().num_preemptions == 1
    assert "".join(log).count("a[0:") == 1
    assert_idle(engine)


def test_a_prompt_waits_while_decodes_may_need_the_last_blocks() -> None:
    engine, runner = make_fake_engine(
        0, num_gpu_blocks_override=3, block_size=2, max_num_seqs=2, enable_prefix_caching=False
    )
    log = watch(runner)
    add(engine, "a", 2, 3)
    step_once(engine, {})
    add(engine, "b", 4, 1)
    run_to_end(engine)
    assert log == ["p a[0:2]", "d a[2:3]", "d a[3:4]", "p b[0:4]"]
    assert engine.stats().num_preemptions == 0
    assert_idle(engine)


def test_a_request_that_fills_the_whole_pool_runs() -> None:
    engine, _ = make_fake_engine(0, num_gpu_blocks_override=4, block_size=2, max_num_batched_tokens=3)
    expected = add(engine, "a", 5, 3)
    assert run_to_end(engine)["a"].token_ids == expected
    assert_idle(engine)


@pytest.mark.parametrize("when", ["waiting", "partly prefilled", "in flight", "decoding"])
def test_an_abort_frees_everything_within_one_step(when: str) -> None:
    engine, runner = make_fake_engine(1, num_gpu_blocks_override=20, block_size=2, max_num_batched_tokens=4)
    results: dict[str, Result] = {}
    expected = add(engine, "stays", 3, 12)
    for _ in range(3):
        step_once(engine, results)
    add(engine, "goes", 12, 5)
    log = watch(runner)
    stages = {"waiting": 0, "partly prefilled": 2, "in flight": 7, "decoding": 9}
    for _ in range(stages[when]):
        step_once(engine, results)
    assert any("goes" in line for line in log) == (when != "waiting")
    engine.abort(["goes", "goes"])
    step_once(engine, results)
    assert results["goes"].reason == "abort"
    while engine.has_work:
        step_once(engine, results)
    assert results["stays"].token_ids == expected
    assert_idle(engine)


def test_an_id_is_free_again_only_when_its_end_was_told() -> None:
    engine, _ = make_fake_engine(0, num_gpu_blocks_override=50, block_size=2)
    add(engine, "a", 3, 2)
    engine.abort(["a"])
    with pytest.raises(ValueError, match="'a' is in use"):
        add(engine, "a", 3, 2)
    assert run_to_end(engine)["a"].reason == "abort"
    expected = add(engine, "a", 3, 2)
    assert run_to_end(engine)["a"].token_ids == expected
    assert_idle(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stop_token_is_seen_late_and_the_extra_token_dropped(depth: int) -> None:
    engine, _ = make_fake_engine(depth, num_gpu_blocks_override=50, block_size=2)
    tokens = continuation([1] * 3, 40, frozenset())
    stop = tokens[4]
    first = tokens.index(stop)
    engine.add_request("a", [1] * 3, SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(stop,)))
    result = run_to_end(engine)["a"]
    assert result.token_ids == tokens[: first + 1]
    assert result.finished is not None
    assert (result.reason, result.finished.stop_token_id) == ("stop", stop)
    assert_idle(engine)
