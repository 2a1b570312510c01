"""What can be seen of the engine at work: steps, requests, blocks. Sizes, names and times, never a token or a text.

The engine core fills these in (engine_core/watching.py); the live page, /v1/requests/{id} and the trace show them.
Times are seconds on the engine core's monotonic clock. `handle` is a small number that stands for a request: its place
in the order of arrival.
"""

from typing import Literal

from msgspec import Struct

# Why the first request of the prefill queue, and so everybody behind it, is not in the pass that runs.
WaitReason = Literal[
    "turn",  # a pass was running, or it was the decode queue's turn
    "rows",  # max_num_seqs requests run
    "blocks",  # the KV cache has not enough unused blocks for its next chunk
    "budget",  # the pass was full: max_num_batched_tokens
]
WAIT_REASONS: tuple[WaitReason, ...] = ("turn", "rows", "blocks", "budget")


class StepRecord(Struct, array_like=True):
    """One pass. Number i comes right after i-1; a gap means that some were made while nobody could read them.

    requests: handles of the batch, None when it is that of the last decode pass before. `starts` and `counts` say which
    tokens of each were computed (prefill only; in a decode pass it is one of each). sampled: those of a prefill whose
    last prompt token was in it.
    """

    number: int
    kind: Literal["prefill", "decode"]
    began: float  # it was launched, and the pass before it was collected: it had the device
    num_tokens: int
    prefill_queue: int  # lengths, when it was launched
    decode_queue: int
    blocks_used: int
    waiting_for: WaitReason | None
    requests: list[int] | None
    starts: list[int]
    counts: list[int]
    sampled: list[int]
    started: list[int]
    preempted: list[int]
    collected: float = 0.0
    finished: dict[int, str] = {}  # handle → finish reason, of those that ended with it or before the next

    def __post_init__(self) -> None:
        num_chunks = len(self.requests or ()) if self.kind == "prefill" else 0
        if not len(self.starts) == len(self.counts) == num_chunks:
            raise ValueError("columns of a StepRecord do not fit together")


class RequestRow(Struct, array_like=True):
    """Where one request is: of its `num_tokens` (prompt + output so far) the KV cache holds `num_computed_tokens`."""

    handle: int
    request_id: str
    status: Literal["waiting", "prefill", "decode", "finished"]
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    max_total_tokens: int
    num_cached_tokens: int
    num_blocks: int
    num_preemptions: int
    arrival_time: float
    first_scheduled_time: float  # 0: not yet, as below
    last_chunk_time: float  # when the pass was launched that was to bring the first token
    first_token_time: float
    finish_time: float = 0.0
    finish_reason: str | None = None


class BlockMap(Struct, array_like=True):
    """All KV blocks in order, `blocks_per_cell` consecutive ones to a cell, equal neighbours in runs.

    owners[i]: the handle of the request that run i belongs to (of several, the one that came first), 0 for unused
    blocks, -1 for unused blocks whose content can be found again. references[i]: how many requests share them, at most.
    """

    num_blocks: int
    blocks_per_cell: int
    lengths: list[int]  # in cells
    owners: list[int]
    references: list[int]
    used: int  # in blocks, as below
    cached: int
    free: int

    def __post_init__(self) -> None:
        if not len(self.lengths) == len(self.owners) == len(self.references):
            raise ValueError("columns of a BlockMap do not fit together")


class EngineView(Struct, array_like=True):
    """What happened since the last view, and how things stand at `time`."""

    time: float
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_running: int
    num_waiting: int
    num_preemptions: int  # these three since the engine core started
    prompt_tokens: int
    generation_tokens: int
    steps: list[StepRecord]
    requests: list[RequestRow]  # those that run, the first that wait, and those that ended since the last view
    blocks: BlockMap | None  # None: not looked at this time


class PrefillChunk(Struct, array_like=True):
    """Tokens `start` … `start + count - 1` in one pass. Times in seconds since the request's arrival."""

    at: float
    start: int
    count: int
    end: float | None = None


class Preemption(Struct, array_like=True):
    """Its blocks were taken away; later it was computed again. Times in seconds since the request's arrival."""

    at: float
    num_tokens: int  # to be computed again
    resumed_at: float | None = None


class RequestTimeline(Struct, array_like=True, kw_only=True):
    """What happened to one request and why. Times in seconds since its arrival in the engine core."""

    request_id: str
    status: str
    age: float
    num_prompt_tokens: int
    num_output_tokens: int
    max_total_tokens: int
    num_cached_tokens: int
    scheduled_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    finish_reason: str | None = None
    message: str | None = None
    waiting_for: WaitReason | None = None  # while it waits
    num_ahead: int | None = None  # requests before it in the prefill queue, while it waits
    waited: dict[WaitReason, float] = {}
    prefill_chunks: list[PrefillChunk] = []  # the first of them, when there are very many
    num_prefill_chunks: int = 0
    num_decode_steps: int = 0
    preemptions: list[Preemption] = []
    block_runs: list[list[int]] = []  # [first block, number of blocks] in the order of its tokens, while it holds any
