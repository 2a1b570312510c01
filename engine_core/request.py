"""One request as the engine core sees it: its tokens, its place in the KV cache, and how far it has got.

token_ids    | prompt ............ | output ....... | pending |
                                                    ^ launched, but not read from the device yet
in the cache | computed ................................. |     <- position
"""

from dataclasses import dataclass, field
from enum import Enum

from minivllm.protocol import Finished, Logprobs
from minivllm.sampling_params import SamplingParams


class RequestStatus(Enum):
    WAITING = "waiting"  # in the prefill queue, nothing on the device
    PREFILL = "prefill"  # in the prefill queue, a part of its tokens is computed
    DECODE = "decode"  # in the decode queue
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """`token_ids` holds prompt and output; tokens are the state, everything else can be rebuilt from them."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    stop_token_ids: frozenset[int]  # EOS included, unless the request ignores it
    max_total_tokens: int  # prompt + output, bounded by max_tokens and max_model_len
    seed: int
    arrival_index: int = 0  # order of arrival: first come, first served

    status: RequestStatus = RequestStatus.WAITING
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_committed_blocks: int = 0  # leading blocks that are in the prefix cache or were considered for it
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first attempt
    num_prompt_logprobs: int = 0  # prompt tokens whose log-probabilities were reported
    num_pending: int = 0  # tokens sampled on the device and not read yet
    num_in_flight: int = 0  # launched batches that name this request
    num_preemptions: int = 0
    num_shortages: int = 0  # smallest passes, of this request alone, for which there was no memory
    shortages_in_a_row: int = 0  # such passes since the last that fitted
    row: int = -1  # its row in the device's tables while it runs
    finish: Finished | None = None

    arrival_time: float = 0.0  # seconds on the engine core's monotonic clock, as the two below
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        """Prompt + output, tokens still on the device included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_plain(self) -> bool:
        """Whether the next token needs nothing but logits, temperature and seed."""
        return self.params.is_plain and self.num_output_tokens > self.params.min_tokens

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether the log-probability of a prompt token is still to be reported (the first has none)."""
        return self.params.prompt_logprobs is not None and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def position(self) -> int:
        """Position of the next token to compute: everything before it is in the KV cache."""
        return self.num_computed_tokens

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def take_prompt_logprobs(self, logprobs: Logprobs) -> Logprobs:
        """The part of `logprobs` that was not reported yet: after a preemption the prompt is computed again."""
        num_known = self.num_prompt_logprobs + 1 - logprobs.start
        self.num_prompt_logprobs = max(self.num_prompt_logprobs, logprobs.start + len(logprobs) - 1)
        return logprobs.cut(max(0, num_known), len(logprobs))
