"""The engine taken apart for teaching: you say when to prefill and when to decode, and can look at all of its state.

    engine = MiniVLLMEngine()
    req_id = engine.register_request("What's your name?")     # chat template, tokens, a row in every table
    engine.prefill([req_id])                                   # the whole prompt in one pass; first token
    while not engine.is_finished(req_id):
        engine.decode_step([req_id])                           # one token
    print(engine.get_text(req_id))

The model runner, the paged KV pool and the block tables are those of the server; only the scheduler is you.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine_core.engine import EngineCore
from engine_core.request import Request, RequestStatus
from engine_core.scheduler import Batch
from frontend.tokenizer import Tokenizer
from minivllm.config import DEFAULT_MODEL, EngineConfig
from minivllm.errors import InvalidRequestError, OverloadedError
from minivllm.model_store import resolve_model, resolve_tokenizer
from minivllm.sampling_params import SamplingParams

PastKeyValues = tuple[
    tuple[Tensor, Tensor], ...
]  # per layer: key and value [batch, num_kv_heads, num_tokens, head_dim]


class MiniVLLMEngine:
    """Step-by-step inference over the engine's own parts. Three state stores: `tokens`, `kv`, `requests`."""

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        """Load `model`; `options` are those of `EngineConfig`. Raises `StartupError`."""
        config = EngineConfig(model=model, **options)
        self._core = EngineCore(config, resolve_model(config))
        self._tokenizer = Tokenizer.from_directory(resolve_tokenizer(config))
        self._free_rows = list(range(config.max_num_seqs))[::-1]
        self.requests = RequestTable()
        self.tokens = TokenManager(self.requests)
        self.kv = KVManager(self.requests, self._core)

    def register_request(self, prompt: str, params: SamplingParams | None = None) -> int:
        """Wrap `prompt` in the model's chat template, tokenize it, and return its req_id. Nothing is computed yet."""
        text = self._tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        params = params or SamplingParams(temperature=0.0, max_tokens=None)
        req_id = self.requests.next_id
        request = self._core.admission.make_request(f"step-{req_id}", token_ids, params)
        return self.requests.add(RequestEntry(prompt, request))

    def prefill(self, req_ids: Sequence[int]) -> list[int]:
        """Compute the prompts of `req_ids` in one pass and sample their first tokens, one per request.

        Raises `OverloadedError` when the KV cache has no room, `InvalidRequestError` for a request already prefilled.
        """
        return self._run("prefill", req_ids, RequestStatus.WAITING, self._place)

    def decode_step(self, req_ids: Sequence[int]) -> list[int]:
        """One more token for each of `req_ids` that is not finished, in one pass; their ids, in order.

        Raises `OverloadedError` when the KV cache has no room, `InvalidRequestError` before `prefill`.
        """
        running = [req_id for req_id in req_ids if not self.requests[req_id].finished]
        return self._run("decode", running, RequestStatus.DECODE, self._core.kv.append_slot) if running else []

    def is_finished(self, req_id: int) -> bool:
        return self.requests[req_id].finished

    def get_text(self, req_id: int, skip_special_tokens: bool = False) -> str:
        """Prompt and output of `req_id` as text, by default with the chat template's markers."""
        return self._tokenizer.decode(self.tokens[req_id], skip_special_tokens)

    def get_output(self, req_id: int) -> str:
        """The answer alone, without markers."""
        return self._tokenizer.decode(self.requests[req_id].request.output_token_ids)

    def free(self, req_id: int) -> None:
        """Forget `req_id` and free its KV cache blocks."""
        self._release(self.requests.pop(req_id).request)

    def slice_kv(self, req_id: int) -> PastKeyValues:
        """K and V of one request per layer, [1, num_kv_heads, num_tokens, head_dim], as in Hugging Face's cache."""
        return self.kv[req_id]

    def gather_kv(self, req_ids: Sequence[int]) -> tuple[PastKeyValues, Tensor]:
        """K and V of several requests in one batch, padded on the left with zeros, and the mask [batch, num_tokens]."""
        caches = [self.kv[req_id] for req_id in req_ids]
        lengths = [cache[0][0].shape[2] for cache in caches]
        longest = max(lengths)
        mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
        layers = zip(*caches, strict=True)
        return tuple((_stack(k for k, _ in layer), _stack(v for _, v in layer)) for layer in layers), mask

    def _run(
        self, kind: Any, req_ids: Sequence[int], status: RequestStatus, place: Callable[[Request], Any]
    ) -> list[int]:
        batch = Batch(kind)
        requests = {req_id: self.requests[req_id].request for req_id in req_ids}
        if len(requests) != len(req_ids):
            raise InvalidRequestError(f"req_ids {list(req_ids)} name a request twice", "req_ids")
        for req_id, request in requests.items():
            if request.status is not status:
                raise InvalidRequestError(f"request {req_id} is {request.status.value}, not {status.value}", "req_ids")
        for req_id, request in requests.items():
            if place(request) is None:
                if status is RequestStatus.WAITING:
                    for placed in requests.values():
                        self._release(placed)
                raise OverloadedError(f"no room in the KV cache is left for request {req_id}: free another one first")
        for request in requests.values():
            self._append(batch, request)
        tokens = self._core.runner.launch(batch).collect()
        for request, token in zip(batch.requests, tokens, strict=True):
            self._update(request, token)
        return tokens

    def _place(self, request: Request) -> bool | None:
        if not self._free_rows or not self._core.kv.allocate_prefill(request, request.num_tokens):
            return None
        request.row = self._free_rows.pop()
        return True

    def _release(self, request: Request) -> None:
        self._core.kv.free(request)
        if request.row >= 0:
            self._free_rows.append(request.row)
            request.row = -1

    def _append(self, batch: Batch, request: Request) -> None:
        num_tokens = request.num_tokens - request.num_computed_tokens
        batch.append(request, num_tokens)
        batch.grown.append(request)
        if request.status is RequestStatus.WAITING:
            batch.started.append(request)

    def _update(self, request: Request, token: int) -> None:
        request.token_ids.append(token)
        self._core.kv.commit(request)
        ended = token in request.stop_token_ids or len(request.token_ids) >= request.max_total_tokens
        request.status = RequestStatus.FINISHED if ended else RequestStatus.DECODE


