"""Out of memory at any moment of a step: the pass is undone and repeated smaller, and no token changes.

The policies on the fake device, whose failed passes leave garbage behind; then 200 shortages in a real tiny model.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch

from engine_core.engine import EngineCore
from engine_core.model_runner import ModelRunner, SampledTokens
from engine_core.out_of_memory import Shortage, attempt, explained_at_startup
from engine_core.request import Request
from engine_core.scheduler import Batch
from minivllm.errors import StartupError
from minivllm.sampling_params import SamplingParams
from tests.support.engines import Result, assert_idle, generate, greedy, run_to_end, running_engine, step_once
from tests.support.fake_runner import FakeRunner, continuation, make_fake_engine
from tests.support.models import TinyModels, random_prompt

CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.12 GiB is free."
)
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"  # noqa: E501
SHORTAGES = {
    "cuda": (torch.OutOfMemoryError(CUDA_MESSAGE), "tried to allocate 2.50 GiB, 1.12 GiB free"),
    "cpu": (RuntimeError(CPU_MESSAGE), "tried to allocate 4096 bytes"),
    "host": (MemoryError(), "MemoryError"),
    "driver": (RuntimeError("CUDA error: out of memory\nmore"), "CUDA error: out of memory"),
    "triton": (RuntimeError("Triton Error [CUDA]: out of memory"), "Triton Error [CUDA]: out of memory"),
}


@pytest.mark.parametrize("kind", SHORTAGES)
def test_every_kind_of_shortage_is_known_and_told_in_one_line(kind: str) -> None:
    error, detail = SHORTAGES[kind]
    assert attempt(lambda: fail(error)) == Shortage(detail)
    with pytest.raises(StartupError) as refused, explained_at_startup("a pass of 512 tokens", "lower --x (512)"):
        fail(error)
    assert str(refused.value) == f"not enough memory for a pass of 512 tokens: {detail}; lower --x (512)"


def test_a_shortage_is_found_behind_the_error_it_caused() -> None:
    def capture() -> None:
        try:
            fail(torch.OutOfMemoryError(CUDA_MESSAGE))
        finally:
            fail(RuntimeError("operation failed due to a previous error during capture"))

    assert isinstance(attempt(capture), Shortage)


def test_a_failed_pass_holds_nothing_when_memory_is_released() -> None:
    held: list[Any] = []

    class Tensor:
        def __del__(self) -> None:
            held.append("freed")

    def launch() -> None:
        tensor = Tensor()
        raise MemoryError(id(tensor))

    assert isinstance(attempt(launch), Shortage)
    assert held == ["freed"]


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    engine, runner = make_fake_engine(0, num_gpu_blocks_override=50, block_size=2)
    add(engine, "a", 3, 2)
    runner.fail_launch = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        engine.step()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_chunk_is_halved_down_to_a_block(depth: int) -> None:
    engine, runner = make_fake_engine(depth, num_gpu_blocks_override=50, block_size=2, max_num_batched_tokens=12)
    passes = watch(runner, lambda batch: batch.num_tokens > 2)
    expected = add(engine, "a", 12, 3)
    assert run_to_end(engine)["a"].token_ids == expected
    assert passes[:5] == ["p a[0:12]", "p a[0:6]", "p a[0:3]", "p a[0:2]", "p a[2:4]"]
    assert engine.stats().num_oom_recoveries == 3
    assert_idle(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_decode_is_run_in_parts_and_everybody_has_a_turn(depth: int) -> None:
    engine, runner = make_fake_engine(depth, num_gpu_blocks_override=50, block_size=2)
    passes = watch(runner, lambda batch: batch.kind == "decode" and len(batch.requests) > 2)
    expected = {name: add(engine, name, 2, 7) for name in "abcde"}
    results = run_to_end(engine)
    assert {name: result.token_ids for name, result in results.items()} == expected
    decodes = [line.split()[1:] for line in passes if line[0] == "d" and line.count("[") <= 2]
    turns = "".join(part[0] for line in decodes[:5] for part in line)
    assert all(turns.count(name) == 2 for name in "abcde"), passes
    assert_idle(engine)


@pytest.mark.parametrize("moment", ["fail_launch", "fail_collect"])
@pytest.mark.parametrize("depth", [0, 1])
def test_one_shortage_costs_nobody_a_token(depth: int, moment: str) -> None:
    for step in range(100):
        engine, runner = make_fake_engine(
            depth, num_gpu_blocks_override=9, block_size=2, max_num_seqs=2, max_num_batched_tokens=4
        )
        expected = {name: add(engine, name, length, 4) for name, length in (("a", 1), ("b", 7), ("c", 4))}

        def on_step(now: int, step: int = step, runner: FakeRunner = runner) -> None:
            if now == step:
                setattr(runner, moment, MemoryError("injected"))

        results = run_to_end(engine, on_step)
        assert {name: result.token_ids for name, result in results.items()} == expected
        assert_idle(engine)
        if getattr(runner, moment) is not None:  # all was done before
            break
        assert engine.stats().num_oom_recoveries == 1
    assert step > 8


@pytest.mark.parametrize("depth", [0, 1])
def test_only_the_request_that_cannot_fit_alone_fails(depth: int) -> None:
    engine, runner = make_fake_engine(depth, num_gpu_blocks_override=50, block_size=2, max_num_batched_tokens=12)
    watch(runner, lambda batch: any(request.request_id == "big" for request in batch.requests))
    expected = {name: add(engine, name, length, 4) for name, length in (("a", 3), ("big", 9), ("c", 5), ("d", 2))}
    results = run_to_end(engine)
    finished = results.pop("big").finished
    assert finished is not None
    assert finished.reason == "error"
    assert finished.message is not None
    assert finished.message == (
        "out_of_memory: a prefill pass of 2 tokens of this request alone does not fit after 0 computed ones: "
        "tried to allocate 2.50 GiB, 1.12 GiB free"
    )
    assert {name: result.token_ids for name, result in results.items()} == {
        name: tokens for name, tokens in expected.items() if name != "big"
    }
    assert runner.num_releases == 1
    assert_idle(engine)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("depth", [0, 1])
def test_shortages_again_and_again_leave_time_to_get_on(depth: int, kind: str) -> None:
    engine, runner = make_fake_engine(depth, num_gpu_blocks_override=200, block_size=4, max_num_batched_tokens=64)
    num_passes = 0

    def fail_every_other_pass(batch: Batch) -> None:
        nonlocal num_passes
        num_passes += batch.kind == kind
        if batch.kind == kind and num_passes % 2 == 0:
            runner.fail_launch = MemoryError("injected")

    runner.on_launch = fail_every_other_pass
    expected = {
        name: add(engine, name, length, 9) for name, length in zip("abcdef", (40, 3, 75, 1, 22, 60), strict=True)
    }
    results = run_to_end(engine)  # gives up after 1,000 steps
    assert {name: result.token_ids for name, result in results.items()} == expected
    assert engine.stats().num_oom_recoveries > 10
    assert_idle(engine)


def test_a_request_whose_progress_is_lost_each_time_fails_in_the_end() -> None:
    engine, runner = make_fake_engine(
        0, num_gpu_blocks_override=50, block_size=2, max_num_batched_tokens=2, enable_prefix_caching=False
    )
    num_passes = 0

    def fail_every_other_pass(batch: Batch) -> None:
        nonlocal num_passes
        num_passes += 1
        runner.fail_launch = None if num_passes % 2 else MemoryError("injected")

    runner.on_launch = fail_every_other_pass
    add(engine, "a", 9, 3)
    finished = run_to_end(engine)["a"].finished
    assert finished is not None
    assert finished.message == (
        "out_of_memory: a prefill pass of 2 tokens of this request alone does not fit after 2 computed ones: injected"
    )
    assert_idle(engine)


def test_what_a_failed_pass_did_not_compute_is_not_found_later() -> None:
    engine, runner = make_fake_engine(1, num_gpu_blocks_override=50, block_size=2, max_num_batched_tokens=4)
    add(engine, "a", 12, 6)
    results: dict[str, Result] = {}
    while len(results.get("a", Result()).token_ids) < 3:
        step_once(engine, results)
    runner.fail_collect = MemoryError("injected")  # when the block it fills is in the index already
    step_once(engine, results)
    engine.abort(["a"])
    engine.add_request("b", [1] * 12 + results["a"].token_ids, greedy(4))
    assert run_to_end(engine)["b"].token_ids == continuation([1] * 12 + results["a"].token_ids, 19, frozenset())
    assert_idle(engine)


# Each phase of a pass of the real model: what is called, and where it is found.
PHASES: dict[str, Callable[[EngineCore], tuple[Any, str]]] = {
    "rows": lambda engine: (model_runner(engine).rows, "grow"),
    "prefill": lambda engine: (engine.runner, "run_prefill"),
    "decode": lambda engine: (engine.runner, "run_decode"),
    "model": lambda engine: (engine.runner, "forward"),
    "sampling": lambda engine: (model_runner(engine).rows, "choose"),
    "collect": lambda engine: (SampledTokens, "collect"),
}
NUM_INJECTIONS = 17  # in each phase and depth: 204 in all


@pytest.fixture(scope="module")
def small_heap() -> Iterator[None]:
    """The garbage collector, which the last resort calls, need not look at all that tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("depth", [0, 1])
