"""The engine on a tiny model: admission, every way to end, sampling fields, continuing, and counts that reconcile."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine_core.engine import EngineCore
from minivllm.errors import DuplicateRequestError, InvalidRequestError, StartupError
from minivllm.protocol import Histogram
from minivllm.sampling_params import SamplingParams
from tests.support.engines import Result, generate, greedy, run_to_end, running_engine, step_once
from tests.support.models import VOCAB_SIZE, TinyModels, hf_greedy, hf_model, random_prompt

MAX_MODEL_LEN = 64
PROMPT = random_prompt(9, seed=1)


@pytest.fixture
def engine(tiny_models: TinyModels) -> Iterator[EngineCore]:
    """A tiny llama; leaks fail the test."""
    with running_engine(
        tiny_models["llama"], max_model_len=MAX_MODEL_LEN, num_gpu_blocks_override=40, max_num_seqs=4
    ) as engine:
        yield engine


def run_one(engine: EngineCore, params: SamplingParams, prompt: list[int] = PROMPT, output: list[int] = []) -> Result:  # noqa: B006 - read only
    engine.add_request("one", prompt, params, output)
    return run_to_end(engine)["one"]


@pytest.mark.parametrize(
    ("prompt", "params", "output", "field", "message"),
    [
        ([], {}, [], "prompt", "at least one token"),
        ([1, VOCAB_SIZE], {}, [], "prompt", f"token id {VOCAB_SIZE}, the vocabulary has {VOCAB_SIZE}"),
        ([1, -1], {}, [], "prompt", "token id -1"),
        ([1], {}, [VOCAB_SIZE], "output_token_ids", f"token id {VOCAB_SIZE}"),
        ([1] * MAX_MODEL_LEN, {}, [], "prompt", "the prompt has 64 tokens .* max_model_len is 64"),
        ([1] * 60, {"max_tokens": 5}, [], "max_tokens", "the prompt has 60 tokens and max_tokens is 5, .* is 64"),
        ([1], {"stop_token_ids": (2, VOCAB_SIZE)}, [], "stop_token_ids", f"token id {VOCAB_SIZE}"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, [], "logit_bias", f"token id {VOCAB_SIZE}"),
        ([1], {"max_tokens": 2}, [3, 4], "output_token_ids", "2 output tokens leave nothing to generate"),
        ([1] * 60, {"max_tokens": None}, [1] * 4, "output_token_ids", "4 output tokens leave nothing"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    engine: EngineCore, prompt: list[int], params: dict[str, Any], output: list[int], field: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        engine.add_request("bad", prompt, SamplingParams(**params), output)
    assert refused.value.param == field
    assert not engine.has_work
    assert engine.stats().num_requests_submitted == 0


def test_an_id_in_use_is_refused(engine: EngineCore) -> None:
    engine.add_request("a", PROMPT, greedy(3))
    with pytest.raises(DuplicateRequestError, match="'a' is in use") as refused:
        engine.add_request("a", PROMPT, greedy(3))
    assert refused.value.param == "request_id"
    assert run_to_end(engine)["a"].reason == "length"


def test_max_tokens_ends_with_length(engine: EngineCore, tiny_models: TinyModels) -> None:
    result = run_one(engine, greedy(7))
    assert (result.token_ids, result.reason) == (hf_greedy(tiny_models["llama"], PROMPT, 7), "length")


def test_without_max_tokens_the_context_is_filled(engine: EngineCore) -> None:
    result = run_one(engine, greedy(None))
    assert (len(PROMPT) + len(result.token_ids), result.reason) == (MAX_MODEL_LEN, "length")


def test_the_longest_prompt_leaves_one_token(engine: EngineCore) -> None:
    result = run_one(engine, greedy(1), random_prompt(MAX_MODEL_LEN - 1))
    assert (len(result.token_ids), result.reason) == (1, "length")


def test_stop_token_ids_end_with_stop(engine: EngineCore, tiny_models: TinyModels) -> None:
    tokens = hf_greedy(tiny_models["llama"], PROMPT, 20)
    stop = tokens[6]
    result = run_one(engine, greedy(20, stop_token_ids=(stop, 1)))
    assert result.token_ids == tokens[: tokens.index(stop) + 1]
    assert result.finished is not None
    assert (result.reason, result.finished.stop_token_id) == ("stop", stop)


def test_every_eos_id_of_the_generation_config_stops_unless_ignored(tiny_models: TinyModels) -> None:
    tokens = hf_greedy(tiny_models["llama"], PROMPT, 20)
    eos = (tokens[8], tokens[5])
    first = min(tokens.index(token) for token in eos)
    with running_engine(tiny_models.with_eos("llama", *eos), max_model_len=MAX_MODEL_LEN) as engine:
        assert set(engine.facts(1).eos_token_ids) == set(eos)
        stopped = run_one(engine, greedy(20, ignore_eos=False))
        assert (stopped.token_ids, stopped.reason) == (tokens[: first + 1], "stop")
        assert run_one(engine, greedy(20)).token_ids == tokens
        both = run_one(engine, greedy(20, stop_token_ids=(tokens[2],)))
        assert both.token_ids == tokens[: tokens.index(tokens[2]) + 1]


def test_min_tokens_keeps_stop_tokens_away(engine: EngineCore, tiny_models: TinyModels) -> None:
    tokens = hf_greedy(tiny_models["llama"], PROMPT, 20)
    stop = tokens[3]
    result = run_one(engine, greedy(20, stop_token_ids=(stop,), min_tokens=8))
    assert stop not in result.token_ids[:8]
    assert result.token_ids[: tokens.index(stop)] == tokens[: tokens.index(stop)]
    assert len(result.token_ids) >= 8


def test_min_tokens_counts_resumed_tokens(engine: EngineCore) -> None:
    params = greedy(12, stop_token_ids=(5, 6, 7), min_tokens=6)
    whole = run_one(engine, params).token_ids
    assert run_one(engine, params, output=whole[:4]).token_ids == whole[4:]


def test_logit_bias_forces_and_forbids(engine: EngineCore, tiny_models: TinyModels) -> None:
    tokens = hf_greedy(tiny_models["llama"], PROMPT, 1)
    assert run_one(engine, greedy(4, logit_bias={17: 100.0})).token_ids == [17] * 4
    assert run_one(engine, greedy(1, logit_bias={tokens[0]: -100.0})).token_ids != tokens


def test_repetition_penalty_is_that_of_hugging_face(engine: EngineCore, tiny_models: TinyModels) -> None:
    penalty = 1.8
    token_ids = torch.tensor([PROMPT])
    model: Any = hf_model(tiny_models["llama"])
    output = model.generate(
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),
        do_sample=False,
        max_new_tokens=16,
        repetition_penalty=penalty,
        pad_token_id=0,
    )
    assert run_one(engine, greedy(16, repetition_penalty=penalty)).token_ids == output[0, len(PROMPT) :].tolist()


def test_output_penalties_and_bias_change_the_logits_of_hugging_face(
    engine: EngineCore, tiny_models: TinyModels
) -> None:
    bias = {17: 6.0, 40: -3.0}
    result = run_one(engine, greedy(16, frequency_penalty=1.5, presence_penalty=2.0, logit_bias=bias))
    output: list[int] = []
    for _ in range(16):
        logits = hf_model(tiny_models["llama"])(input_ids=torch.tensor([PROMPT + output])).logits[0, -1].detach()
        for token, addend in bias.items():
            logits[token] += addend
        for token in set(output):
            logits[token] -= 2.0 + 1.5 * output.count(token)
        output.append(int(logits.argmax()))
    assert result.token_ids == output


@pytest.mark.parametrize("num_done", [1, 6, 11])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.7, "seed": -1, "top_p": 0.9, "top_k": 50, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.5},
    ],
    ids=["greedy", "seeded", "filtered", "penalised"],
)
def test_continuing_gives_the_rest_of_the_same_tokens(
    engine: EngineCore, changes: dict[str, Any], num_done: int
) -> None:
    params = SamplingParams(max_tokens=12, **changes)
    whole = run_one(engine, params).token_ids
    rest = run_one(engine, params, output=whole[:num_done])
    assert (rest.token_ids, rest.reason) == (whole[num_done:], "length")


def test_seeds_decide_the_output(engine: EngineCore) -> None:
    outputs = [run_one(engine, SamplingParams(max_tokens=10, seed=seed)).token_ids for seed in (1, 1, 2, -(2**63))]
    assert outputs[0] == outputs[1]
    assert len({tuple(output) for output in outputs}) == 3


def test_without_a_seed_outputs_differ(engine: EngineCore) -> None:
    outputs = generate(engine, [PROMPT] * 4, SamplingParams(max_tokens=10, temperature=2.0))
    assert len({tuple(output) for output in outputs}) == 4


def test_extreme_parameters_run(engine: EngineCore) -> None:
    extreme: list[dict[str, Any]] = [
        {"temperature": 100.0, "top_k": 2**31 - 1, "seed": 2**63 - 1},
        {"temperature": 1e-4, "top_p": 1e-9, "min_p": 1.0},
        {"repetition_penalty": 100.0, "presence_penalty": -2.0, "logit_bias": {0: -100.0, VOCAB_SIZE - 1: 100.0}},
        {"top_k": 1, "seed": 3},
    ]
    outputs = generate(engine, [PROMPT] * 4, [SamplingParams(max_tokens=3, **fields) for fields in extreme])
    greedy_tokens = generate(engine, [PROMPT], greedy(3))[0]
    assert outputs[1] == outputs[3] == greedy_tokens
    assert outputs[2] == [VOCAB_SIZE - 1] * 3


def test_every_stage_can_be_aborted(engine: EngineCore) -> None:
    results: dict[str, Result] = {}
    for index in range(6):  # two more than run at once
        engine.add_request(str(index), random_prompt(20, seed=index), greedy(30))
    engine.abort(["5"])  # not even looked at yet
    step_once(engine, results)
    engine.abort(["0", "4"])  # just prefilled; still waiting
    step_once(engine, results)
    step_once(engine, results)
    engine.abort(["1", "1", "gone"])  # decoding
    results |= {}
    while engine.has_work:
        step_once(engine, results)
    assert {name: result.reason for name, result in results.items()} == {
        "0": "abort", "1": "abort", "2": "length", "3": "length", "4": "abort", "5": "abort",
    }  # fmt: skip
    assert engine.stats().num_requests_finished == {"abort": 4, "length": 2}


def test_counts_and_histograms_reconcile(engine: EngineCore) -> None:
    prompts = [random_prompt(length, seed=length) for length in (3, 8, 17, 30, 41)]
    outputs = generate(engine, prompts, greedy(6))
    stats = engine.stats()
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.generation_tokens == sum(map(len, outputs)) == 30
    assert (stats.num_requests_submitted, stats.num_requests_finished) == (5, {"length": 5})
    histograms = stats.histograms
    num_steps = total(histograms["step_seconds_prefill"]) + total(histograms["step_seconds_decode"])
    assert total(histograms["iteration_tokens"]) == num_steps
    assert histograms["prefill_batch_tokens"].sum == stats.prompt_tokens
    assert total(histograms["prefill_batch_tokens"]) == total(histograms["step_seconds_prefill"])
    assert histograms["decode_batch_size"].sum == stats.generation_tokens - len(prompts)
    assert histograms["iteration_tokens"].sum == stats.prompt_tokens + histograms["decode_batch_size"].sum
    assert all(len(histogram.counts) == len(histogram.bounds) + 1 for histogram in histograms.values())


def total(histogram: Histogram) -> int:
    return sum(histogram.counts)


def test_prefix_hits_are_counted_in_tokens(engine: EngineCore) -> None:
    prompt = random_prompt(13)
    first, second = (run_one(engine, greedy(2), prompt).finished for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (26, 12)
    assert stats.prompt_tokens == 26  # cached ones included, as vLLM counts them


def test_times_of_a_request_are_in_order(engine: EngineCore) -> None:
    finished = run_one(engine, greedy(3)).finished
    assert finished is not None
    assert finished.queue_time >= 0
    assert finished.prefill_time > 0
    assert finished.decode_time > 0


def test_facts_describe_the_model(engine: EngineCore) -> None:
    facts = engine.facts(123)
    assert (facts.pid, facts.device, facts.dtype, facts.vocab_size) == (123, "cpu", "float32", VOCAB_SIZE)
    assert (facts.max_model_len, facts.num_blocks, facts.block_size) == (MAX_MODEL_LEN, 40, 4)
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, head size, bytes
    assert facts.eos_token_ids == []


def test_max_model_len_is_bounded_by_model_and_cache(tiny_models: TinyModels) -> None:
    with running_engine(tiny_models["llama"], num_gpu_blocks_override=5) as engine:
        assert engine.max_model_len == 20
        assert len(run_one(engine, greedy(None)).token_ids) == 20 - len(PROMPT)
    with running_engine(tiny_models["llama"]) as engine:
        assert engine.max_model_len == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 257}, "--max-model-len 257, but the model allows 256"),
        ({"max_model_len": 100, "num_gpu_blocks_override": 3}, "--max-model-len 100 needs .* it holds 12 tokens"),
        (
            {"kv_cache_memory_bytes": 100, "num_gpu_blocks_override": None},
            r"no memory left for the KV cache: .* raise --kv-cache-memory-bytes \(100\)",
        ),
        (
            {"kv_cache_memory_bytes": 2**57, "num_gpu_blocks_override": None},
            r"not enough memory for \d+ KV cache blocks: .* 32.0 PiB .*; lower .*--kv-cache-memory-bytes",
        ),
    ],
)
def test_what_the_cache_cannot_hold_stops_start_up(
    tiny_models: TinyModels, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartupError, match=message), running_engine(tiny_models["llama"], **options):
        pass
