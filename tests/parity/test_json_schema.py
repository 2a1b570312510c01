"""What follows a JSON schema follows it however the engine cuts or repeats the work, and disturbs nobody beside it."""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import llguidance
import pytest
import tokenizers
import torch

from engine_core.device import LaunchedTokens, load_device
from engine_core.engine import EngineCore
from engine_core.grammar import Grammars, unpack
from engine_core.scheduler import Batch
from minivllm.config import EngineConfig, ModelConfig
from minivllm.errors import InvalidRequestError
from minivllm.json_schema import ANY_OBJECT, MAX_SCHEMA_LENGTH, check_json_schema
from minivllm.sampling_params import SamplingParams
from tests.support.engines import Result, assert_idle, greedy, run_to_end, running_engine
from tests.support.models import VOCAB_SIZE, TinyModels, random_prompt
from tests.support.schemas import EOS_ID, PERSON, follows_person, save_tokenizer, text_of

SCHEMA = json.dumps(PERSON)
PROMPTS = [random_prompt(length, seed=length) for length in (3, 5, 9, 14, 22, 31)]
FREE = [greedy(30), SamplingParams(max_tokens=30, temperature=1.2, seed=5, ignore_eos=True)]
ASKING = [
    SamplingParams(temperature=0.0, max_tokens=None, json_schema=SCHEMA),
    SamplingParams(temperature=1.0, max_tokens=None, json_schema=SCHEMA, seed=1),
    SamplingParams(temperature=1.5, max_tokens=None, json_schema=SCHEMA, seed=2, top_k=20, top_p=0.9),
    SamplingParams(temperature=0.7, max_tokens=None, json_schema=SCHEMA, seed=3, presence_penalty=1.0, min_p=0.01),
]
PARAMS = [ASKING[0], FREE[0], ASKING[1], FREE[1], ASKING[2], ASKING[3]]


@pytest.fixture(scope="module")
def directory(tiny_models: TinyModels) -> Path:
    return tiny_models.with_eos("llama", EOS_ID)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schema-tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> tokenizers.Tokenizer:
    return save_tokenizer(tokenizer_dir)


@contextmanager
def engine_of_depth(depth: int, directory: Path, tokenizer_dir: Path, **options: Any) -> Iterator[EngineCore]:
    """An engine with `depth` passes in flight between steps, as on a GPU."""
    settings = {"model": str(directory), "tokenizer": str(tokenizer_dir), "device": "cpu", "block_size": 4}
    config = EngineConfig(**{"num_gpu_blocks_override": 400} | settings | options)
    engine = EngineCore(config, directory, load=lambda *given: replace(load_device(*given), depth=depth))
    yield engine
    assert_idle(engine)


def run_all(engine: EngineCore) -> list[Result]:
    for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        engine.add_request(str(index), prompt, params)
    results = run_to_end(engine)
    return [results[str(index)] for index in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def expected(directory: Path, tokenizer_dir: Path, tokenizer: tokenizers.Tokenizer) -> list[Result]:
    """What each of PROMPTS gets, all in one batch with room for all."""
    with engine_of_depth(0, directory, tokenizer_dir) as engine:
        return run_all(engine)


def test_outputs_follow_the_schema(expected: list[Result], tokenizer: tokenizers.Tokenizer) -> None:
    for params, result in zip(PARAMS, expected, strict=True):
        if params.json_schema is not None:
            assert result.reason == "stop"
            assert follows_person(text_of(tokenizer, result.token_ids))
    texts = {text_of(tokenizer, result.token_ids) for result in expected}
    assert len(texts) == len(PROMPTS), "the model has no say"


def test_free_requests_beside_them_get_the_same_tokens(directory: Path, expected: list[Result]) -> None:
    with running_engine(directory) as engine:
        for index, params in enumerate(PARAMS):
            if params.json_schema is None:
                engine.add_request(str(index), PROMPTS[index], params)
        for request_id, result in run_to_end(engine).items():
            assert result.token_ids == expected[int(request_id)].token_ids


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 8}, {"num_gpu_blocks_override": 36}])
def test_the_same_in_chunks_and_after_preemption(
    depth: int,
    options: dict[str, Any],
    directory: Path,
    tokenizer_dir: Path,
    expected: list[Result],
) -> None:
    with engine_of_depth(depth, directory, tokenizer_dir, **options) as engine:
        results = run_all(engine)
        assert (engine.stats().num_preemptions > 0) == ("num_gpu_blocks_override" in options)
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]


@pytest.mark.parametrize("depth", [0, 1])
def test_the_same_after_passes_without_memory(
    depth: int, directory: Path, tokenizer_dir: Path, expected: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of_depth(depth, directory, tokenizer_dir) as engine:
        launch, num_launches = engine.runner.launch, itertools.count()

        def fail_sometimes(batch: Batch) -> LaunchedTokens:
            launched = launch(batch)  # the matchers have moved on
            if next(num_launches) in {3, 9, 15}:
                raise torch.OutOfMemoryError("on purpose")
            return launched

        monkeypatch.setattr(engine.runner, "launch", fail_sometimes)
        results = run_all(engine)
        assert engine.stats().num_oom_recoveries == 3
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]


