"""Texts that come while others are tokenized become one batch; everybody gets the tokens of their own."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from frontend.batch_encoder import BatchEncoder
from frontend.tokenizer import Tokenizer
from tests.unit.frontend.conftest import sentencepiece

LONG = "hello " * 100


class HeldTokenizer(Tokenizer):
    """Begins no batch before `go` is set, and notes what is in each."""

    def __init__(self) -> None:
        super().__init__(sentencepiece(), {"bos_token": "<s>"})
        self.go = threading.Event()
        self.batches: list[int] = []

    def encode_batch(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        self.batches.append(len(texts))
        assert self.go.wait(60)
        if any(text == "broken" * 100 for text, _ in texts):
            raise ValueError("broken")
        return super().encode_batch(texts)


@pytest.fixture
def tokenizer() -> HeldTokenizer:
    return HeldTokenizer()


def test_a_batch_is_what_each_text_gives_alone(tokenizer: HeldTokenizer) -> None:
    tokenizer.go.set()
    texts = [("hello", True), ("<s>hello", True), ("", True), ("hello", False), ("é" * 5000, True)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(*pair) for pair in texts]
    assert tokenizer.encode_batch([]) == []


def test_a_short_text_is_encoded_at_once(tokenizer: HeldTokenizer) -> None:
    assert asyncio.run(BatchEncoder(tokenizer).encode(["hello", "x"], True)) == [
        tokenizer.encode("hello"),
        tokenizer.encode("x"),
    ]
    assert tokenizer.batches == []


def test_what_comes_meanwhile_is_one_batch(tokenizer: HeldTokenizer) -> None:
    async def run() -> list[list[list[int]]]:
        encoder = BatchEncoder(tokenizer)
        requests = [[LONG], [LONG + "a", "b"], ["short"], [LONG + "c"], ["d"] * 3]
        tasks = [asyncio.create_task(encoder.encode(texts, index % 2 == 0)) for index, texts in enumerate(requests)]
        await asyncio.sleep(0)  # all of them have asked
        tasks[2].cancel()
        tokenizer.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers.pop(2), asyncio.CancelledError)
        return answers  # type: ignore[return-value]

    first, second, fourth, fifth = asyncio.run(run())
    assert sorted(tokenizer.batches) == [1, 2, 5]
    assert first == [tokenizer.encode(LONG)]
    assert second == [tokenizer.encode(LONG + "a", False), tokenizer.encode("b", False)]
    assert fourth == [tokenizer.encode(LONG + "c", False)]
    assert fifth == [tokenizer.encode("d")] * 3


def test_an_error_reaches_those_of_the_batch(tokenizer: HeldTokenizer) -> None:
    async def run() -> None:
        encoder = BatchEncoder(tokenizer)
        with pytest.raises(ValueError, match="broken"):
            await encoder.encode(["broken" * 100], True)
        assert await encoder.encode([LONG], True) == [tokenizer.encode(LONG)]

    tokenizer.go.set()
    asyncio.run(run())
