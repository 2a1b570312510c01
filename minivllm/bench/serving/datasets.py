"""What is asked of the server: random prompts, nano-vllm's workload, or requests out of a file."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minivllm.bench.offline.work import nano_work
from minivllm.bench.serving.endpoints import Prompt, RequestSpec
from minivllm.errors import StartupError

_CHARACTERS_PER_TOKEN = 4  # of English text, where no count is given
# About one token each in every vocabulary: chat endpoints take text, and the server's usage says what it really was.
_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother"),
    *("area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business"),
)


class RandomPrompts:
    """Prompts of random tokens, after a prefix that some of them share. as_text: words instead of token ids."""

    def __init__(self, source: random.Random, max_token_id: int, as_text: bool) -> None:
        self._source = source
        self._max_token_id = max_token_id
        self._as_text = as_text

    def requests(
        self,
        num_requests: int,
        input_len: int,
        output_len: int,
        range_ratio: float = 0.0,
        prefix_len: int = 0,
        num_prefixes: int = 1,
    ) -> list[RequestSpec]:
        """Lengths are uniform in [len × (1 - range_ratio), len × (1 + range_ratio)]; a prefix comes on top."""
        prefixes = [self._draw(prefix_len) for _ in range(num_prefixes)]

        def length(mean: int) -> int:
            spread = int(mean * range_ratio)
            return max(1, self._source.randint(mean - spread, mean + spread))

        return [
            RequestSpec(
                self.as_prompt(prefixes[index % num_prefixes] + self._draw(length(input_len))), length(output_len)
            )
            for index in range(num_requests)
        ]

    def as_prompt(self, token_ids: list[int]) -> Prompt:
        """`token_ids`, or as many words where text is needed."""
        return " ".join(_WORDS[token_id % len(_WORDS)] for token_id in token_ids) if self._as_text else token_ids

    def _draw(self, length: int) -> list[int]:
        return [self._source.randint(0, self._max_token_id) for _ in range(length)]


def nano_requests(num_requests: int, prompts: RandomPrompts) -> list[RequestSpec]:
    """The workload of nano-vllm's bench.py: 100 to 1,024 tokens in, 100 to 1,024 out; see `nano_work`."""
    work = nano_work(num_requests, (100, 1024), (100, 1024), vocab_size=1 << 31)
    pairs = zip(work.prompts, work.output_lens, strict=True)
    return [RequestSpec(prompts.as_prompt(prompt), output_len) for prompt, output_len in pairs]


def read_requests(path: Path, output_len: int | None, as_text: bool) -> list[RequestSpec]:
    """The requests of a JSON or JSONL file. Raises `StartupError` that names the file and the entry.

    An entry has a prompt: `ids`, `text`, `prompt`, or the first turn of `conversations` or `messages` (ShareGPT). How
    many tokens follow: `output_len`, else `max_tokens` or `output_tokens`, else the length of the second turn.
    """
    try:
        entries = list(_entries(path))
        requests = [_request(entry, output_len, as_text) for entry in entries]
    except OSError as error:
        raise StartupError(f"--dataset-path {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise StartupError(f"--dataset-path {path}: {error}") from error
    if not requests:
        raise StartupError(f"--dataset-path {path}: no request in it")
    return requests


def _entries(path: Path) -> Iterator[Any]:
    """A JSON list, an object with `requests`, or one object a line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
        return
    content = json.loads(text)
    yield from content["requests"] if isinstance(content, dict) else content


def _request(entry: Any, output_len: int | None, as_text: bool) -> RequestSpec:
    if not isinstance(entry, dict):
        raise TypeError(f"an entry must be an object, got {entry!r:.60}")
    turns = _turns(entry.get("conversations") or entry.get("messages") or [])
    prompt = entry.get("prompt") or entry.get("text") or (turns[0] if turns else None)
    if entry.get("ids") and not as_text:
        prompt = entry["ids"]
    if not prompt:
        raise ValueError(f"an entry without a prompt: {json.dumps(entry):.80}")
    if as_text and not isinstance(prompt, str):
        raise ValueError("token ids cannot be sent to a chat endpoint: it takes text")
    answer_len = max(1, len(turns[1]) // _CHARACTERS_PER_TOKEN) if len(turns) > 1 else None
    max_tokens = output_len or entry.get("max_tokens") or entry.get("output_tokens") or answer_len
    if not max_tokens:
        raise ValueError(f"an entry without an output length (--output-len gives one): {json.dumps(entry):.80}")
    return RequestSpec(prompt, int(max_tokens))


def _turns(messages: list[dict[str, Any]]) -> list[str]:
    """The texts of a conversation, in either spelling, from the first thing that a person said."""
    spoken = [turn for turn in messages if (turn.get("from") or turn.get("role")) != "system"]
    return [str(turn.get("value") or turn.get("content") or "") for turn in spoken]
