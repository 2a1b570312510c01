"""The real default model, loaded once: tokens equal Hugging Face's in every company, cut, cached and preempted."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_core.engine import EngineCore
from minivllm.sampling_params import SamplingParams
from tests.support.engines import generate, greedy, run_to_end, running_engine
from tests.support.models import hf_greedy, random_prompt

VOCAB_SIZE = 49152
PROMPTS = [random_prompt(length, seed=length, vocab_size=VOCAB_SIZE) for length in (5, 16, 32, 50)]


@pytest.fixture(scope="module")
def engine(default_model_dir: Path) -> Iterator[EngineCore]:
    """Prompts are cut into chunks, and a few long requests do not fit together."""
    with running_engine(
        default_model_dir, block_size=16, num_gpu_blocks_override=8, max_num_batched_tokens=24, max_model_len=128
    ) as engine:
        yield engine


def test_alone_and_in_a_batch(engine: EngineCore, default_model_dir: Path) -> None:
    tokens = [hf_greedy(default_model_dir, prompt, 8) for prompt in PROMPTS]
    assert generate(engine, PROMPTS[:1], greedy(8)) == tokens[:1]
    assert generate(engine, PROMPTS, greedy(8)) == tokens


def test_over_the_cache(engine: EngineCore, default_model_dir: Path) -> None:
    generate(engine, PROMPTS[2:], greedy(1))
    before = engine.stats().prefix_cache_hits
    tokens = [hf_greedy(default_model_dir, prompt, 8) for prompt in PROMPTS[2:]]
    assert generate(engine, PROMPTS[2:], greedy(8)) == tokens
    assert engine.stats().prefix_cache_hits - before == 16 + 48  # of 32 and 50 tokens: the last one is computed


def test_joining_while_others_decode(engine: EngineCore, default_model_dir: Path) -> None:
    def join(step: int) -> None:
        index, is_turn = divmod(step, 2)
        if is_turn == 0 and index < len(PROMPTS):
            engine.add_request(str(index), PROMPTS[index], greedy(8))

    results = run_to_end(engine, join)
    for index, prompt in enumerate(PROMPTS):
        assert results[str(index)].token_ids == hf_greedy(default_model_dir, prompt, 8)


def test_after_preemption(engine: EngineCore, default_model_dir: Path) -> None:
    prompts = [random_prompt(6, seed=seed, vocab_size=VOCAB_SIZE) for seed in range(3)]
    assert generate(engine, prompts, greedy(30)) == [hf_greedy(default_model_dir, prompt, 30) for prompt in prompts]
    assert engine.stats().num_preemptions > 0


def test_seeded_sampling_alone_and_in_a_batch(engine: EngineCore) -> None:
    params = [
        SamplingParams(max_tokens=6, temperature=0.9, top_p=0.95, seed=seed, ignore_eos=True) for seed in range(4)
    ]
    alone = [generate(engine, [prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert generate(engine, PROMPTS, params) == alone
