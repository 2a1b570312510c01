"""The engine on a GPU, compiled, captured and one pass ahead, against itself on the CPU. Skipped without a GPU."""

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from engine_core.engine import EngineCore
from engine_core.model_runner import SampledTokens
from minivllm.config import EngineConfig
from minivllm.errors import StartupError
from minivllm.sampling_params import SamplingParams
from tests.support.schemas import EOS_ID, PERSON, save_tokenizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # of torch's compiler
]

VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {},
    "graphs, chunks of 64": {"max_num_batched_tokens": 64},
    "graphs, a tiny pool": {"num_gpu_blocks_override": 140},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=512,
        vocab_size=1000,
        initializer_range=0.2,
        eos_token_id=EOS_ID,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def cpu_engine(model_dir: Path) -> EngineCore:
    return make_engine(model_dir, device="cpu", enforce_eager=True)


@pytest.fixture(scope="module")
def expected(cpu_engine: EngineCore) -> dict[str, list[int]]:
    return run(cpu_engine)


@pytest.fixture(scope="module", params=list(VARIANTS))
def engine(model_dir: Path, request: pytest.FixtureRequest) -> EngineCore:
    return make_engine(model_dir, device="cuda", **VARIANTS[request.param])


def test_tokens_equal_those_of_the_cpu(engine: EngineCore, expected: dict[str, list[int]]) -> None:
    assert run(engine) == expected


def test_log_probabilities_equal_those_of_the_cpu(engine: EngineCore, cpu_engine: EngineCore) -> None:
    assert log_probabilities(engine) == pytest.approx(log_probabilities(cpu_engine), abs=1e-3)


@pytest.mark.parametrize(("phase", "period"), [("run_prefill", 5), ("run_decode", 23), ("collect", 23)])
def test_shortages_in_every_phase_change_no_token(
    engine: EngineCore, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, phase: str, period: int
) -> None:
    before = engine.counters.num_oom_recoveries
    place: Any = SampledTokens if phase == "collect" else engine.runner
    original, num_calls = getattr(place, phase), 0

    def fail_sometimes(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        result = original(*args)  # late: what it writes is written
        if num_calls % period == 0 and not any(request.shortages_in_a_row for request in engine._requests.values()):
            raise torch.OutOfMemoryError("injected")
        return result

    monkeypatch.setattr(place, phase, fail_sometimes)
    assert run(engine) == expected
    assert engine.counters.num_oom_recoveries > before + 1


def test_a_device_that_is_really_full_changes_no_token(model_dir: Path, expected: dict[str, list[int]]) -> None:
    engine = make_engine(model_dir, device="cuda", enforce_eager=True)
    try:
        others = fill_device(all_but=17 * 2**20)  # all prompts at once would need twice that
        assert run(engine, join_every=0) == expected
        assert others
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.counters.num_oom_recoveries > 0


def test_start_up_in_too_little_memory_says_what_to_change(model_dir: Path) -> None:
    advice = r"raise --gpu-memory-utilization \(1e-05\), lower --max-num-batched-tokens or --max-num-seqs \(16\)"
    with pytest.raises(StartupError, match=advice):
        make_engine(model_dir, device="cuda", kv_cache_memory_bytes=None, gpu_memory_utilization=1e-5)


def make_engine(model_dir: Path, **options: Any) -> EngineCore:
    defaults = {"max_num_seqs": 16, "kv_cache_memory_bytes": 2**28, "dtype": "float32"}
    return EngineCore(EngineConfig.model_validate({"model": str(model_dir), **defaults, **options}), model_dir)


def fill_device(all_but: int) -> list[torch.Tensor]:
    """Tensors that leave `all_but` bytes to large ones, and a few MiB to small ones, as torch sees the device."""
    torch.cuda.empty_cache()
    segment, size = 20 * 2**20, 5 * 2**18  # torch takes a segment for any tensor of 1 to 10 MiB: 16 of these fill it
    limit = torch.cuda.memory_reserved() + 2 * segment + segment // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    tensors = []
    with suppress(torch.OutOfMemoryError):
        while True:
            tensors.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    return tensors[: -all_but // size]


def run(engine: EngineCore, join_every: int = 2) -> dict[str, list[int]]:
    """Outputs of 24 requests of every kind; one joins every so many steps, or (0) all before the first."""
    rng = random.Random(1)
    waiting = [(f"request-{i}", random_prompt(rng), random_params(rng, i)) for i in range(24)]
    outputs: dict[str, list[int]] = {request_id: [] for request_id, _, _ in waiting}
    while engine.has_work or waiting:
        for _ in range(1 if join_every else len(waiting)):
            if waiting:
                engine.add_request(*waiting.pop(0))
        for _ in range(join_every or 1):
            for output in engine.step():
                outputs[output.request_id] += output.token_ids
    engine.check_integrity()
    return outputs


def log_probabilities(engine: EngineCore) -> list[float]:
    """Of the tokens of three prompts, of what follows them, and of the most probable ones at each place."""
    rng = random.Random(2)
    for index in range(3):
        prompt = [rng.randint(0, 999) for _ in range(30 * index + 5)]
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=6, logprobs=2, prompt_logprobs=2)
        engine.add_request(f"asking-{index}", prompt, params)
    own: dict[str, list[float]] = {f"asking-{index}": [] for index in range(3)}
    top: dict[str, list[float]] = {request_id: [] for request_id in own}
    while engine.has_work:
        for output in engine.step():
            for logprobs in filter(None, (output.prompt_logprobs, output.logprobs)):
                own[output.request_id] += logprobs.tokens
                top[output.request_id] += logprobs.top
    return [value for values in (*own.values(), *top.values()) for value in values]


def random_prompt(rng: random.Random) -> list[int]:
    length = rng.choice([1, 15, 16, 17, rng.randint(2, 700)])
    return [rng.randint(0, 999) for _ in range(length)]


def random_params(rng: random.Random, index: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.8 * (index % 2),
        seed=index,
        ignore_eos=True,
        max_tokens=rng.randint(1, 60),
        top_k=0 if index % 3 else 20,
        repetition_penalty=1.0 if index % 5 else 1.2,
        json_schema=None if index % 6 else json.dumps(PERSON),
    )
