"""Text ↔ token ids with the `tokenizers` library alone, so that this process needs neither transformers nor torch."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from frontend.chat_template import ChatTemplate, Message, find_chat_template
from frontend.token_bytes import TokenBytes
from minivllm.errors import InvalidRequestError, StartupError

# Steps before the model that can make text shorter by any amount.
_SWALLOWING = {"Lowercase", "NFKC", "NFKD", "Replace", "Strip", "StripAccents", "Precompiled", "Nmt", "BertNormalizer"}


class Tokenizer:
    """A model's tokenizer and chat template.

    special_tokens: "bos_token", "eos_token", … → their text. token_bytes: see there. Safe to use from several threads.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], chat_template: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.token_bytes = TokenBytes(backend)
        self._chat_template = ChatTemplate(chat_template, special_tokens) if chat_template else None

    @classmethod
    def from_directory(cls, directory: Path, chat_template: Path | None = None) -> Self:
        """Read tokenizer.json and what stands beside it. Raises `StartupError` saying which file is at fault."""
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise StartupError(f"no tokenizer.json in {directory}")
        try:
            config = _read_json(directory / "tokenizer_config.json")
            special_tokens = _special_tokens(_read_json(directory / "special_tokens_map.json") | config)
            source = chat_template.read_text("utf-8") if chat_template else find_chat_template(directory, config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StartupError(f"cannot read the tokenizer's files in {directory}: {error}") from error
        return cls(_load(file), special_tokens, source)

    @property
    def vocab_size(self) -> int:
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    @cached_property
    def max_token_bytes(self) -> int | None:
        """Most UTF-8 bytes of text that one token can stand for; None for a tokenizer that may swallow any amount.

        Known for byte-level ones: every byte lies in a token, and only NFC, at most 3 to 1, comes before.
        """
        kinds = set(re.findall(r'"type":"(\w+)"', self._backend.to_str().partition('"model":')[0]))
        strips = any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values())
        if "ByteLevel" not in kinds or kinds & _SWALLOWING or strips:
            return None
        longest = max(len(token.encode()) for token in self._backend.get_vocab(with_added_tokens=True))
        return longest * (3 if "NFC" in kinds else 1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A text that already begins with the BOS token gets no second one."""
        token_ids: list[int] = self._backend.encode(text, add_special_tokens=self._adds(text, add_special_tokens)).ids
        return token_ids

    def encode_batch(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """What `encode` gives for each (text, add_special_tokens), on several cores at once where they are long."""
        token_ids: list[list[int]] = [[]] * len(texts)
        for add in (True, False):
            places = [place for place, (text, wanted) in enumerate(texts) if self._adds(text, wanted) is add]
            encodings = self._backend.encode_batch_fast([texts[place][0] for place in places], add_special_tokens=add)
            for place, encoding in zip(places, encodings, strict=True):
                token_ids[place] = encoding.ids
        return token_ids

    def _adds(self, text: str, wanted: bool) -> bool:
        bos = self.special_tokens.get("bos_token")
        return wanted and not (bos and text.startswith(bos))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of complete `token_ids`; for ids that are still being generated use `IncrementalDetokenizer`."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt text of a chat; encode it without special tokens. Raises `InvalidRequestError`."""
        if self._chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template: send `prompt` instead of `messages`", "messages"
            )
        return self._chat_template.render(messages, add_generation_prompt)


def _load(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every broken file
        raise StartupError(f"cannot read {file}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every `…_token` entry; an entry is the text itself or an object that holds it."""
    texts = {name: _token_text(entry) for name, entry in config.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None
