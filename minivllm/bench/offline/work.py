"""What is asked of an engine: prompts of random token ids and how many tokens are to follow each. Pure data."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

_NANO_MAX_TOKEN_ID = 10_000


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that are submitted at once; request i has `prompts[i]` and generates `output_lens[i]` tokens."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def num_decode_reads(self) -> int:
        """Tokens whose K/V decode passes read: the pass after output token i of a prompt of p reads p + i."""
        pairs = zip(self.prompts, self.output_lens, strict=True)
        return sum(len(prompt) * (n - 1) + n * (n - 1) // 2 for prompt, n in pairs)

    @property
    def num_prefill_pairs(self) -> int:
        """(query, key) pairs of causal attention over all prompts."""
        return sum(len(prompt) * (len(prompt) + 1) // 2 for prompt in self.prompts)

    def part(self, num_requests: int | None, max_tokens: int | None) -> "Work":
        """The first `num_requests` requests, with at most `max_tokens` tokens each; None: no limit."""
        lens = self.output_lens[:num_requests]
        return Work(self.prompts[:num_requests], [min(n, max_tokens or n) for n in lens])

    def static_batches(self, batch_size: int) -> Iterator["Work"]:
        """`batch_size` requests at a time, in order."""
        for start in range(0, len(self.prompts), batch_size):
            end = start + batch_size
            yield Work(self.prompts[start:end], self.output_lens[start:end])


def nano_work(num_requests: int, input_lens: tuple[int, int], output_lens: tuple[int, int], vocab_size: int) -> Work:
    """The random workload of nano-vllm's bench.py: with 256 requests of 100 to 1,024 tokens, the very same numbers."""
    source = random.Random(0)
    highest = min(_NANO_MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[source.randint(0, highest) for _ in range(source.randint(*input_lens))] for _ in range(num_requests)]
    return Work(prompts, [source.randint(*output_lens) for _ in prompts])


def uniform_work(source: random.Random, num_requests: int, prompt_len: int, output_len: int, vocab_size: int) -> Work:
    """Equal lengths, and tokens that no request before had: nothing is found in the prefix cache."""
    prompts = [[source.randrange(vocab_size) for _ in range(prompt_len)] for _ in range(num_requests)]
    return Work(prompts, [output_len] * num_requests)
