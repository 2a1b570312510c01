"""JSON schemas for tests, a tokenizer for tiny models, and what it means to follow one of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.support.models import VOCAB_SIZE

EOS = "<eos>"
EOS_ID = 0
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "size": {"enum": ["small", "large"]},
    },
    "required": ["name", "age", "size"],
    "additionalProperties": False,
}


def save_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """Write a byte-level tokenizer into `directory`, smaller than a tiny model's vocabulary. Token 0 is EOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 10, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    corpus = ['{"name": "Ada", "age": 36, "size": "small"}', '{"name":"Bo","age":7,"size":"large"}\n']
    tokenizer.train_from_iterator(corpus * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def text_of(tokenizer: tokenizers.Tokenizer, token_ids: Sequence[int]) -> str:
    """The text before EOS."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text


def follows_person(text: str) -> bool:
    """Whether `text` is JSON that follows `PERSON`."""
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "size"]
        and isinstance(person["name"], str)
        and len(person["name"]) <= 6
        and type(person["age"]) is int
        and 0 <= person["age"] <= 150
        and person["size"] in {"small", "large"}
    )
