"""The model runner of a GPU: compiled layers, Triton attention, CUDA graphs, copies that nobody waits for.

decode    rows ─▶ [ last tokens ─▶ model ─▶ logits ─▶ sample ─▶ advance the rows ] ─▶ tokens ─▶ pinned memory
                    one graph per batch size, replayed; the host only names the rows
prefill   tokens ─▶ [ model ─▶ logits of last tokens ] ─▶ sample, advance     a graph for short passes, where launching
                                                                               would take longer than computing
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine_core.attention.triton_backend import TritonDecode, TritonPrefill
from engine_core.attention.triton_decode import SplitBuffers
from engine_core.attention.triton_prefill import TILE_QUERY, query_tiles
from engine_core.compilation import compile_layers, decoder_layers
from engine_core.grammar import Grammars
from engine_core.kv_pool import KVPool
from engine_core.model_loader import LoadedModel
from engine_core.model_runner import ModelRunner, SampledTokens
from engine_core.out_of_memory import Shortage, attempt, release_cached_memory
from engine_core.prefill_inputs import PrefillInputs
from engine_core.scheduler import Batch
from engine_core.triton_linear import speed_up_small_batches
from engine_core.triton_sampler import sample_and_advance

logger = logging.getLogger(__name__)

_Graph = TypeVar("_Graph")
_PREFILL_BUCKETS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # tokens
# Tokens of the pass that inductor sees first and chooses its kernels for. Few: it then keeps a reduction in registers,
# which is faster for many tokens, too (a third of the time where queries and keys are normalized and rotated). And no
# width of a model: the compiler would take equal sizes for one and the same, and compile again for others.
_COMPILE_TOKENS = 7


@dataclass(slots=True)
class _DecodeGraph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # [batch_size, vocab_size]
    tokens: Tensor  # [batch_size] int64


@dataclass(slots=True)
class _PrefillGraph:
    graph: torch.cuda.CUDAGraph
    tiles: Tensor  # [max_tiles, 4] int64, the part of the shared buffer that this graph reads
    last_index: Tensor  # [max_prompts] int64, likewise
    logits: Tensor  # [max_prompts, vocab_size]


@dataclass(slots=True)
class _PrefillBuffers:
    """Inputs of captured prefill passes, one allocation for all sizes."""

    tokens: Tensor  # [3, max_tokens] int64: id, position, slot
    tiles: Tensor  # [max_tiles, 4] int64
    last_index: Tensor  # [max_prompts] int64


class CudaRunner(ModelRunner):
    """See the module's picture. `eager` leaves out compilation and graphs."""

    def __init__(
        self,
        loaded: LoadedModel,
        pool: KVPool,
        max_num_seqs: int,
        max_model_len: int,
        grammars: Grammars,
        eager: bool = False,
    ) -> None:
        super().__init__(loaded, pool, max_num_seqs, max_model_len, grammars)
        self._loaded = loaded
        self._eager = eager
        self._max_num_seqs = max_num_seqs
        heads, layout = loaded.num_heads, pool.layout
        largest = batch_sizes(max_num_seqs)[0]
        self._splits = SplitBuffers.allocate(largest, heads, layout.num_kv_heads, layout.head_dim, loaded.device)
        self._decode_inputs = torch.arange(largest, device=self.device).repeat(2, 1)  # order and rows of a pass
        self._decode_inputs[1] = self.rows.scratch_row
        self._rows_sent: list[int] = []
        self._decode_graphs: dict[int, _DecodeGraph] = {}
        self._prefill_graphs: dict[int, _PrefillGraph] = {}
        max_tokens = max(_PREFILL_BUCKETS)
        self._prefill_buffers = _PrefillBuffers(
            torch.zeros(3, max_tokens, dtype=torch.int64, device=self.device),
            torch.zeros(_max_tiles(max_tokens), 4, dtype=torch.int64, device=self.device),
            torch.zeros(_max_prompts(max_tokens), dtype=torch.int64, device=self.device),
        )
        self._prefill_buffers.tokens[2] = pool.scratch_block * pool.block_size

    @torch.inference_mode()
    def warm_up(self, report: Callable[[str], None]) -> None:
        """Compile the layers and capture the graphs, largest first so that all share one memory pool."""
        if self._eager:
            return
        report("compiling the decoder layer")
        speed_up_small_batches(decoder_layers(self._loaded))
        num_layers = compile_layers(self._loaded)
        self._prefill_pass(_COMPILE_TOKENS)
        if num_layers == 0:
            report("no list of equal decoder layers found: running them uncompiled")
        sizes = batch_sizes(self._max_num_seqs)
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for done, size in enumerate(sizes):
                report(f"capturing decode graphs {done + 1}/{len(sizes)} (batch size {size})")
                _capture(self._decode_graphs, size, lambda size: self._capture_decode(size, pool))
            for size in reversed(_PREFILL_BUCKETS):
                report(f"capturing prefill graphs ({size} tokens)")
                _capture(self._prefill_graphs, size, lambda size: self._capture_prefill(size, pool))
        torch.cuda.synchronize()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> SampledTokens:
        """See `ModelRunner`."""
        sampled = super().launch(batch)
        if sampled.tokens is not None:
            sampled.tokens = _to_host(sampled.tokens)
        if sampled.logprobs is not None:
            sampled.logprobs = sampled.logprobs.map(_to_host)
        if sampled.prompt_logprobs is not None:
            sampled.prompt_logprobs = sampled.prompt_logprobs.map(_to_host)
        if sampled.tokens is not None or sampled.prompt_logprobs is not None:
            sampled.event = torch.cuda.Event()
            sampled.event.record()
        return sampled

    @torch.inference_mode()
    def run_decode(self, batch: Batch) -> SampledTokens:
        """See `ModelRunner`."""
        num_reqs = len(batch.requests)
        size = next((size for size in reversed(self._decode_graphs) if size >= num_reqs), num_reqs)
        rows = self._send_rows(batch, size)
        captured = self._decode_graphs.get(size)
        if captured is not None:
            captured.graph.replay()
            logits, tokens = captured.logits, captured.tokens
        else:
            logits, tokens = self._decode_pass(size)
        logits = logits[:num_reqs]
        return self._sampled(logits, self._refine(logits, tokens[:num_reqs], batch, rows[:num_reqs]), batch)

    @torch.inference_mode()
    def run_prefill(self, batch: Batch) -> SampledTokens:
        """See `ModelRunner`."""
        inputs = PrefillInputs.pack(batch, self.pool.block_size)
        rows = [request.row for request in batch.requests]
        tiles = query_tiles(rows, batch.starts, batch.counts)
        size = next((size for size in _PREFILL_BUCKETS if size >= batch.num_tokens), None)
        # A graph computes the logits of last tokens alone.
        if size in self._prefill_graphs and len(rows) <= _max_prompts(size) and not batch.prompt_spans:
            logits = self._replay_prefill(self._prefill_graphs[size], inputs, tiles)
        else:
            input_ids, positions, slots = self._pinned(torch.from_numpy(inputs.tokens))
            metadata = TritonPrefill(slots, self.rows.to_device(tiles), self.rows.block_table)
            logits = self.forward(input_ids, positions, metadata, self.rows.to_device(inputs.logits_index))
        prompt_logprobs = self._prompt_logprobs(logits, inputs, batch)
        if not batch.sampled:
            return SampledTokens(None, prompt_logprobs=prompt_logprobs)
        sampled = self.rows.rows_of(batch.sampled)
        self.rows.lengths[sampled] = self.rows.to_device(batch.sampled_positions)
        logits = logits[: len(batch.sampled)]
        tokens = self._refine(logits, self._sample(logits, sampled), batch, sampled)
        return self._sampled(logits, tokens, batch, prompt_logprobs)

    def _send_rows(self, batch: Batch, size: int) -> Tensor:
        """The rows [size] of a pass, padded with the scratch row; sent only when they differ from the last pass.

        The order stays as good meanwhile: all contexts grow alike.
        """
        num_reqs = len(batch.requests)
        padded = [request.row for request in batch.requests] + [self.rows.scratch_row] * (size - num_reqs)
        if padded != self._rows_sent:
            longest_first = sorted(range(num_reqs), key=batch.starts.__getitem__, reverse=True)
            self._rows_sent = []  # unknown, should the copy fail
            inputs = torch.tensor([[*longest_first, *range(num_reqs, size)], padded]).pin_memory()
            self._decode_inputs[:, :size].copy_(inputs, non_blocking=True)
            self._rows_sent = padded
        return self._decode_inputs[1, :size]

    def _decode_pass(self, size: int) -> tuple[Tensor, Tensor]:
        """Logits and tokens of the rows that were sent, which advance. Everything a decode graph holds."""
        order, rows = self._decode_inputs[:, :size]
        metadata = TritonDecode(order, rows, self.rows.lengths, self.rows.block_table, self._splits)
        logits = self.forward(self.rows.last_token[rows], self.rows.lengths[rows] - 1, metadata)
        return logits, self._sample(logits, rows)

    def _sample(self, logits: Tensor, rows: Tensor) -> Tensor:
        table = self.rows
        return sample_and_advance(logits, rows, table.temperature, table.seed, table.last_token, table.lengths)

    def _refine(self, logits: Tensor, tokens: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """Draw again where a request asks for more than a temperature; `rows` have advanced already."""
        if all(request.is_plain for request in batch.sampled):
            return tokens
        tokens = self.rows.choose(logits, batch, rows, self.rows.lengths[rows] - 1)
        self.rows.last_token[rows] = tokens
        return tokens

    def _replay_prefill(
        self, captured: _PrefillGraph, inputs: PrefillInputs, tiles: list[tuple[int, int, int, int]]
    ) -> Tensor:
        buffers = self._prefill_buffers
        num_tokens = inputs.tokens.shape[1]
        padded = tiles + [(0, 0, 0, 0)] * (captured.tiles.shape[0] - len(tiles))
        last_index = inputs.last_index + [0] * (captured.last_index.shape[0] - len(inputs.last_index))
        buffers.tokens[2].fill_(self.pool.scratch_block * self.pool.block_size)
        buffers.tokens[:, :num_tokens].copy_(torch.from_numpy(inputs.tokens).pin_memory(), non_blocking=True)
        captured.tiles.copy_(torch.tensor(padded).pin_memory(), non_blocking=True)
        captured.last_index.copy_(torch.tensor(last_index).pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.logits

    def _capture_decode(self, size: int, pool: Any) -> _DecodeGraph:
        self._decode_pass(size)  # kernels of this size are compiled and chosen outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits, tokens = self._decode_pass(size)
        return _DecodeGraph(graph, logits, tokens)

    def _capture_prefill(self, size: int, pool: Any) -> _PrefillGraph:
        self._prefill_pass(size)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._prefill_pass(size)
        buffers = self._prefill_buffers
        return _PrefillGraph(graph, buffers.tiles[: _max_tiles(size)], buffers.last_index[: _max_prompts(size)], logits)

    def _prefill_pass(self, size: int) -> Tensor:
        """Logits [max_prompts, vocab_size] of what stands in the buffers. Everything a prefill graph holds."""
        buffers = self._prefill_buffers
        input_ids, positions, slots = buffers.tokens[:, :size]
        metadata = TritonPrefill(slots, buffers.tiles[: _max_tiles(size)], self.rows.block_table)
        return self.forward(input_ids, positions, metadata, buffers.last_index[: _max_prompts(size)])

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory that is there once the work launched so far is done."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _capture(graphs: dict[int, _Graph], size: int, capture: Callable[[int], _Graph]) -> None:
    """Add the graph of one size; without memory for it such passes run without a graph."""
    captured = attempt(lambda: capture(size))
    if isinstance(captured, Shortage):
        release_cached_memory()
        logger.warning("no memory for the graph of size %d (%s): such passes run without", size, captured.detail)
    else:
        graphs[size] = captured


def _max_prompts(num_tokens: int) -> int:
    """Prompts that a captured prefill pass of `num_tokens` tokens can hold."""
    return min(256, max(8, num_tokens // 16))


def _max_tiles(num_tokens: int) -> int:
    """Query tiles that as many prompts can need."""
    return -(-num_tokens // TILE_QUERY) + _max_prompts(num_tokens)


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes of the decode graphs, largest first: fine steps where a row costs most. At least 2, for compiled code."""
    sizes = [2, 4, 8, 12, 16, *range(24, 65, 8), *range(80, 257, 16), *range(288, 1025, 32)]
    return sorted({max(2, max_num_seqs), *(size for size in sizes if size < max_num_seqs)}, reverse=True)
