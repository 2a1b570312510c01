"""Scheduler, KV cache and step loop under random arrivals, aborts and failures, on a device that checks every read."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine_core.engine import EngineCore
from engine_core.request import Request, RequestStatus
from engine_core.scheduler import Batch
from minivllm.sampling_params import SamplingParams
from tests.support.engines import Result, assert_idle, step_once
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner, continuation, make_fake_engine

MAX_PREFILL = 6


class EngineMachine(RuleBasedStateMachine):
    """Everything that can happen to an engine core, in any order."""

    engine: EngineCore
    runner: FakeRunner

    @initialize(
        depth=st.integers(0, 1),
        block_size=st.integers(1, 4),
        num_blocks=st.integers(2, 10),
        max_num_seqs=st.integers(1, 4),
        max_num_batched_tokens=st.integers(1, MAX_PREFILL),
        enable_prefix_caching=st.booleans(),
    )
    def start(self, depth: int, num_blocks: int, **options: Any) -> None:
        self.engine, self.runner = make_fake_engine(depth, num_gpu_blocks_override=num_blocks, **options)
        self.runner.on_launch = self.check_batch
        self.results: dict[str, Result] = {}
        self.expected: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.failed: set[str] = set()
        self.num_injected = 0
        self.computed: dict[Request, int] = {}  # positions computed since the request was last started
        self.preemptions: dict[Request, int] = {}
        self.last_kind = "decode"

    @rule(data=st.data(), stop=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=1))
    def add(self, data: st.DataObject, stop: frozenset[int]) -> None:
        max_model_len = self.engine.max_model_len
        length = data.draw(st.integers(1, max_model_len - 1), "prompt length")
        max_tokens = data.draw(st.integers(1, max_model_len - length), "max_tokens")
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length), "prompt")
        request_id = str(len(self.expected))
        output = continuation(prompt, length + max_tokens, stop)
        num_done = data.draw(st.integers(0, len(output) - 1), "tokens it already has")
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=tuple(stop))
        self.engine.add_request(request_id, prompt, params, output[:num_done])
        self.expected[request_id] = output[num_done:]

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_ids = sorted(self.expected)
        if request_ids:
            request_id = data.draw(st.sampled_from(request_ids), "aborted")
            if request_id in self.engine._requests:
                self.aborted.add(request_id)
            self.engine.abort([request_id, "unknown"])

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_work:
                step_once(self.engine, self.results)

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(moment=st.sampled_from(["fail_launch", "fail_collect"]), times=st.integers(1, 4))
    def run_out_of_memory(self, moment: str, times: int) -> None:
        for _ in range(times):
            setattr(self.runner, moment, MemoryError("injected"))
            for _ in range(self.engine._depth + 1):  # a pass is collected in the step after its launch
                if getattr(self.runner, moment) is not None and self.engine.has_work:
                    step_once(self.engine, self.results)
            self.num_injected += getattr(self.runner, moment) is None
            setattr(self.runner, moment, None)
        failed = {name for name, result in self.results.items() if result.reason == "error"}
        assert len(failed) <= self.num_injected // 2, "a request that failed once may fit the next time"
        self.failed |= failed

    @invariant()
    def counts_reconcile(self) -> None:
        stats = self.engine.stats()
        assert stats.kv_blocks_leaked == 0
        blocks = stats.kv_blocks_used + stats.kv_blocks_cached + stats.kv_blocks_free
        assert blocks == self.engine.kv_pool.num_blocks
        assert stats.num_requests_running <= self.engine.config.max_num_seqs
        live = stats.num_requests_running + stats.num_requests_waiting
        assert stats.num_requests_submitted == live + sum(stats.num_requests_finished.values())
        assert stats.num_oom_recoveries == self.num_injected

    @invariant()
    def tokens_are_right_so_far(self) -> None:
        for request_id, result in self.results.items():
            assert result.token_ids == self.expected[request_id][: len(result.token_ids)]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        max_steps = 20 + 10 * self.engine.max_model_len * len(self.expected)
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            step_once(self.engine, self.results)
        assert_idle(self.engine)
        assert self.results.keys() == self.expected.keys()
        for request_id, result in self.results.items():
            if request_id in self.aborted:
                assert result.reason == "abort"
            elif request_id in self.failed:
                assert result.reason == "error"
            else:
                assert result.token_ids == self.expected[request_id]
                assert result.reason in {"stop", "length"}

    def check_batch(self, batch: Batch) -> None:
        """The policies, at the moment a pass is launched."""
        assert batch.requests
        self.check_limits(batch)
        assert len({request.row for request in batch.requests}) == len(batch.requests)
        assert [r.arrival_index for r in batch.requests] == sorted(r.arrival_index for r in batch.requests)
        if batch.kind == "decode":
            assert batch.counts == [1] * len(batch.requests)
            assert batch.sampled == batch.requests
        else:
            self.check_first_come_first_served(batch)
            self.check_decodes_did_not_wait(batch)
        self.last_kind = batch.kind
        for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
            self.check_nothing_recomputed(request, start, request in batch.started)
            assert start + count < request.max_total_tokens, "the last token needs no computing"
            self.computed[request] = start + count

    def check_limits(self, batch: Batch) -> None:
        limits = self.engine.scheduler.limits
        assert 1 <= limits.num_tokens <= self.engine.max_num_batched_tokens
        assert 1 <= limits.num_requests <= self.engine.config.max_num_seqs
        size, limit = batch.num_tokens, limits.num_tokens if batch.kind == "prefill" else limits.num_requests
        if batch.kind == "prefill" and len(batch.requests) == 1:
            limit = max(limit, limits.smallest_prefill)
        assert size <= limit

    def check_first_come_first_served(self, batch: Batch) -> None:
        queue = self.engine.scheduler.prefill_queue
        waiting = [request.arrival_index for request in queue if request.row < 0]
        started = [request.arrival_index for request in batch.started]
        assert not waiting or not started or max(started) < min(waiting)

    def check_decodes_did_not_wait(self, batch: Batch) -> None:
        decoding = [request for request in self.engine.scheduler.decode_queue if request not in batch.sampled]
        ready = [request for request in decoding if request.num_tokens < request.max_total_tokens]
        assert self.last_kind == "decode" or not ready, "two prompt chunks between two decode steps"

    def check_nothing_recomputed(self, request: Request, start: int, started: bool) -> None:
        assert request.status in {RequestStatus.PREFILL, RequestStatus.DECODE}
        if not started:
            assert start == self.computed[request]
            return
        assert start % self.engine.config.block_size == 0
        assert start == 0 or self.engine.config.enable_prefix_caching
        if request in self.preemptions:
            assert request.num_preemptions > self.preemptions[request], "computed again without being preempted"
        self.preemptions[request] = request.num_preemptions


EngineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestEngineMachine = EngineMachine.TestCase
