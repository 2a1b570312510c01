"""What is recorded of steps and requests: it must agree with what the engine did, and with its own counts."""

from itertools import pairwise

import pytest

from engine_core import request_timelines
from engine_core.engine import EngineCore
from engine_core.step_records import StepRecorder
from minivllm.engine_view import RequestTimeline, StepRecord
from minivllm.sampling_params import SamplingParams
from tests.support.engines import assert_idle, greedy, run_to_end
from tests.support.fake_runner import make_fake_engine


def make_engine(depth: int = 0, **options: int) -> EngineCore:
    defaults = {"block_size": 4, "num_gpu_blocks_override": 64, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    engine, _ = make_fake_engine(depth, **defaults | options)
    engine.records.recording = True
    return engine


def timeline(engine: EngineCore, request_id: str) -> RequestTimeline:
    found = engine.records.timelines.of(request_id, engine.scheduler.prefill_queue, 0.0)
    assert found is not None
    return found


def tokens_of(steps: list[StepRecord], handle: int) -> list[tuple[int, int]]:
    """[start, end) of every chunk of prompt that was recorded for a request."""
    return [
        (start, start + count)
        for step in steps
        if step.kind == "prefill"
        for one, start, count in zip(step.requests or [], step.starts, step.counts, strict=True)
        if one == handle
    ]


@pytest.mark.parametrize("depth", [0, 1])
def test_steps_say_what_was_computed(depth: int) -> None:
    engine = make_engine(depth)
    engine.add_request("a", [1] * 20, greedy(5))
    engine.add_request("b", [2] * 3, greedy(3))
    run_to_end(engine)
    steps = list(engine.records.steps)
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert tokens_of(steps, 1) == [(0, 8), (8, 16), (16, 20)]
    assert tokens_of(steps, 2) == [(0, 3)]
    decodes = [step for step in steps if step.kind == "decode"]
    assert sum(1 in (step.requests or []) for step in decodes) == 4
    assert sum(2 in (step.requests or []) for step in decodes) == 2
    assert [handle for step in steps for handle in step.started] == [1, 2]
    assert {handle: end for step in steps for handle, end in step.finished.items()} == {1: "length", 2: "length"}
    assert all(step.began <= step.collected for step in steps)
    assert all(step.collected <= later.began for step, later in pairwise(steps))
    assert_idle(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_steps_reconcile_with_the_counters(depth: int) -> None:
    engine = make_engine(depth, num_gpu_blocks_override=12)  # tiny: there are preemptions
    for index in range(6):
        engine.add_request(str(index), [index % 5] * (3 + index), greedy(12))
    run_to_end(engine)
    steps, stats = list(engine.records.steps), engine.stats()
    for kind in ("prefill", "decode"):
        assert sum(step.kind == kind for step in steps) == sum(stats.histograms[f"step_seconds_{kind}"].counts)
    assert sum(step.num_tokens for step in steps) == stats.histograms["iteration_tokens"].sum
    assert sum(len(step.preempted) for step in steps) == stats.num_preemptions > 0
    sampled = sum(len(step.requests or []) if step.kind == "decode" else len(step.sampled) for step in steps)
    assert sampled == stats.generation_tokens
    assert sum(len(step.finished) for step in steps) == 6
    assert_idle(engine)


def test_nothing_is_kept_while_nobody_watches_and_the_numbers_show_the_gap() -> None:
    engine = make_engine()
    engine.records.recording = False
    engine.add_request("a", [1] * 4, greedy(5))
    run_to_end(engine)
    assert not engine.records.steps
    engine.records.recording = True
    engine.add_request("b", [2] * 4, greedy(2))
    run_to_end(engine)
    assert [step.number for step in engine.records.steps] == [6, 7]
    assert_idle(engine)


def test_the_ring_is_bounded() -> None:
    engine = make_engine()
    engine.records = StepRecorder(engine.scheduler, engine.kv.pool, max_steps=3)
    engine.records.recording = True
    engine.add_request("a", [1] * 4, greedy(9))
    run_to_end(engine)
    assert [step.number for step in engine.records.steps] == [7, 8, 9]
    assert_idle(engine)


def test_watching_may_begin_and_end_while_a_pass_is_in_flight() -> None:
    engine = make_engine(depth=1)
    engine.add_request("a", [1] * 4, greedy(20))
    for step in range(12):
        engine.step()
        engine.records.recording = step % 3 != 0
    run_to_end(engine)
    numbers = [step.number for step in engine.records.steps]
    assert numbers
    assert numbers == sorted(set(numbers))
    assert_idle(engine)


def test_a_timeline_tells_chunks_passes_and_the_end() -> None:
    engine = make_engine()
    engine.records.recording = False  # timelines need nobody to watch
    engine.add_request("a", [1] * 20, greedy(5))
    run_to_end(engine)
    told = timeline(engine, "a")
    assert [(chunk.start, chunk.count) for chunk in told.prefill_chunks] == [(0, 8), (8, 8), (16, 4)]
    assert all(chunk.end is not None and chunk.end >= chunk.at >= 0 for chunk in told.prefill_chunks)
    assert (told.status, told.finish_reason, told.num_decode_steps) == ("finished", "length", 4)
    assert (told.num_prompt_tokens, told.num_output_tokens, told.num_prefill_chunks) == (20, 5, 3)
    assert told.scheduled_at is not None
    assert told.first_token_at is not None
    assert told.finished_at is not None
    assert 0 <= told.scheduled_at <= told.first_token_at <= told.finished_at
    assert_idle(engine)


def test_a_timeline_tells_of_cached_tokens_and_given_output() -> None:
    engine = make_engine()
    engine.add_request("a", [1, 2, 3, 4] * 3, greedy(2))
    run_to_end(engine)
    engine.add_request("b", [1, 2, 3, 4] * 3, greedy(6), output_token_ids=[0, 0])
    run_to_end(engine)
    told = timeline(engine, "b")
    assert (told.num_cached_tokens, told.num_output_tokens, told.num_decode_steps) == (12, 6, 3)
    assert_idle(engine)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_num_seqs": 1}, "rows"),
        ({"num_gpu_blocks_override": 6}, "blocks"),
        ({"max_num_batched_tokens": 4}, "budget"),
    ],
)
def test_a_timeline_tells_what_a_request_waited_for(options: dict[str, int], reason: str) -> None:
    engine = make_engine(**options)
    engine.add_request("first", [1] * 16, greedy(6))
    engine.step()
    engine.add_request("second", [2] * 16, greedy(2))
    engine.step()
    seen = set()
    while (now := timeline(engine, "second")).status == "waiting":
        seen.add(now.waiting_for)
        engine.step()
    assert reason in seen
    run_to_end(engine)
    told = timeline(engine, "second")
    assert told.waited[reason] > 0
    assert told.waiting_for is None
    assert told.scheduled_at is not None
    assert sum(told.waited.values()) <= told.scheduled_at + 1e-6
    assert_idle(engine)


