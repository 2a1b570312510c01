"""What the benchmark asks for: fixed texts and output lengths, so that two servers do the same work."""

import json
from dataclasses import dataclass
from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Prompt:
    """A text, how many tokens SmolLM2's tokenizer makes of it, and how many are to follow."""

    text: str
    num_prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """`prompts`, of which `concurrency` are in flight at any time."""

    name: str
    prompts: tuple[Prompt, ...]
    concurrency: int


def load_workloads() -> list[Workload]:
    """A: one request of 64 + 128 tokens. B: 32 requests, 8 in flight. C: the same 32 at once."""
    content = json.loads(PROMPTS.read_text(encoding="utf-8"))
    requests = tuple(Prompt(**request) for request in content["requests"])
    return [
        Workload("A", (Prompt(**content["single"]),), 1),
        Workload("B", requests, 8),
        Workload("C", requests, len(requests)),
    ]
