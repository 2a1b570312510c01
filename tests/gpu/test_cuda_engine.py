"""The engine on a GPU, compiled, captured and one pass ahead, against itself on the CPU. Skipped without a GPU."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from engine_core.engine import EngineCore
from minivllm.config import EngineConfig
from minivllm.sampling_params import SamplingParams

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
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> dict[str, list[int]]:
    return generate(model_dir, device="cpu", enforce_eager=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_equal_those_of_the_cpu(model_dir: Path, expected: dict[str, list[int]], variant: str) -> None:
    assert generate(model_dir, device="cuda", **VARIANTS[variant]) == expected


def generate(model_dir: Path, **options: Any) -> dict[str, list[int]]:
    """Outputs of 24 requests of every kind that join one every other step."""
    defaults = {"max_num_seqs": 16, "kv_cache_memory_bytes": 2**28, "dtype": "float32"}
    engine = EngineCore(EngineConfig.model_validate({"model": str(model_dir), **defaults, **options}), model_dir)
    rng = random.Random(1)
    waiting = [(f"request-{i}", random_prompt(rng), random_params(rng, i)) for i in range(24)]
    outputs: dict[str, list[int]] = {request_id: [] for request_id, _, _ in waiting}
    while engine.has_work or waiting:
        if waiting:
            engine.add_request(*waiting.pop(0))
        for _ in range(2):
            for output in engine.step():
                outputs[output.request_id] += output.token_ids
    engine.check_integrity()
    return outputs


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
    )