def test_a_resumed_request_goes_on_where_it_was(directory: Path, tokenizer_dir: Path, expected: list[Result]) -> None:
    with engine_of_depth(0, directory, tokenizer_dir) as engine:
        for index in (0, 4):
            whole = expected[index].token_ids
            for cut in (1, len(whole) // 2):
                engine.add_request("resumed", PROMPTS[index], PARAMS[index], whole[:cut])
                assert whole[:cut] + run_to_end(engine)["resumed"].token_ids == whole
        with pytest.raises(InvalidRequestError, match="output_token_ids do not follow json_schema"):
            engine.add_request("other", PROMPTS[0], PARAMS[0], [5, 6, 7])


def test_log_probabilities_are_of_the_models_own_distribution(
    directory: Path, tokenizer_dir: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    with engine_of_depth(0, directory, tokenizer_dir) as engine:
        engine.add_request("free", PROMPTS[0], greedy(1, logprobs=3))
        engine.add_request("asking", PROMPTS[0], SamplingParams(temperature=0, json_schema=SCHEMA, logprobs=3))
        results = run_to_end(engine)
    free, asking = results["free"].logprobs, results["asking"].logprobs
    assert asking.top_ids[:3] == free.top_ids
    assert asking.top[:3] == pytest.approx(free.top, abs=1e-5)
    assert tokenizer.decode([results["asking"].token_ids[0]]).startswith("{")
    assert asking.tokens[0] < free.tokens[0], "the most probable token does not begin an object"


def test_limits_and_ends(directory: Path, tokenizer_dir: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """max_tokens cuts; the schema's end goes before min_tokens; where EOS is ignored nothing but EOS follows."""
    with engine_of_depth(0, directory, tokenizer_dir) as engine:
        for name, params in (
            ("cut", greedy(4, json_schema=SCHEMA)),
            ("long", greedy(120, json_schema=SCHEMA, ignore_eos=False, min_tokens=119)),
            ("ignored", greedy(120, json_schema=SCHEMA)),
        ):
            engine.add_request(name, PROMPTS[0], params)
        results = run_to_end(engine)
    assert (results["cut"].reason, len(results["cut"].token_ids)) == ("length", 4)
    assert results["long"].reason == "stop"
    assert follows_person(text_of(tokenizer, results["long"].token_ids))
    ignored = results["ignored"].token_ids
    assert (results["ignored"].reason, len(ignored)) == ("length", 120)
    assert set(ignored[ignored.index(EOS_ID) :]) == {EOS_ID}
    assert follows_person(text_of(tokenizer, ignored))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"type":"objekt"}', "Invalid type: objekt"),
        ('{"not":{"type":"string"}}', 'Unimplemented keys: ["not"]'),
        ('{"type":"string","pattern":"("}', "unclosed group"),
        (json.dumps({"description": "x" * MAX_SCHEMA_LENGTH}), f"at most {MAX_SCHEMA_LENGTH} are allowed"),
    ],
)
def test_bad_schemas_are_refused_alike_with_and_without_a_vocabulary(
    schema: str, reason: str, directory: Path, tokenizer_dir: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as refused:
        check_json_schema(schema)
    assert refused.value.param == "json_schema"
    grammars = Grammars(ModelConfig(model=str(directory), tokenizer=str(tokenizer_dir)), VOCAB_SIZE, [EOS_ID])
    with pytest.raises(InvalidRequestError, match=re.escape(reason)):
        grammars.check(schema, [])


def test_a_schema_that_is_its_own_definition_is_refused(
    directory: Path, tokenizer_dir: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    with engine_of_depth(0, directory, tokenizer_dir) as engine:
        for schema in ({"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}):
            with pytest.raises(InvalidRequestError, match="json_schema cannot be followed"):
                engine.add_request("a", [1], SamplingParams(json_schema=json.dumps(schema)))


def test_what_an_engine_needs_for_schemas(tiny_models: TinyModels, directory: Path, tmp_path: Path) -> None:
    params = SamplingParams(json_schema=ANY_OBJECT)
    with (
        running_engine(directory) as engine,
        pytest.raises(InvalidRequestError, match=r"json_schema needs the model's tokenizer: .* no tokenizer\.json"),
    ):
        engine.add_request("a", [1], params)
    save_tokenizer(tmp_path)
    with (
        running_engine(tiny_models["llama"], tokenizer=str(tmp_path)) as engine,
        pytest.raises(InvalidRequestError, match="end-of-sequence token"),
    ):
        engine.add_request("a", [1], params)


def test_beyond_the_limits_of_the_library_one_request_ends(
    directory: Path, tokenizer_dir: Path, tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = llguidance.LLParserLimits(step_max_items=1, verbose_errors=False)
    monkeypatch.setattr(llguidance, "LLParserLimits", lambda **_: limits)
    with engine_of_depth(1, directory, tokenizer_dir) as engine:
        engine.add_request("asking", PROMPTS[0], greedy(9, json_schema=SCHEMA, logprobs=1))
        engine.add_request("free", PROMPTS[1], FREE[0])
        results = run_to_end(engine)
    finished = results["asking"].finished
    assert finished is not None
    assert (finished.reason, results["free"].reason) == ("error", "length")
    assert "json_schema cannot be followed any further" in (finished.message or "")


def test_unpack() -> None:
    words = torch.tensor([[0b1011, -1], [0, -(2**31)]], dtype=torch.int32)
    bits = unpack(words, 40)
    assert bits.shape == (2, 40)
    assert bits[0].nonzero().flatten().tolist() == [0, 1, 3, *range(32, 40)]
    assert not bits[1].any()
    assert unpack(words, 64)[1].nonzero().flatten().tolist() == [63]


def test_without_the_extra(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with (
        running_engine(directory) as engine,
        pytest.raises(InvalidRequestError, match=r"pip install 'mini-vllm\[grammar\]'"),
    ):
        engine.add_request("a", [1], SamplingParams(json_schema=SCHEMA))
