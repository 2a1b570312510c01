"""Encoding adds special tokens once; broken files stop the start with their name."""

from pathlib import Path

import pytest

from frontend.tokenizer import Tokenizer
from minivllm.errors import StartupError
from tests.unit.frontend.conftest import byte_level, sentencepiece

BOS = 1


def test_bos_is_added_once() -> None:
    tokenizer = Tokenizer(sentencepiece(), {"bos_token": "<s>"})
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert plain[0] != BOS
    assert tokenizer.encode("hello") == [BOS, *plain]
    assert tokenizer.encode("<s>hello").count(BOS) == 1


def test_truncation_and_padding_of_the_file_are_off() -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    assert Tokenizer(backend, {}).decode(Tokenizer(backend, {}).encode("hello world end")) == "hello world end"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{")]
)
def test_a_broken_file_stops_the_start(tmp_path: Path, name: str, content: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    with pytest.raises(StartupError, match="cannot read"):
        Tokenizer.from_directory(tmp_path)
