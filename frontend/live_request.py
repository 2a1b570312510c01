"""One request of this frontend from admission to its end: all that is needed to write its answer, and to ask again.

prompt ids + emitted ids + parameters + seed describe a request completely, so an engine core that has never heard of
it continues it exactly.
"""

import msgspec

from frontend.detokenizer import IncrementalDetokenizer
from frontend.output_stream import OutputStream
from minivllm.protocol import Add, Logprobs
from minivllm.sampling_params import SamplingParams


class LiveRequest(msgspec.Struct, eq=False):
    """Times in seconds on `time.monotonic`; 0 where nothing happened yet.

    submitted: the engine core has it, or will hear of it. num_crashes: deaths of the engine core while it had this
    request, since it last brought a token of it; num_trials_lost: those of them when no other was suspected.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # complete: with a seed
    detokenizer: IncrementalDetokenizer
    stream: OutputStream
    arrival_time: float
    last_news_time: float
    output_token_ids: list[int] = []
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    num_cached_tokens: int = 0
    prompt_logprobs: Logprobs | None = None  # of the prompt from its second token on; complete with the first output
    submitted: bool = False
    num_crashes: int = 0
    num_trials_lost: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.detokenizer.num_tokens

    def add_message(self, frontend_id: bytes, seq: int) -> Add:
        """What makes an engine core generate the rest."""
        return Add(frontend_id, seq, self.request_id, self.prompt_token_ids, self.params, list(self.output_token_ids))
