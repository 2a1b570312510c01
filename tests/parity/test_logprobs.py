"""Log-probabilities equal log-softmax of Hugging Face's logits, however the engine cuts or repeats the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import LLM
from minivllm.protocol import Logprobs
from minivllm.sampling_params import SamplingParams
from tests.support.engines import Result, greedy, run_to_end, running_engine
from tests.support.models import TinyModels, hf_model, random_prompt

TOLERANCE = 1e-4
NUM_TOKENS = 12
PROMPTS = [random_prompt(length, seed=length) for length in (1, 2, 4, 13, 37)]
ASKING = {"logprobs": 5, "prompt_logprobs": 3}


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def directory(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Path:
    return tiny_models[request.param]


def hf_logprobs(directory: Path, token_ids: Sequence[int]) -> Tensor:
    """[num_tokens, vocab_size]: row i judges token i + 1."""
    with torch.inference_mode():
        logits: Tensor = hf_model(directory)(input_ids=torch.tensor([list(token_ids)])).logits[0]
    return logits.log_softmax(-1)


def run(directory: Path, params: Sequence[SamplingParams], **options: Any) -> tuple[list[Result], int]:
    """What each of PROMPTS got, all in one batch, and how often one was preempted."""
    with running_engine(directory, **options) as engine:
        for index, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True)):
            engine.add_request(str(index), prompt, one)
        results = run_to_end(engine)
        return [results[str(index)] for index in range(len(PROMPTS))], engine.stats().num_preemptions


def check(columns: Logprobs, token_ids: Sequence[int], expected: Tensor, num_top: int) -> None:
    """`columns` are those of `token_ids` [n] under `expected` [n, vocab_size], and agree with themselves exactly."""
    assert len(columns) == len(token_ids) == len(expected)
    top = expected.topk(num_top) if num_top else None
    for place, token in enumerate(token_ids):
        assert columns.tokens[place] == pytest.approx(expected[place, token].item(), abs=TOLERANCE)
        if top is None:
            continue
        values = columns.top[place * num_top : (place + 1) * num_top]
        assert values == pytest.approx(top.values[place].tolist(), abs=TOLERANCE)
        assert values == sorted(values, reverse=True)
        if token == expected[place].argmax().item():
            assert columns.tokens[place] == max(values)
            assert columns.top_ids[place * num_top] == token
        else:
            assert columns.tokens[place] <= max(values)


def check_result(directory: Path, prompt: list[int], result: Result, params: SamplingParams) -> None:
    expected = hf_logprobs(directory, prompt + result.token_ids)
    check(result.prompt_logprobs, prompt[1:], expected[: len(prompt) - 1], params.prompt_logprobs or 0)
    check(result.logprobs, result.token_ids, expected[len(prompt) - 1 : -1], params.logprobs or 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 5}, {"num_gpu_blocks_override": 14, "max_num_batched_tokens": 16}],
    ids=["whole", "chunks", "preempted"],
)
def test_equal_to_log_softmax(directory: Path, options: dict[str, Any]) -> None:
    params = greedy(NUM_TOKENS, **ASKING)
    results, num_preemptions = run(directory, [params] * len(PROMPTS), **options)
    assert (num_preemptions > 0) == ("num_gpu_blocks_override" in options)
    for prompt, result in zip(PROMPTS, results, strict=True):
        check_result(directory, prompt, result, params)


def test_each_request_of_a_batch_gets_what_it_asked_for(directory: Path) -> None:
    """They are of the model's own distribution, whatever shapes the one that is drawn from."""
    params = [
        greedy(NUM_TOKENS),
        greedy(NUM_TOKENS, logprobs=0),
        greedy(NUM_TOKENS, logprobs=20, presence_penalty=1.5, logit_bias={7: 4.0}),
        SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=1.5, top_k=40, seed=3, logprobs=2),
        greedy(NUM_TOKENS, prompt_logprobs=1),
    ]
    results, _ = run(directory, params)
    for prompt, result, one in zip(PROMPTS, results, params, strict=True):
        expected = hf_logprobs(directory, prompt + result.token_ids)
        if one.logprobs is None:
            assert len(result.logprobs) == 0
        else:
            check(result.logprobs, result.token_ids, expected[len(prompt) - 1 : -1], one.logprobs)
    assert [len(result.prompt_logprobs) for result in results] == [0, 0, 0, 0, len(PROMPTS[-1]) - 1]
    assert any(result.token_ids[i] != result.logprobs.top_ids[2 * i] for result in results[3:4] for i in range(12))


def test_a_cached_prefix_is_computed_again_for_those_who_ask_about_it(directory: Path) -> None:
    prompt = PROMPTS[-1]
    with running_engine(directory) as engine:
        for index, params in enumerate([greedy(1), greedy(1, prompt_logprobs=2), greedy(1, logprobs=2)]):
            engine.add_request(str(index), prompt, params)
            result = run_to_end(engine)[str(index)]
            assert result.finished is not None
            assert result.finished.num_cached_tokens == (36 if index == 2 else 0)
            if index == 1:
                check(result.prompt_logprobs, prompt[1:], hf_logprobs(directory, prompt)[:-1], 2)


def test_an_abort_in_the_middle_of_a_prompt_leaves_nothing(directory: Path) -> None:
    with running_engine(directory, max_num_batched_tokens=8) as engine:
        engine.add_request("a", PROMPTS[-1], greedy(4, **ASKING))
        engine.add_request("b", PROMPTS[-1], greedy(4, **ASKING))
        results = run_to_end(engine, lambda step: engine.abort(["a"]) if step == 2 else None)
    assert 0 < len(results["a"].prompt_logprobs) < len(PROMPTS[-1]) - 1
    check_result(directory, PROMPTS[-1], results["b"], greedy(4, **ASKING))


def test_offline(tiny_models: TinyModels) -> None:
    directory = tiny_models["llama"]
    llm = LLM(str(directory), tokenize=False, device="cpu", dtype="float32", max_num_batched_tokens=8)
    plain, asking = llm.generate([PROMPTS[3], PROMPTS[4]], [greedy(5), greedy(5, **ASKING)], use_progress_bar=False)
    assert (plain.logprobs, plain.prompt_logprobs) == (None, None)
    assert asking.logprobs is not None
    assert asking.prompt_logprobs is not None
    expected = hf_logprobs(directory, PROMPTS[4] + asking.token_ids)
    check(asking.prompt_logprobs, PROMPTS[4][1:], expected[: len(PROMPTS[4]) - 1], 3)
    check(asking.logprobs, asking.token_ids, expected[len(PROMPTS[4]) - 1 : -1], 5)
    llm.engine.check_integrity()