def test_a_timeline_tells_of_preemptions() -> None:
    engine = make_engine(num_gpu_blocks_override=6)
    engine.add_request("old", [1] * 7, SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True))
    engine.add_request("young", [2] * 7, SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True))
    run_to_end(engine)
    told = timeline(engine, "young")
    assert len(told.preemptions) == engine.scheduler.num_preemptions > 0
    for preemption in told.preemptions:
        assert preemption.resumed_at is not None
        assert 0 < preemption.at <= preemption.resumed_at
        assert preemption.num_tokens > 7
    assert (told.num_output_tokens, told.num_decode_steps) == (14, 14 - 1 - len(told.preemptions))
    assert timeline(engine, "old").preemptions == []
    assert_idle(engine)


def test_a_live_timeline_shows_blocks_and_place_in_the_queue() -> None:
    engine = make_engine(max_num_seqs=1)
    for name in ("a", "b", "c"):
        engine.add_request(name, [1] * 10, greedy(20))
    engine.step()
    engine.step()
    engine.step()
    assert timeline(engine, "a").block_runs == [[0, 3]]
    assert (timeline(engine, "c").num_ahead, timeline(engine, "c").block_runs) == (1, [])
    assert engine.records.timelines.of("nobody", [], 0.0) is None
    engine.abort(["a", "b", "c"])
    run_to_end(engine)
    assert timeline(engine, "c").finish_reason == "abort"
    assert_idle(engine)


def test_only_the_last_requests_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_timelines, "MAX_FINISHED", 2)
    monkeypatch.setattr(request_timelines, "MAX_CHUNKS", 1)
    engine = make_engine()
    for name, token in (("a", 1), ("b", 2), ("c", 3), ("b", 2)):
        engine.add_request(name, [token] * 20, greedy(1))
        run_to_end(engine)
    timelines = engine.records.timelines
    assert timelines.of("a", [], 0.0) is None
    assert timeline(engine, "c").num_prefill_chunks == 3 > len(timeline(engine, "c").prefill_chunks)
    assert timeline(engine, "b").num_cached_tokens == 16
    assert_idle(engine)