def test_shortages_in_every_phase_of_a_real_model_change_no_token(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, phase: str, depth: int
) -> None:
    prompts = [random_prompt(length, seed=length) for length in (3, 18, 9, 11, 6)]
    params = [make_params(index) for index in range(len(prompts))]
    options = {"max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 16, "num_gpu_blocks_override": 40}
    with running_engine(tiny_models["llama"], **options) as engine:
        expected = generate(engine, prompts, params)
        engine._depth = depth
        runner, (place, name) = model_runner(engine), PHASES[phase](engine)
        original, num_calls, requests = getattr(place, name), 0, list[Request]()

        def launch(batch: Batch) -> SampledTokens:
            requests[:] = batch.requests
            return ModelRunner.launch(runner, batch)

        def fail_sometimes(*args: Any, **keywords: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            result = original(*args, **keywords)  # late: what it writes is written
            rows = [request.row for request in requests]
            is_last_chance = any(request.shortages_in_a_row == 2 for request in requests)
            if num_calls % 2 == 0 and not is_last_chance and engine.counters.num_oom_recoveries < NUM_INJECTIONS:
                runner.rows.lengths[rows] += 3
                runner.rows.last_token[rows] += 1
                raise torch.OutOfMemoryError(CUDA_MESSAGE)
            return result

        monkeypatch.setattr(runner, "launch", launch)
        monkeypatch.setattr(place, name, fail_sometimes)
        while engine.counters.num_oom_recoveries < NUM_INJECTIONS:
            assert generate(engine, prompts, params) == expected


def model_runner(engine: EngineCore) -> ModelRunner:
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner


def make_params(index: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.8 * (index % 2),
        seed=index,
        ignore_eos=True,
        max_tokens=4 + index,
        repetition_penalty=1.0 if index % 3 else 1.3,
        top_k=10 if index % 4 == 3 else 0,
    )


def add(engine: EngineCore, request_id: str, length: int, max_tokens: int) -> list[int]:
    """Queue a prompt of its own; the tokens it must get."""
    prompt = [ord(request_id[0]) % 5] * length
    engine.add_request(request_id, prompt, greedy(max_tokens))
    return continuation(prompt, length + max_tokens, frozenset())


def watch(runner: FakeRunner, does_not_fit: Callable[[Batch], bool]) -> list[str]:
    """Every batch from now on, as text: `p a[0:4] b[0:2]`; those that do not fit fail."""
    log: list[str] = []

    def on_launch(batch: Batch) -> None:
        parts = zip(batch.requests, batch.starts, batch.counts, strict=True)
        log.append(" ".join([batch.kind[0], *(f"{r.request_id}[{s}:{s + n}]" for r, s, n in parts)]))
        if does_not_fit(batch):
            runner.fail_launch = torch.OutOfMemoryError(CUDA_MESSAGE)

    runner.on_launch = on_launch
    return log


def fail(error: Exception) -> NoReturn:
    raise error
