"""The messages between frontends and the engine core: what is said, not how it travels (see transport.py).

A frame is three msgpack objects: the protocol version, a CRC-32 of the rest, and one positional array whose first
element tells the kind. Any msgpack library can read it. `msgspec` checks every type and length while decoding, so
garbage, truncated, damaged or hostile frames raise `ProtocolError` and nothing else.

    frontend → engine core (PUSH → PULL)       engine core → frontend (XPUB → SUB, topic = frontend id)
      Hello   I am here, answer me               Ready     the model is loaded; facts about it
    # Add     a request                        # Outputs   new tokens of one step, in columns
    # Abort   forget these requests            # Error     a request was refused before it was admitted
      Ping    my lease                         # Released  requests freed because their frontend was silent
                                                 Stats     heartbeat, with every number of /metrics
      Watch   show me what you do, for a while   Dead      this session is over, and why
      Explain what happened to this request?     View      the latest steps, for those who watch
                                                 Explained the answer, None for an unknown request

Those marked # are numbered (`seq`) and arrive once and in order (channel.py); the others may be lost or repeated.
`frontend_id` names one session: a frontend that lost the engine core takes a new id, so nothing of the old session can
reach it. `epoch` names one life of the engine core: it changes when the engine core is restarted.
"""

import struct
import zlib
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from minivllm.engine_view import EngineView, RequestTimeline
from minivllm.errors import ProtocolError
from minivllm.sampling_params import SamplingParams, TokenId

PROTOCOL_VERSION = 3
FRONTEND_ID_BYTES = 8  # fixed width: SUB topics match by prefix, so "1" would also receive what is sent to "10"

MAX_REQUEST_ID = 300  # characters: what a client may choose (256), and what a frontend puts around it

FrontendId = Annotated[bytes, Meta(min_length=FRONTEND_ID_BYTES, max_length=FRONTEND_ID_BYTES)]
RequestId = Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID)]
Counter = Annotated[int, Meta(ge=0, le=2**62)]  # sums of two fit into what msgpack and indices hold
WATCH_SECONDS = 5.0
FinishReason = Literal["stop", "length", "abort", "error"]


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: positional, immutable, extra fields refused."""


class ChannelState(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One end of a channel, in numbered messages: sent so far; received without a gap; missing right after those."""

    num_sent: Counter = 0
    num_received: Counter = 0
    num_missing: Counter = 0


class Hello(Message, frozen=True, tag=1):
    frontend_id: FrontendId


class Add(Message, frozen=True, tag=2):
    """One request. `output_token_ids` are tokens already emitted: the engine continues after them."""

    frontend_id: FrontendId
    seq: Counter
    request_id: RequestId
    prompt_token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    params: SamplingParams
    output_token_ids: list[TokenId] = []


class Abort(Message, frozen=True, tag=3):
    frontend_id: FrontendId
    seq: Counter
    request_ids: list[RequestId]


class Ping(Message, frozen=True, tag=4):
    frontend_id: FrontendId
    channel: ChannelState


class EngineFacts(Struct, frozen=True, array_like=True):
    """What a frontend must know of the loaded model. `block_size` in tokens, the rest as named."""

    pid: int
    model: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    weight_bytes: int
    eos_token_ids: list[TokenId]


class Finished(Struct, frozen=True, array_like=True):
    """Why and how one request ended. Times in seconds, on the engine core's monotonic clock.

    queue_time: arrival to first scheduled; prefill_time: to the first token; decode_time: to the last token.
    """

    reason: FinishReason
    stop_token_id: TokenId | None = None
    num_cached_tokens: Counter = 0
    queue_time: float = 0.0
    prefill_time: float = 0.0
    decode_time: float = 0.0
    message: str | None = None


class Ready(Message, frozen=True, tag=16):
    epoch: Counter
    facts: EngineFacts


class Logprobs(Struct, array_like=True):
    """Log-probabilities of n tokens of one request, in columns. Natural logarithms, of the model's own distribution.

    tokens: of the tokens themselves [n]; top_ids, top: the k most probable ids at each place and theirs, best first,
    flat [n * k]. `start` is the place of the first token among the prompt's (where they are prompt tokens).
    """

    tokens: list[float] = []
    top_ids: list[TokenId] = []
    top: list[float] = []
    start: Counter = 0

    def __post_init__(self) -> None:
        if len(self.top) != len(self.top_ids) or (self.top and len(self.top) % max(1, len(self.tokens))):
            raise ValueError("columns of log-probabilities do not fit together")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_top(self) -> int:
        """k: alternatives at each place."""
        return len(self.top) // len(self.tokens) if self.tokens else 0

    def extend(self, other: "Logprobs") -> None:
        """Append the places of `other`, which has as many alternatives."""
        self.tokens += other.tokens
        self.top_ids += other.top_ids
        self.top += other.top

    def cut(self, start: int, end: int) -> "Logprobs":
        """The places from `start` up to `end`."""
        k = self.num_top
        return Logprobs(
            self.tokens[start:end], self.top_ids[start * k : end * k], self.top[start * k : end * k], self.start + start
        )


