"""LangChain and LiteLLM. `scripts/test --all` installs them; without them these tests are skipped."""

from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend
MODEL = "smol"
QUESTION = "What is the capital of France?"


def test_langchain(base_url: str) -> None:
    module = pytest.importorskip("langchain_openai")
    chat = module.ChatOpenAI(
        model=MODEL, base_url=base_url, api_key="none", temperature=0, max_tokens=32, max_retries=0, stream_usage=True
    )
    answer = chat.invoke(QUESTION)
    assert "Paris" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    chunks = list(chat.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usage[-1]["output_tokens"] == answer.usage_metadata["output_tokens"]
    batch = chat.batch([QUESTION, "What is the capital of Italy?"])
    assert batch[0].content == answer.content
    assert "Italy" in batch[1].content
    history = chat.invoke([("system", "Be brief."), ("human", QUESTION), answer, ("human", "Say it again.")])
    assert history.content
    completion = module.OpenAI(model=MODEL, base_url=base_url, api_key="none", temperature=0, max_tokens=4, n=1)
    assert "Paris" in completion.invoke("The capital of France is")


def test_litellm(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no look-up in the net
    litellm = pytest.importorskip("litellm")
    options: dict[str, Any] = {
        "model": f"hosted_vllm/{MODEL}", "api_base": base_url, "api_key": "none", "temperature": 0, "max_tokens": 32,
        "messages": [{"role": "user", "content": QUESTION}], "num_retries": 0,
    }  # fmt: skip
    answer = litellm.completion(**options).choices[0]
    assert "Paris" in answer.message.content
    assert answer.finish_reason == "stop"
    chunks = list(litellm.completion(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.message.content
    text = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="One, two, three,", api_base=base_url, api_key="none",
        max_tokens=4, temperature=0, num_retries=0,
    )  # fmt: skip
    assert text.choices[0].text
