"""Offline generation on the real model: equal to Hugging Face, in order, and usable again after an error."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from minivllm import LLM, SamplingParams
from minivllm.errors import InvalidRequestError
from tests.support.engines import assert_idle
from tests.support.models import hf_greedy

PROMPTS = ["The capital of France is", "One, two, three,", "Water boils at"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def shared_llm(default_model_dir: Path) -> LLM:
    return LLM(str(default_model_dir), device="cpu", num_gpu_blocks_override=60, max_model_len=256)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    yield shared_llm
    assert_idle(shared_llm.engine)


def test_generate_equals_hugging_face_in_order(llm: LLM, default_model_dir: Path) -> None:
    assert llm.tokenizer is not None
    completions = llm.generate(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        token_ids = llm.tokenizer.encode(prompt)
        assert completion.prompt_token_ids == token_ids
        assert completion.token_ids == hf_greedy(default_model_dir, token_ids, 8)
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert completion.finished.reason == "length"


def test_one_prompt_may_be_text_or_ids(llm: LLM) -> None:
    assert llm.tokenizer is not None
    text = llm.generate(PROMPTS[0], GREEDY, use_progress_bar=False)
    ids = llm.generate(llm.tokenizer.encode(PROMPTS[0]), GREEDY, use_progress_bar=False)
    assert len(text) == len(ids) == 1
    assert text[0].token_ids == ids[0].token_ids
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (1, 2, 3)]
    assert [len(completion.token_ids) for completion in llm.generate(PROMPTS, params)] == [1, 2, 3]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[1], GREEDY)[0].text
    stop = whole[3:6]
    completion = llm.generate(PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=8, stop=(stop,)))[0]
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finished.reason == "stop"


def test_chat_uses_the_template(llm: LLM) -> None:
    completion = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0.0, max_tokens=16)
    )
    assert "Paris" in completion.text


def test_a_bad_prompt_spoils_neither_this_call_nor_the_next(llm: LLM) -> None:
    prompts: list[str | list[int]] = [PROMPTS[0], [99999]]
    with pytest.raises(InvalidRequestError, match="token id 99999"):
        llm.generate(prompts, GREEDY)
    assert_idle(llm.engine)
    with pytest.raises(ValueError, match="shorter"):
        llm.generate(PROMPTS, [GREEDY])
    assert_idle(llm.engine)
    assert len(llm.generate(PROMPTS[0], GREEDY)[0].token_ids) == 8


def test_an_interrupted_call_leaves_an_idle_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(3))
    step = llm.engine.step

    def interrupted() -> object:
        if next(steps, None) is None:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert_idle(llm.engine)
    assert len(llm.generate(PROMPTS[0], GREEDY)[0].token_ids) == 8
