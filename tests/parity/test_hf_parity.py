"""Greedy tokens equal Hugging Face's `generate()`, however requests are batched, cut, cached or preempted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minivllm.sampling_params import SamplingParams
from tests.support.engines import Result, generate, greedy, run_to_end, running_engine
from tests.support.models import TINY_MODELS, TinyModels, hf_greedy, random_prompt

NUM_TOKENS = 24
LENGTHS = (1, 3, 4, 13, 16, 37)  # block size 4: below, at and above its multiples; beyond the window of 12
PROMPTS = [random_prompt(length, seed=length) for length in LENGTHS]
KINDS = tuple(TINY_MODELS)


def expected(directory: Path, prompts: Sequence[list[int]] = PROMPTS, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    return [hf_greedy(directory, prompt, num_tokens) for prompt in prompts]


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Path:
    return tiny_models[request.param]


def test_the_oracle_is_worth_something(directory: Path) -> None:
    """Outputs must vary, or equality would prove nothing."""
    outputs = expected(directory)
    assert len({tuple(output) for output in outputs}) == len(outputs)
    assert sum(len(set(output)) for output in outputs) / len(outputs) > NUM_TOKENS / 3


def test_alone(directory: Path) -> None:
    with running_engine(directory) as engine:
        for prompt, tokens in zip(PROMPTS, expected(directory), strict=True):
            assert generate(engine, [prompt], greedy(NUM_TOKENS)) == [tokens]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_in_one_batch(directory: Path, enforce_eager: bool) -> None:
    with running_engine(directory, enforce_eager=enforce_eager) as engine:
        assert generate(engine, PROMPTS, greedy(NUM_TOKENS)) == expected(directory)


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_any_block_size(directory: Path, block_size: int) -> None:
    with running_engine(directory, block_size=block_size) as engine:
        assert generate(engine, PROMPTS, greedy(NUM_TOKENS)) == expected(directory)


@pytest.mark.parametrize("max_num_batched_tokens", [1, 5, 16])
def test_in_chunks(directory: Path, max_num_batched_tokens: int) -> None:
    with running_engine(directory, max_num_batched_tokens=max_num_batched_tokens) as engine:
        assert generate(engine, PROMPTS, greedy(NUM_TOKENS)) == expected(directory)


def test_joining_while_others_decode(directory: Path) -> None:
    """Each request is added in the middle of the others and ends at another time."""
    num_tokens = [NUM_TOKENS - 2 * index for index in range(len(PROMPTS))]
    with running_engine(directory, max_num_batched_tokens=8) as engine:

        def join(step: int) -> None:
            index, is_turn = divmod(step, 4)
            if is_turn == 0 and index < len(PROMPTS):
                engine.add_request(str(index), PROMPTS[index], greedy(num_tokens[index]))

        results = run_to_end(engine, join)
    together = [results[str(index)].token_ids for index in range(len(PROMPTS))]
    assert together == [tokens[:n] for tokens, n in zip(expected(directory), num_tokens, strict=True)]


def test_over_cached_prefixes(directory: Path) -> None:
    """The second time all full blocks are found, for prompts that are exact multiples of the block size too."""
    longer = [prompt + random_prompt(5, seed=99) for prompt in PROMPTS]
    with running_engine(directory) as engine:
        assert generate(engine, PROMPTS, greedy(NUM_TOKENS)) == expected(directory)
        for index, (prompt, tokens) in enumerate(zip(PROMPTS, expected(directory), strict=True)):
            engine.add_request(str(index), prompt, greedy(NUM_TOKENS))
            result = run_to_end(engine)[str(index)]
            assert result.token_ids == tokens
            assert num_cached(result) == (len(prompt) - 1) // 4 * 4
        assert generate(engine, longer, greedy(8)) == expected(directory, longer, 8)


def test_continuing_a_conversation_finds_its_output_in_the_cache(directory: Path) -> None:
    prompt = PROMPTS[3]
    with running_engine(directory) as engine:
        answer = generate(engine, [prompt], greedy(10))[0]
        turn = prompt + answer + [7, 8, 9]
        engine.add_request("next", turn, greedy(6))
        result = run_to_end(engine)["next"]
    assert result.token_ids == hf_greedy(directory, turn, 6)
    assert num_cached(result) == 20  # 13 + 9 tokens were computed (the last was only sampled)


def num_cached(result: Result) -> int:
    assert result.finished is not None
    return result.finished.num_cached_tokens


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_after_preemption(directory: Path, enable_prefix_caching: bool) -> None:
    with running_engine(
        directory,
        num_gpu_blocks_override=20,
        enable_prefix_caching=enable_prefix_caching,
        max_num_batched_tokens=16,
    ) as engine:
        assert generate(engine, PROMPTS, greedy(NUM_TOKENS)) == expected(directory)
        assert engine.stats().num_preemptions > 0


def test_an_abort_changes_no_token_of_the_others(directory: Path) -> None:
    with running_engine(directory) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(str(index), prompt, greedy(NUM_TOKENS))
        results = run_to_end(engine, lambda step: engine.abort(["1", "4"]) if step == 9 else None)
    for index, tokens in enumerate(expected(directory)):
        ended_early = index in {1, 4}
        assert results[str(index)].reason == ("abort" if ended_early else "length")
        assert results[str(index)].token_ids == tokens[: len(results[str(index)].token_ids)]


SEEDED: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 30},
    {"temperature": 1.3, "seed": 2, "top_p": 0.8},
    {"temperature": 1.0, "seed": -5, "min_p": 0.02, "top_k": 100, "top_p": 0.95},
    {"temperature": 0.7, "seed": 4, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": {5: 3.0}},
]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_seeded_sampling_is_equal_alone_in_a_batch_and_after_preemption(tiny_models: TinyModels, kind: str) -> None:
    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **fields) for fields in SEEDED]
    with running_engine(tiny_models[kind], enable_prefix_caching=False) as engine:
        alone = [generate(engine, [prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
        assert generate(engine, PROMPTS, params) == alone
    with running_engine(tiny_models[kind], num_gpu_blocks_override=20, max_num_batched_tokens=7) as engine:
        assert generate(engine, PROMPTS, params) == alone
        assert engine.stats().num_preemptions > 0


def test_many_requests_through_few_rows(tiny_models: TinyModels) -> None:
    prompts = [random_prompt(1 + (7 * index) % 30, seed=index) for index in range(24)]
    directory = tiny_models["llama"]
    with running_engine(directory, max_num_seqs=3, num_gpu_blocks_override=30) as engine:
        assert generate(engine, prompts, greedy(8)) == expected(directory, prompts, 8)


def test_the_whole_context_window(tiny_models: TinyModels) -> None:
    """Up to the last position of learned (gpt2) and rotary (llama) embeddings."""
    prompt = random_prompt(200, seed=3)
    for kind in ("gpt2", "llama", "mistral"):
        with running_engine(tiny_models[kind]) as engine:
            tokens = generate(engine, [prompt], greedy(None))[0]
        assert tokens == hf_greedy(tiny_models[kind], prompt, 56)