@dataclass(slots=True)
class RequestEntry:
    """Metadata of one request: the text it came as, and its state."""

    prompt: str
    request: Request

    @property
    def finished(self) -> bool:
        return self.request.finished

    @property
    def position(self) -> int:
        return self.request.position


class RequestTable:
    """req_id → metadata."""

    def __init__(self) -> None:
        self._entries: dict[int, RequestEntry] = {}
        self.next_id = 0

    def add(self, entry: RequestEntry) -> int:
        req_id, self.next_id = self.next_id, self.next_id + 1
        self._entries[req_id] = entry
        return req_id

    def pop(self, req_id: int) -> RequestEntry:
        entry = self[req_id]
        del self._entries[req_id]
        return entry

    def __getitem__(self, req_id: int) -> RequestEntry:
        if req_id not in self._entries:
            raise InvalidRequestError(f"request {req_id} is not registered", "req_id")
        return self._entries[req_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class TokenManager:
    """req_id → all token ids, prompt and output."""

    def __init__(self, requests: RequestTable) -> None:
        self._requests = requests

    def __getitem__(self, req_id: int) -> list[int]:
        return self._requests[req_id].request.token_ids


class KVManager:
    """req_id → per layer (key, value), read out of the paged pool through the request's block table."""

    def __init__(self, requests: RequestTable, core: EngineCore) -> None:
        self._requests = requests
        self._core = core

    def __getitem__(self, req_id: int) -> PastKeyValues:
        request = self._requests[req_id].request
        return tuple(self._core.kv_pool.read(request.block_table, request.num_computed_tokens))

    def block_table(self, req_id: int) -> list[int]:
        """Physical blocks of the request, in the order of its tokens."""
        return list(self._requests[req_id].request.block_table)


def _stack(parts: Iterator[Tensor]) -> Tensor:
    """[1, heads, n_i, dim] each → [batch, heads, max n, dim], zeros on the left."""
    tensors = [part[0] for part in parts]
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([torch.nn.functional.pad(tensor, (0, 0, longest - tensor.shape[1], 0)) for tensor in tensors])
