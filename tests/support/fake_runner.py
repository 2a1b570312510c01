"""A device without a model: slots hold the history of the token whose K/V they would hold, and every read is checked.

The next token is a pure function of the whole history as read through the block table, so a wrong block, a stale
prefix or a block freed too early gives a wrong token; most mistakes are caught earlier, by the asserts here.
Passes run when they are collected, the latest moment a real device could run them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine_core.device import Device, ModelFreeTokens, model_free_device
from engine_core.engine import EngineCore
from engine_core.kv_pool import KVLayout, choose_num_blocks
from engine_core.request import Request
from engine_core.scheduler import Batch
from minivllm.config import EngineConfig

VOCAB_SIZE = 5
GARBAGE = -1


def extend_history(history: int, token: int) -> int:
    """Digest of a history and one more token."""
    return (history * 6364136223846793005 + token + 1442695040888963407) % 2**64


def next_token(history: int) -> int:
    return (history >> 33) % VOCAB_SIZE


def continuation(token_ids: list[int], max_total_tokens: int, stop_token_ids: frozenset[int]) -> list[int]:
    """What a request must get, computed without any cache."""
    history, output = 0, list[int]()
    for token in token_ids:
        history = extend_history(history, token)
    while len(token_ids) + len(output) < max_total_tokens and not (output and output[-1] in stop_token_ids):
        output.append(next_token(history))
        history = extend_history(history, output[-1])
    return output


@dataclass(slots=True)
class _Chunk:
    """One request's part of a pass, as it was when the pass was launched."""

    request: Request
    row: int
    block_table: list[int]
    start: int
    count: int
    token_ids: list[int] | None  # None: the device knows its last token itself
    samples: bool


@dataclass(slots=True)
class _Pass(ModelFreeTokens):
    device: "FakeRunner"
    chunks: list[_Chunk]
    failed: bool = False  # its launch raised an error, but what it had launched by then will still run

    def collect(self) -> list[int]:
        return self.device.run(self)


@dataclass
class FakeRunner:
    """Stands in for `ModelRunner`. `on_launch` sees every batch.

    fail_launch, fail_collect: what the next launch or collect raises. A failed pass leaves garbage wherever it could
    have written. num_releases: how often all memory was asked for.
    """

    block_size: int
    on_launch: Callable[[Batch], None] = lambda batch: None
    fail_launch: Exception | None = None
    fail_collect: Exception | None = None
    num_releases: int = 0
    _slots: dict[int, int] = field(default_factory=dict)  # slot → digest of the history up to its token
    _last_token: dict[int, int] = field(default_factory=dict)  # by row
    _tokens: dict[Request, list[int]] = field(default_factory=dict)  # prompt and output as the device knows them
    _launched: list[_Pass] = field(default_factory=list)

    def launch(self, batch: Batch) -> _Pass:
        self.on_launch(batch)
        for request in batch.started:
            self._tokens[request] = list(request.token_ids)
        error, self.fail_launch = self.fail_launch, None
        chunks = [self._chunk(batch, index) for index in range(len(batch.requests))]
        self._launched.append(_Pass(self, chunks, failed=error is not None))
        self._run_failed()
        if error is not None:
            raise error
        return self._launched[-1]

    def release_memory(self) -> None:
        self.num_releases += 1

    def run(self, launched: _Pass) -> list[int]:
        assert self._launched[0] is launched, "passes are collected in the order of their launch"
        if self.fail_collect is not None:
            error, self.fail_collect = self.fail_collect, None
            for later in self._launched:
                later.failed = True
            self._run_failed()
            raise error
        del self._launched[0]
        tokens = [token for chunk in launched.chunks if (token := self._run_chunk(chunk)) is not None]
        self._run_failed()
        return tokens

    def _run_failed(self) -> None:
        """Let failed passes that are next on the device do their worst."""
        while self._launched and self._launched[0].failed:
            for chunk in self._launched.pop(0).chunks:
                for position in range(chunk.start, chunk.start + chunk.count):
                    self._slots[self._slot(chunk, position)] = GARBAGE
                self._last_token[chunk.row] = GARBAGE
                self._tokens[chunk.request].append(GARBAGE)

    def _chunk(self, batch: Batch, index: int) -> _Chunk:
        request, start, count = batch.requests[index], batch.starts[index], batch.counts[index]
        token_ids = request.token_ids[start : start + count] if batch.kind == "prefill" else None
        assert token_ids is None or len(token_ids) == count
        return _Chunk(
            request, request.row, list(request.block_table), start, count, token_ids, request in batch.sampled
        )

    def _run_chunk(self, chunk: _Chunk) -> int | None:
        tokens = self._tokens[chunk.request]
        history = 0
        for position in range(chunk.start):
            history = extend_history(history, tokens[position])
            assert self._slots.get(self._slot(chunk, position)) == history, "a past token is not what was stored"
        new = [self._last_token[chunk.row]] if chunk.token_ids is None else chunk.token_ids
        assert new == tokens[chunk.start : chunk.start + len(new)], "the device computes the wrong tokens"
        for position, token in enumerate(new, chunk.start):
            history = extend_history(history, token)
            self._slots[self._slot(chunk, position)] = history
        if not chunk.samples:
            return None
        sampled = self._last_token[chunk.row] = next_token(history)
        tokens.append(sampled)
        return sampled

    def _slot(self, chunk: _Chunk, position: int) -> int:
        return chunk.block_table[position // self.block_size] * self.block_size + position % self.block_size


def make_fake_engine(depth: int, **options: Any) -> tuple[EngineCore, FakeRunner]:
    """The real engine core over a fake device, with `depth` passes in flight between steps."""
    config = EngineConfig(model="fake", device="cpu", **options)
    runner = FakeRunner(config.block_size)

    def load(config: EngineConfig, directory: Path, report: Callable[[str], None]) -> Device:
        num_blocks = choose_num_blocks(config, KVLayout(1, 1, 1, torch.float32), torch.device("cpu"))
        return model_free_device(
            runner,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len or num_blocks * config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens or 512,
            depth=depth,
            vocab_size=VOCAB_SIZE,
        )

    return EngineCore(config, Path("fake"), load=load), runner