class Outputs(Message, frozen=True, tag=17):
    """New tokens of one step. Request i got the next `counts[i]` ids of the flat column `token_ids`.

    A request that ends without a new token (abort) stands in `request_ids` with count 0, and so does one that has only
    log-probabilities of its prompt to report. Those arrive chunk by chunk, the last not after the first token.
    """

    epoch: Counter
    seq: Counter
    request_ids: list[RequestId]
    counts: list[Counter]
    token_ids: list[TokenId]
    finished: dict[RequestId, Finished] = {}
    logprobs: dict[RequestId, Logprobs] = {}
    prompt_logprobs: dict[RequestId, Logprobs] = {}

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.request_ids) or sum(self.counts) != len(self.token_ids):
            raise ValueError("columns of an Outputs message do not fit together")
        if self.logprobs:
            counts = dict(zip(self.request_ids, self.counts, strict=True))
            if any(len(logprobs) != counts.get(request_id) for request_id, logprobs in self.logprobs.items()):
                raise ValueError("log-probabilities are not those of the tokens")


class Error(Message, frozen=True, tag=18):
    """`request_id` was refused. `param` names the field at fault; `code` is a short machine-readable word."""

    epoch: Counter
    seq: Counter
    request_id: RequestId
    code: str
    message: str
    param: str | None = None


class Histogram(Struct, array_like=True):
    """Kept by the engine core, cumulative: `counts[i]` values fell in (bounds[i-1], bounds[i]], the last above all."""

    bounds: list[float]
    counts: list[int]
    sum: float = 0.0


class EngineStats(Struct, array_like=True, kw_only=True):
    """Gauges now, counters since the engine core started. Tokens, blocks, bytes and seconds."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_used: int = 0  # referred to by a live request
    kv_blocks_cached: int = 0  # unreferenced, but their content can be found again by prefix
    kv_blocks_free: int = 0
    kv_blocks_leaked: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0  # in tokens
    prefix_cache_hits: int = 0  # in tokens
    num_requests_submitted: int = 0
    num_requests_finished: dict[str, int] = {}  # by finish reason
    tokens_per_second: float = 0.0
    gpu_memory_bytes: int = 0
    histograms: dict[str, Histogram] = {}
    num_oom_recoveries: int = 0
    integrity: str = ""  # with --enable-debug: "ok", or what does not reconcile


class Stats(Message, frozen=True, tag=19):
    epoch: Counter
    channel: ChannelState
    stats: EngineStats


class Dead(Message, frozen=True, tag=20):
    epoch: Counter
    reason: str


class Released(Message, frozen=True, tag=21):
    """The lease of their frontend ran out, so these requests were freed; whoever still wants one adds it again."""

    epoch: Counter
    seq: Counter
    request_ids: list[RequestId]


class Watch(Message, frozen=True, tag=8):
    """Send views for `WATCH_SECONDS`; said again to go on. at_once: one now, even if nothing has happened."""

    frontend_id: FrontendId
    at_once: bool = False


class Explain(Message, frozen=True, tag=9):
    frontend_id: FrontendId
    request_id: RequestId


class View(Message, frozen=True, tag=24):
    epoch: Counter
    view: EngineView


class Explained(Message, frozen=True, tag=25):
    epoch: Counter
    request_id: RequestId
    timeline: RequestTimeline | None


FrontendMessage = Hello | Add | Abort | Ping | Watch | Explain
EngineMessage = Ready | Outputs | Error | Stats | Dead | Released | View | Explained

_T = TypeVar("_T")
_HEAD = struct.Struct(">BBI")  # version, msgpack's mark of a 32-bit integer, the checksum
_UINT32 = 0xCE
_encoder = msgspec.msgpack.Encoder()
_frontend_decoder: msgspec.msgpack.Decoder[FrontendMessage] = msgspec.msgpack.Decoder(FrontendMessage)
_engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


def encode(message: Message) -> bytearray:
    """`message` as one frame: version, checksum, array."""
    frame = bytearray(_HEAD.size)
    _encoder.encode_into(message, frame, _HEAD.size)
    _HEAD.pack_into(frame, 0, PROTOCOL_VERSION, _UINT32, zlib.crc32(memoryview(frame)[_HEAD.size :]))
    return frame


def decode_from_frontend(frame: bytes | memoryview) -> FrontendMessage:
    """One frame received by the engine core. Raises `ProtocolError`."""
    return _decode(_frontend_decoder, frame)


def decode_from_engine(frame: bytes | memoryview) -> EngineMessage:
    """One frame received by a frontend. Raises `ProtocolError`."""
    return _decode(_engine_decoder, frame)


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes | memoryview) -> _T:
    view = memoryview(frame)
    if len(view) <= _HEAD.size:
        raise ProtocolError(f"a frame of {len(view)} bytes is too short to be a message")
    version, mark, checksum = _HEAD.unpack_from(view)
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {version}, but this process speaks version {PROTOCOL_VERSION}")
    content = view[_HEAD.size :]
    if mark != _UINT32 or zlib.crc32(content) != checksum:
        raise ProtocolError(f"a frame of {len(view)} bytes was damaged on its way")
    try:
        message: _T = decoder.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message: {error}") from error
    return message
